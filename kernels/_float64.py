"""Powers and their slopes in float64, with IEEE 754's answers at zero, at negative numbers and at NaN.

Each function is of the numbers that its caller has in registers. Float64 has a fraction of the throughput of float32
on every card, 1/64 of it on some: this is for a few numbers a component, not for products of matrices.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _float64(x):
    """Of numbers in any float: bfloat16 has arithmetic through float32 alone."""
    return x.to(tl.float32).to(tl.float64)


@triton.jit
def _power_of_two(x):
    """The largest one up to x >= 0; 0 of zero and of denormals, infinity of what is not finite."""
    return (x.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)


@triton.jit
def _power(base, exponent):
    """base^exponent in float64, as IEEE 754 has it: also of zero, and of negative numbers to whole exponents."""
    size = tl.exp(exponent * tl.log(tl.where(base == 0, 1.0, tl.abs(base))))
    at_zero = tl.where(exponent > 0, 0.0, tl.where(exponent == 0, 1.0, float("inf")))
    half = exponent * 0.5
    sign = tl.where(tl.floor(half) == half, 1.0, tl.where(tl.floor(exponent) == exponent, -1.0, float("nan")))
    return tl.where(base == 0, at_zero, tl.where(base < 0, sign * size, size))


@triton.jit
def _slope(base, value, p):
    """d/ds of s^{p/2} where that is `value`; zero at zero, where the slope of a root is infinite."""
    at_zero = tl.where(p == 2, 1.0, 0.0)
    return tl.where(base == 0, at_zero, (p * 0.5) * value / tl.where(base == 0, 1.0, base))


@triton.jit
def _unused_term(count, batch, p, eps):
    """What the eps of the samples that do not use a component contributes, for each rank: nothing if batch < 0."""
    unused = (batch - count).to(tl.float64)
    return tl.where((unused == 0) | (batch < 0), 0.0, unused * _power(eps, p * 0.5))
