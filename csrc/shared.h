// Marks inline functions that CPU and CUDA kernels share. They have internal linkage: each instruction-set level of the
// CPU compiles its own copy, and the linker must not take one for another.
#pragma once

#ifdef __CUDACC__
#define FASTAPD_BOTH __host__ __device__ static inline
#else
#define FASTAPD_BOTH static inline
#endif
