// Keys of attention and of the indexer: 16 rows transposed into a panel [C, 16], so that a panel is a GEMM operand
// with one key a lane.
#pragma once
#include "gemm.h"

namespace {

// r[i][j] <-> r[j][i]
inline void transpose(vf (&r)[VL]) {
#pragma GCC unroll 4
  for (int s = VL / 2; s > 0; s /= 2) {
    vi low, high;
    for (int j = 0; j < VL; ++j) {
      low[j] = (j & s) ? VL + j - s : j;
      high[j] = (j & s) ? VL + j : j + s;
    }
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i)
      if (!(i & s)) {
        vf up = r[i], down = r[i + s];
        r[i] = __builtin_shuffle(up, down, low);
        r[i + s] = __builtin_shuffle(up, down, high);
      }
  }
}

// panels[n / 16][C][16] from n (a multiple of 16) row pointers
inline void pack_keys(const float* const* rows, int64_t n, int64_t C, float* panels) {
  for (int64_t i = 0; i < n; i += VL)
    for (int64_t c = 0; c < C; c += VL) {
      vf r[VL];
#pragma GCC unroll 16
      for (int j = 0; j < VL; ++j) r[j] = load(rows[i + j] + c);
      transpose(r);
#pragma GCC unroll 16
      for (int j = 0; j < VL; ++j) store(panels + i * C + (c + j) * VL, r[j]);
    }
}

// out[m][c0 .. c0 + 16 * NV) += sum over keys of p[m][k] * keys[k][c0 ..)
template <int MR, int NV>
inline void add_values(
    const float* const* p, const float* const* keys, int64_t first, int64_t last, int64_t c0, float* const* out) {
  vf acc[MR][NV];
  for (int m = 0; m < MR; ++m)
    for (int v = 0; v < NV; ++v) acc[m][v] = load(out[m] + c0 + v * VL);
  for (int64_t k = first; k < last; ++k) {
    vf b[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) b[v] = load(keys[k] + c0 + v * VL);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      vf weight = splat(p[m][k]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[m][v] = acc[m][v] + weight * b[v];
    }
  }
  for (int m = 0; m < MR; ++m)
    for (int v = 0; v < NV; ++v) store(out[m] + c0 + v * VL, acc[m][v]);
}

template <int NV>
inline void add_values_rows(
    const float* const* p, int64_t M, const float* const* keys, int64_t first, int64_t last, int64_t c0,
    float* const* out) {
  int64_t m = 0;
  for (; m + MR_MAX <= M; m += MR_MAX) add_values<MR_MAX, NV>(p + m, keys, first, last, c0, out + m);
  for (; m + 2 <= M; m += 2) add_values<2, NV>(p + m, keys, first, last, c0, out + m);
  if (m < M) add_values<1, NV>(p + m, keys, first, last, c0, out + m);
}

inline void add_all_values(
    const float* const* p, int64_t M, const float* const* keys, int64_t first, int64_t last, int64_t C,
    float* const* out) {
  constexpr int NV = MR_MAX == 6 ? 4 : 2;
  int64_t c = 0;
  for (; c + NV * VL <= C; c += NV * VL) add_values_rows<NV>(p, M, keys, first, last, c, out);
  for (; c < C; c += VL) add_values_rows<1>(p, M, keys, first, last, c, out);
}

}  // namespace
