#include "kernels/gpu_image.h"

#if defined(STILLFRAME_FATBIN)
// In the section where NVIDIA's tools look for device code, so that cuobjdump lists the library's.
__asm__(
    ".pushsection .nv_fatbin, \"a\"\n"
    ".balign 16\n"
    ".globl stillframe_gpu_image_begin\n"
    ".hidden stillframe_gpu_image_begin\n"
    "stillframe_gpu_image_begin:\n"
    ".incbin \"" STILLFRAME_FATBIN
    "\"\n"
    ".globl stillframe_gpu_image_end\n"
    ".hidden stillframe_gpu_image_end\n"
    "stillframe_gpu_image_end:\n"
    ".popsection\n");

extern "C" const std::byte stillframe_gpu_image_begin[];
extern "C" const std::byte stillframe_gpu_image_end[];
#endif

namespace stillframe::kernels {

ConstBytes gpu_image() noexcept {
#if defined(STILLFRAME_FATBIN)
  return {stillframe_gpu_image_begin, stillframe_gpu_image_end};
#else
  return {};
#endif
}

}  // namespace stillframe::kernels
