// Rotation of the last R channels of a row by a token's angles: interleaved pairs, cosines then sines in the table.
#pragma once
#include "dsv4c.h"

namespace {

template <bool INVERSE>
inline void rotate(const float* x, const float* table, float* y, int64_t C, int64_t R) {
  const int64_t plain = C - R, half = R / 2;
  if (x != y) std::memcpy(y, x, plain * sizeof(float));
  for (int64_t i = 0; i < half; ++i) {
    const float even = x[plain + 2 * i], odd = x[plain + 2 * i + 1];
    const float c = table[i], s = INVERSE ? -table[half + i] : table[half + i];
    y[plain + 2 * i] = even * c - odd * s;
    y[plain + 2 * i + 1] = odd * c + even * s;
  }
}

}  // namespace
