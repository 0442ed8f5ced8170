// What CPU and GPU have in common of singular values and Schatten sums: sizes, and the scale that factors are brought
// to before their entries are squared.
#pragma once
#include <math.h>
#include <stdint.h>

#include "shared.h"

namespace fastapd {

struct SchattenSizes {
  int64_t n_instances, n_components, rank, d_in, d_out;
};

// A power of two near 1 / most, so that squares neither overflow nor vanish; 1 for zero, infinite or NaN factors.
FASTAPD_BOTH double balance(double most) {
  if (!(most > 0) || !(most <= 1.7976931348623157e308)) return 1;
  const int exponent = ilogb(most) + 1;  // of a denormal it is below -1023: its reciprocal would be infinite
  return ldexp(1.0, exponent > 1000 ? -1000 : exponent < -1000 ? 1000 : -exponent);
}

}  // namespace fastapd
