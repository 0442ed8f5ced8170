// The numbers that kernels read and write, and those that they compute in: float for float and half precision, double
// for double. Half precision is 16 bits of storage here; no arithmetic is done in it, and no header of CUDA is needed.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "shared.h"

namespace fastapd::cuda {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
// What sums over a T are kept in.
template <class T>
using Acc = typename Accumulator<T>::type;

FASTAPD_BOTH float widened(float x) {
  return x;
}
FASTAPD_BOTH double widened(double x) {
  return x;
}
FASTAPD_BOTH float widened(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
#endif
}
FASTAPD_BOTH float widened(Half x) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  _Float16 half;
  std::memcpy(&half, &x.bits, sizeof(half));
  return static_cast<float>(half);
#endif
}

FASTAPD_BOTH BFloat16 bfloat16_of(float x) {
  BFloat16 narrow;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x));
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  narrow.bits = static_cast<uint16_t>(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
  return narrow;
}
FASTAPD_BOTH Half half_of(float x) {
  Half narrow;
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x));
#else
  const _Float16 half = static_cast<_Float16>(x);
  std::memcpy(&narrow.bits, &half, sizeof(half));
#endif
  return narrow;
}
// The nearest T; of two as near, the even one.
template <class T>
FASTAPD_BOTH T narrowed(Acc<T> x) {
  if constexpr (std::is_same_v<T, Half>)
    return half_of(x);
  else if constexpr (std::is_same_v<T, BFloat16>)
    return bfloat16_of(x);
  else
    return x;
}

}  // namespace fastapd::cuda
