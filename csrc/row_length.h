// When the squared length of a row says what it is, and what is done where it does not; for unit_norm on CPU and GPU.
#pragma once
#include "shared.h"

namespace fastapd {

// Whether a sum of squares in T lost nothing to overflow or underflow. No for 0, NaN and infinity.
FASTAPD_BOTH bool in_range(float square) {
  return square > 1e-30f && square < 1e30f;
}
FASTAPD_BOTH bool in_range(double square) {
  return square > 1e-200 && square < 1e200;
}

// The other rows are done again in double: divided by their largest magnitude first, as the length itself may be beyond
// T and is never formed, then by what is left of the length. A row of zeros or with a NaN stays. Beside an infinity all
// else is nothing, and it is itself undefined.
FASTAPD_BOTH bool stays(double largest, bool any_nan) {
  return any_nan || largest == 0;
}
FASTAPD_BOTH bool is_finite(double largest) {
  return largest <= 1.7976931348623157e308;
}
FASTAPD_BOTH double divided(double x, double largest, double rest_of_length) {
  return x / largest / rest_of_length;
}

}  // namespace fastapd
