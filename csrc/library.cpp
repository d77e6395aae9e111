// What the library says about itself.
#include <cuda_runtime_api.h>

#define HART_EXPORT extern "C" __attribute__((visibility("default")))

// Raised with every change of a launcher's arguments; hart_infer/extension/library.py expects one value.
HART_EXPORT int hart_infer_interface() { return 2; }

// "80 86 90+PTX", the GPUs that it was built for, or "host" for the tests' build.
HART_EXPORT const char* hart_infer_targets() { return HART_TARGETS; }

// What a launcher's return value means.
HART_EXPORT const char* hart_infer_error(int code) {
    if (code == -1) return "a dtype that the launcher doesn't know";
    if (code == -2) return "a shape that the launcher can't take";
    return cudaGetErrorString(static_cast<cudaError_t>(code));
}
