#pragma once

// Crash points of the protocols: save, retention, recovery and the client's side of a save.
//
//   STEP("fsync parts");                             just before the action
//   if (int e = STEP_ERROR("fsync parts"); e != 0)   the same; act on errno `e` instead of the call
//
// Both compile to nothing unless STILLFRAME_FAULTS is defined (the dev, asan and tsan presets). At
// run time, from the environment:
//   STILLFRAME_STEP_AT=n      act on the n-th hit of this process (1 is the first); unset: never
//   STILLFRAME_STEP_ONLY=name count only the hits with this name
//   STILLFRAME_STEP_DO=what   kill (default) | stop | error:ERRNO (that hit) | errors:ERRNO (that
//   hit
//                             and all later ones) | sleep:MS
//   STILLFRAME_STEP_TRACE=path  appends one line "n name" for each hit
#ifdef STILLFRAME_FAULTS
namespace stillframe {
// Thread-safe. Returns the errno to act on, or 0.
int step_hit(const char* name) noexcept;
}  // namespace stillframe
#define STEP(name) ((void)::stillframe::step_hit(name))
#define STEP_ERROR(name) ::stillframe::step_hit(name)
#else
#define STEP(name) ((void)0)
#define STEP_ERROR(name) 0
#endif
