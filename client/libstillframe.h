/* libstillframe: save a training process's state through the Stillframe daemon, and get it back.
 *
 * C ABI, usable from any language. Rules for every call:
 *
 * - It returns SF_OK (0), SF_TIMEOUT, or one of SF_* below; with anything but SF_OK, `error` (may
 *   be NULL) says what was wrong and what to do next.
 * - It has a deadline: its timeout_ms, or 10 s where it has none. It never blocks longer, never
 *   ends the process, never prints, installs no signal handler. Only the sf_checkpoint_* and
 *   sf_run_list() calls take as long as the drive does.
 * - A session may be used by one thread at a time, except sf_capture_wait(), sf_ticket_get() and
 *   sf_ticket_wait(), which any threads may call beside it. A checkpoint that was opened with a
 *   session is read by the session's thread. Calls on a session or checkpoint from a forked child
 *   answer SF_INVALID_ARGUMENT: the child must not use its parent's.
 * - Strings are UTF-8 and copied. Structs that begin with struct_bytes take sizeof(the struct);
 *   members are only ever appended.
 * - Times are nanoseconds of CLOCK_MONOTONIC; durations are nanoseconds; sizes are bytes.
 */
#ifndef STILLFRAME_LIBSTILLFRAME_H
#define STILLFRAME_LIBSTILLFRAME_H

#include <stddef.h>
#include <stdint.h>

#define SF_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum sf_code {
  SF_OK = 0,
  SF_INVALID_ARGUMENT = 1, /* The request itself is wrong; retrying it cannot help. */
  SF_NOT_FOUND = 2,        /* No such checkpoint, run or tag. */
  /* Out of disk, slots or memory; free something, then retry. A session's call that could not get
   * the memory it needed says "out of memory"; the saves that were not durable then have failed. */
  SF_RESOURCE_EXHAUSTED = 3,
  SF_UNAVAILABLE = 4, /* The daemon or the drive may come back; retry with backoff. */
  SF_DATA_LOSS = 5,   /* Bytes are missing or fail their checksum, or a capture was torn. */
  SF_CANCELLED = 6,   /* Ended by close, or by the other side. */
  SF_INTERNAL = 7,    /* A bug; report it. */
  SF_TIMEOUT = 100    /* Not yet: the state asked for was not reached in time. */
};

typedef struct sf_error {
  int32_t code;   /* enum sf_code */
  int32_t native; /* errno behind it, or 0 */
  char message[2040];
} sf_error;

typedef struct sf_session sf_session;       /* one (run, rank) attached to a daemon */
typedef struct sf_checkpoint sf_checkpoint; /* one committed checkpoint, open for reading */

SF_API const char* sf_version(void); /* "0.1.0" */

/* ---- attach ---------------------------------------------------------------------------------- */

/* Keeps the `count` best checkpoints by a metric given to saves; NaN is never among them, of equals
 * the newest is. */
typedef struct sf_best {
  const char* metric;
  int32_t is_max;
  uint32_t count;
} sf_best;

#define SF_BEST_COUNT_MAX 16

typedef struct sf_attach_options {
  uint32_t struct_bytes;
  uint32_t rank;
  uint32_t world_size; /* 1: only one rank is served so far */
  uint32_t keep_last;  /* newest checkpoints to keep; 0 keeps all */
  uint32_t keep_every; /* keep what has a step divisible by this as well; 0: nothing for that */
  uint32_t best_count; /* of `best` */
  int32_t force_filesystem; /* accept a network file system */
  int32_t no_autostart;     /* never start a private daemon */
  uint32_t slot_count;      /* 0: 2 */
  uint32_t copier_threads;  /* 0: one per four CPUs, 1 to 4; the waiting thread copies as well */
  uint32_t timeout_ms;      /* 0: 10 000 */
  uint32_t reserved;        /* 0 */
  uint64_t arena_bytes_max; /* 0: the daemon's own cap */
  const char* run_path;     /* created when absent; made absolute */
  const sf_best* best;      /* what to keep as well; the first one is what `best` means */
  const char* framework;    /* "torch 2.13.0", stored in manifests; may be NULL */
  const char* python_version;
  const char* socket_path; /* NULL: the usual look-up (docs/PROTOCOL.md section 1) */
  /* NULL: $STILLFRAME_DAEMON, beside this library, ../bin, $PATH. For a socket that was named
   * (socket_path, STILLFRAME_SOCKET) a daemon is started only when this is set too. */
  const char* daemon_path;
  /* Taken on each GPU that has tensors, at the first save that has some: what is packed there waits
   * in it for its copy. 0: 128 MiB, or less for a smaller state. Below 2 MiB: nothing is taken, and
   * the GPU writes to the slot itself; so too where it has nothing to spare. */
  uint64_t gpu_window_bytes;
  /* The most that a worker process may take on each GPU for the lanes "hbm" and "ipc"; 0: room for
   * all that is packed there, up to half of what is free. Below 2 MiB: lane "pinned". */
  uint64_t gpu_ring_bytes;
  /* How tensors of GPUs are captured: "pinned", "hbm" or "ipc" (docs/guide/gpu.md); NULL or "auto":
   * "pinned". A GPU on which it is not possible uses "pinned"; sf_session_describe() says why. */
  const char* lane;
} sf_attach_options;

/* Connects (starting a private daemon if none answers) and opens the run. SF_UNAVAILABLE: no daemon
 * and none could be started, and the message says which file was looked for; or another process
 * writes this run, and was given 2 s to end. SF_INVALID_ARGUMENT: the directory is not writable, or
 * its file system is refused. */
SF_API int sf_attach(const sf_attach_options* options, sf_session** session, sf_error* error);

/* Warnings of the attach, one per line, "" if none; valid until the session ends. */
SF_API const char* sf_session_warnings(sf_session* session);

/* A JSON object for status displays: lane, why not a better one, copy kernel, page kind, slots,
 * socket, daemon version, saves by result. Free with sf_free(). */
SF_API int sf_session_describe(sf_session* session, char** json, sf_error* error);

/* Finishes the capture in progress, or voids it when timeout_ms passes, joins the copiers, detaches
 * and frees the session. Does not wait for DURABLE: use sf_ticket_wait() before. Always frees, but
 * in a forked child, where it does nothing: there are no threads and mappings to end. */
SF_API int sf_session_close(sf_session* session, uint32_t timeout_ms, sf_error* error);

/* ---- layout ---------------------------------------------------------------------------------- */

typedef struct sf_tensor {
  const char* name;
  const uint64_t* shape; /* [dimension_count]; NULL for a 0-d tensor */
  uint32_t dimension_count;
  uint32_t dtype; /* format::Dtype, docs/FORMAT.md section 2 */
} sf_tensor;

typedef struct sf_part {
  const char* name; /* "model" becomes model.safetensors */
  const sf_tensor* tensors;
  uint64_t tensor_count;
  const char* const* metadata; /* [2 * metadata_count]: key, value, ... */
  uint64_t metadata_count;
} sf_part;

/* Says what a save will hold. Call again when it changed; the same layout again costs nothing. The
 * arena is then made ready in the background: the first save waits for it. SF_RESOURCE_EXHAUSTED:
 * no memory for one slot; the message has the amounts. */
SF_API int sf_layout_register(sf_session* session, const sf_part* parts, uint64_t part_count,
                              uint32_t timeout_ms, sf_error* error);

/* ---- save ------------------------------------------------------------------------------------ */

enum sf_memory { SF_MEMORY_HOST = 0, SF_MEMORY_CUDA = 1 };

/* The memory of one tensor at save time, in the order of the layout (parts in order, tensors in
 * order). That of a GPU belongs to the GPU's primary context; which GPU, its driver tells. */
typedef struct sf_source {
  const void* data;            /* may be NULL for an empty tensor */
  const int64_t* stride_bytes; /* [dimension_count]; NULL: contiguous, row-major */
  uint32_t lazy; /* nonzero: may be copied after the call, until CAPTURED; else before it returns */
  uint32_t memory; /* enum sf_memory */
} sf_source;

/* The stream in whose order the trainer uses the memory of a GPU: a save holds what the work
 * enqueued there before it leaves, and work enqueued behind sf_capture_fence() waits for it. */
typedef struct sf_stream {
  void* stream;      /* a CUstream, as torch.cuda.current_stream().cuda_stream; NULL: the default */
  int32_t device;    /* as this process counts its GPUs */
  uint32_t reserved; /* 0 */
} sf_stream;

enum sf_capture { SF_CAPTURE_EAGER = 0, SF_CAPTURE_LAZY = 1 };
enum sf_check { SF_CHECK_SAMPLE = 0, SF_CHECK_FULL = 1 };

typedef struct sf_save_options {
  uint32_t struct_bytes;
  uint32_t capture;         /* enum sf_capture; eager ignores sf_source.lazy */
  uint32_t check;           /* enum sf_check: how much of the lazy tensors is compared; with FULL
                               and memory of GPUs sf_capture_fence() waits for the capture */
  uint32_t has_pickle;      /* state_json holds opted-in pickles */
  uint32_t busy_timeout_ms; /* how long to wait for a free slot */
  uint32_t metric_count;
  int64_t step; /* 0 or more; may repeat after a rollback */
  const char* const* metric_names;
  const double* metric_values;
  const char* state_json; /* typed JSON, docs/FORMAT.md section 5; copied */
  uint64_t state_bytes;
  const sf_stream* streams; /* at most one for each GPU; one that is not named: its default */
  uint64_t stream_count;
} sf_save_options;

/* Begins a save. When it returns SF_OK the save is ACCEPTED and *ticket names it; all eager memory
 * has been copied. Lazy memory must stay unchanged until sf_capture_publish() or sf_capture_void().
 * With SF_CAPTURE_EAGER the snapshot is CAPTURED already and neither is to be called. The first
 * save also waits for the arena (up to 60 s, reported in first_save_wait_ns). One capture at a
 * time: SF_INVALID_ARGUMENT if an earlier one was neither published nor voided.
 * SF_RESOURCE_EXHAUSTED: no slot became free in busy_timeout_ms. SF_UNAVAILABLE: the daemon died
 * and could not be replaced. Nothing is held after an error. */
SF_API int sf_save_begin(sf_session* session, const sf_save_options* options,
                         const sf_source* sources, uint64_t source_count, uint64_t* ticket,
                         sf_error* error);

/* Waits until every byte of the capture is copied; with help != 0 this thread copies too.
 * SF_TIMEOUT: nothing moved for timeout_ms (progress restarts it; own copying is progress). The
 * ticket's fence_wait_ns grows by the time spent with help != 0. */
SF_API int sf_capture_wait(sf_session* session, uint64_t ticket, uint32_t timeout_ms, int help,
                           sf_error* error);

/* Opens the fence for work that the caller enqueues on GPUs from now on, without waiting for them.
 * Waits, and copies, as sf_capture_wait() with help until the memory of the host is copied; makes
 * the streams of the save wait until the memory of GPUs is. Then all of it may change: by work
 * enqueued behind this call to those streams, or to others that wait for them. The save becomes
 * CAPTURED by sf_capture_wait() and sf_capture_publish() as always. Without memory of GPUs, as
 * sf_capture_wait() and what sf_capture_publish() compares. SF_DATA_LOSS, SF_TIMEOUT: as there. */
SF_API int sf_capture_fence(sf_session* session, uint64_t ticket, uint32_t timeout_ms,
                            sf_error* error);

/* After sf_capture_wait() returned SF_OK: compares blocks of the lazy tensors with the snapshot and
 * makes it CAPTURED. From then on all memory may change. SF_DATA_LOSS: a tensor changed while it
 * was captured; the save has FAILED and the message names the tensor. Calling it again for the same
 * ticket is harmless. */
SF_API int sf_capture_publish(sf_session* session, uint64_t ticket, sf_error* error);

/* Gives a capture up; the save FAILS with SF_CANCELLED, or SF_DATA_LOSS if torn != 0, and this
 * reason. No copier touches the sources after it returns. */
SF_API int sf_capture_void(sf_session* session, uint64_t ticket, int torn, const char* reason,
                           sf_error* error);

enum sf_state { SF_ACCEPTED = 0, SF_CAPTURED = 1, SF_DURABLE = 2, SF_FAILED = 3 };

typedef struct sf_ticket {
  uint32_t struct_bytes;
  int32_t state;     /* enum sf_state */
  uint64_t sequence; /* the checkpoint's, decided at ACCEPTED */
  int64_t step;
  uint64_t bytes;      /* of all parts */
  int64_t begin_ns;    /* sf_save_begin() was called */
  int64_t accepted_ns; /* 0: not yet, here and below */
  int64_t captured_ns;
  int64_t durable_ns;
  int64_t begin_call_ns;      /* duration of sf_save_begin() */
  int64_t busy_wait_ns;       /* of it: waiting for a slot */
  int64_t first_save_wait_ns; /* of it: waiting for the arena */
  /* the caller's waits at the fence, and from CAPTURED on those of its streams on GPUs */
  int64_t fence_wait_ns;
  sf_error failure; /* with SF_FAILED */
} sf_ticket;

/* Takes in what the daemon has said and tells a ticket's state; does not wait. The last 64 tickets
 * are known. */
SF_API int sf_ticket_get(sf_session* session, uint64_t ticket, sf_ticket* info, sf_error* error);
/* Waits for SF_CAPTURED or SF_DURABLE. A failed save gives its failure as the return code; so does
 * one whose daemon is gone, or has been silent for 5 s and does not answer for 5 s when it is asked
 * (SF_UNAVAILABLE). */
SF_API int sf_ticket_wait(sf_session* session, uint64_t ticket, int state, uint32_t timeout_ms,
                          sf_error* error);

/* Waits until no save of the run, of this or an earlier trainer, is CAPTURED but not yet DURABLE.
 */
SF_API int sf_session_settle(sf_session* session, uint32_t timeout_ms, sf_error* error);

/* Removes a checkpoint of the run for good, for callers with a retention of their own. Only behind
 * a newer one that restores: SF_INVALID_ARGUMENT if there is none, or if a tag protects it.
 * SF_NOT_FOUND: it is not there. SF_TIMEOUT: the daemon was asked and may go on removing it.
 * SF_RESOURCE_EXHAUSTED: for all of that time it had three earlier ones to remove. */
SF_API int sf_checkpoint_remove(sf_session* session, uint64_t sequence, uint32_t timeout_ms,
                                sf_error* error);

/* ---- read (no daemon needed) ----------------------------------------------------------------- */

/* A JSON array of the run's checkpoints, oldest first: {"sequence", "step", "path", "bytes",
 * "wall_ns", "metrics", "best", "tags", "damage"}; best is a list of {"metric", "mode"}, damage
 * null or a reason. A run that does not exist gives []. Free with sf_free(). */
SF_API int sf_run_list(const char* run_path, char** json, sf_error* error);

/* Opens one by selector: "latest", "best", "best:METRIC", "12" (sequence), "step-1200", or a tag.
 * `session` may be NULL; with one, a snapshot that the daemon still has in memory is used instead
 * of the disk. Checks manifest, sums, headers and state.json; SF_DATA_LOSS names the damage. */
SF_API int sf_checkpoint_open(const char* run_path, const char* selector, sf_session* session,
                              sf_checkpoint** checkpoint, sf_error* error);
SF_API void sf_checkpoint_close(sf_checkpoint* checkpoint);

/* Texts owned by the checkpoint, NUL-terminated: manifest.json; state.json of this rank; the JSON
 * of a part's safetensors header, in the order of the manifest's parts (NULL beyond them). */
SF_API const char* sf_checkpoint_manifest(const sf_checkpoint* checkpoint);
SF_API const char* sf_checkpoint_state(const sf_checkpoint* checkpoint, uint64_t* bytes);
SF_API const char* sf_checkpoint_header(const sf_checkpoint* checkpoint, uint64_t part_index);

typedef struct sf_target {
  uint64_t part_index;
  const char* name; /* of a tensor in that part */
  void* data;
  uint64_t bytes;              /* must be the tensor's size */
  const int64_t* stride_bytes; /* NULL: contiguous, which memory of a GPU must be */
  uint32_t memory;             /* enum sf_memory */
  uint32_t reserved;           /* 0 */
} sf_target;

typedef struct sf_read_stats {
  uint32_t struct_bytes;
  int32_t from_memory; /* the daemon's resident snapshot was used */
  uint64_t bytes;      /* read from the drive or the slot */
  int64_t duration_ns;
} sf_read_stats;

/* Fills the targets, each extent checked against its hash. Targets may be any subset. For those on
 * GPUs it first waits for all work there; when it returns they are filled. SF_DATA_LOSS:
 * an extent is damaged, the message names it, and targets may hold unverified bytes: read another
 * checkpoint into them or discard them. SF_INVALID_ARGUMENT (a wrong name or size): nothing was
 * written. */
SF_API int sf_checkpoint_read(sf_checkpoint* checkpoint, const sf_target* targets,
                              uint64_t target_count, sf_read_stats* stats, sf_error* error);

/* Opens a safetensors file that stands alone, as a checkpoint of one part: no state, and of its
 * manifest only the part means something. A file of sf_file_write() is checked like any checkpoint;
 * of another writer's, whose metadata has no "stillframe.state", nothing can be checked.
 * SF_DATA_LOSS: damaged, or no safetensors file. */
SF_API int sf_file_open(const char* path, sf_checkpoint** checkpoint, sf_error* error);

/* Reads everything and compares every hash. SF_DATA_LOSS names the first extent that differs;
 * SF_INVALID_ARGUMENT: there are no hashes. */
SF_API int sf_checkpoint_verify(sf_checkpoint* checkpoint, sf_error* error);

/* Compares bytes of a part's file that the caller has read or mapped with their hashes: `bytes` of
 * them from `offset` on, which is a multiple of 1 MiB; so is `bytes`, unless it ends with the part.
 * May be called beside itself on several threads. SF_DATA_LOSS: an extent differs, the message
 * names it. */
SF_API int sf_checkpoint_check(const sf_checkpoint* checkpoint, uint64_t part_index,
                               uint64_t offset, const void* data, uint64_t bytes, sf_error* error);

/* ---- write (no daemon needed) ---------------------------------------------------------------- */

typedef struct sf_write_options {
  uint32_t struct_bytes;
  uint32_t has_pickle; /* state_json holds opted-in pickles */
  const char* path;
  const char* state_json; /* sf_model_write() alone, as are those below */
  uint64_t state_bytes;
  const char* framework; /* may be NULL */
  const char* python_version;
} sf_write_options;

/* Both calls block as long as the drive takes. `path` is the old or the new one whatever happens,
 * and durable when they return SF_OK; after an error the old one is as it was. `lazy` of the
 * sources means nothing. SF_DATA_LOSS: a tensor changed during the call. */

/* Writes a whole model: a directory with these parts, which sf_checkpoint_open() takes as run_path
 * with the selector "latest". Replaces a whole model or an empty directory, nothing else. Makes the
 * directories above it. */
SF_API int sf_model_write(const sf_write_options* options, const sf_part* parts,
                          uint64_t part_count, const sf_source* sources, uint64_t source_count,
                          sf_error* error);

/* Writes one safetensors file that carries its own hashes; its metadata must have
 * "stillframe.state". Replaces any regular file. The directory must exist. */
SF_API int sf_file_write(const sf_write_options* options, const sf_part* part,
                         const sf_source* sources, uint64_t source_count, sf_error* error);

/* ---- daemon ---------------------------------------------------------------------------------- */

/* The daemon's status as JSON. SF_UNAVAILABLE: none is running. Never starts one. Free with
 * sf_free(). */
SF_API int sf_daemon_status(const char* socket_path, char** json, sf_error* error);

SF_API void sf_free(char* text);

#ifdef __cplusplus
}
#endif

#endif
