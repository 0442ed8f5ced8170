// Vector types of the level being compiled, through the GCC/Clang vector extension: SSE or NEON, AVX2, AVX-512.
//
// Files that include this are compiled several times with different flags. They must not instantiate library
// templates: the linker keeps one copy of an inline function and could hand the AVX-512 one to an old processor.
#pragma once
#include <cstdint>

#ifndef FASTAPD_LEVEL
#define FASTAPD_LEVEL baseline
#endif

#if defined(__AVX512F__)
#define FASTAPD_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTAPD_VECTOR_BYTES 32
#else
#define FASTAPD_VECTOR_BYTES 16
#endif

namespace fastapd {
namespace FASTAPD_LEVEL {
namespace {

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float vec __attribute__((vector_size(FASTAPD_VECTOR_BYTES)));
  typedef float unaligned __attribute__((vector_size(FASTAPD_VECTOR_BYTES), aligned(4), may_alias));
};
template <>
struct Simd<double> {
  typedef double vec __attribute__((vector_size(FASTAPD_VECTOR_BYTES)));
  typedef double unaligned __attribute__((vector_size(FASTAPD_VECTOR_BYTES), aligned(8), may_alias));
};

template <class T>
using vec = typename Simd<T>::vec;

template <class T>
constexpr int64_t kLanes = FASTAPD_VECTOR_BYTES / sizeof(T);

template <class T>
inline vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::unaligned*>(p);
}
template <class T>
inline void store(T* p, vec<T> v) {
  *reinterpret_cast<typename Simd<T>::unaligned*>(p) = v;
}
template <class T>
inline T sum_lanes(vec<T> v) {
  T total = 0;
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) total += v[lane];
  return total;
}

}  // namespace
}  // namespace FASTAPD_LEVEL
}  // namespace fastapd
