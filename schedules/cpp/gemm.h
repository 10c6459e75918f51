// y = x W^T with W packed in panels of P output channels: [N / P, K, P], float or bf16, so that one copy serves a
// matrix-vector product (the panel is streamed once) and a blocked GEMM (MR rows times NP panels in registers).
// Every result is one sum over k in ascending order, whatever the number of rows.
#pragma once
#include "dsv4c.h"

namespace {

#if defined(__AVX512F__)
constexpr int MR_MAX = 6;  // 6 rows x 4 vectors = 24 accumulators of 32 registers
#else
constexpr int MR_MAX = 3;  // 3 rows x 2 vectors of two registers = 12 of 16
#endif

// acc[m][NP * PV] += rows x[m] times panels w, w + K * P, ...
template <class W, int MR, int NP, int PV>
inline __attribute__((always_inline)) void tile(const float* const* x, const W* w, int64_t K, vf (&acc)[MR][NP * PV]) {
  constexpr int P = PV * VL;
  const float* rows[MR];
  for (int m = 0; m < MR; ++m) rows[m] = x[m];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < NP * PV; ++v) acc[m][v] = vf{};
  for (int64_t k = 0; k < K; ++k) {
    vf b[NP * PV];
#pragma GCC unroll 8
    for (int p = 0; p < NP; ++p)
#pragma GCC unroll 8
      for (int v = 0; v < PV; ++v) b[p * PV + v] = load(w + p * K * P + k * P + v * VL);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      vf a = splat(rows[m][k]);
#pragma GCC unroll 8
      for (int v = 0; v < NP * PV; ++v) acc[m][v] = acc[m][v] + a * b[v];
    }
  }
}

template <class W, int MR, int NP, int PV, class Out>
inline void block(const float* const* x, const W* w, int64_t K, int64_t m0, int64_t n0, const Out& out) {
  vf acc[MR][NP * PV];
  tile<W, MR, NP, PV>(x, w, K, acc);
  for (int m = 0; m < MR; ++m)
    for (int v = 0; v < NP * PV; ++v) out(m0 + m, n0 + v * VL, acc[m][v]);
}

template <class W, int NP, int PV, class Out>
inline void rows(const float* const* x, int64_t M, const W* w, int64_t K, int64_t n0, const Out& out) {
  int64_t m = 0;
  for (; m + MR_MAX <= M; m += MR_MAX) block<W, MR_MAX, NP, PV>(x + m, w, K, m, n0, out);
  switch (M - m) {
#if defined(__AVX512F__)
    case 5: block<W, 5, NP, PV>(x + m, w, K, m, n0, out); break;
    case 4: block<W, 4, NP, PV>(x + m, w, K, m, n0, out); break;
    case 3: block<W, 3, NP, PV>(x + m, w, K, m, n0, out); break;
#endif
    case 2: block<W, 2, NP, PV>(x + m, w, K, m, n0, out); break;
    case 1: block<W, 1, NP, PV>(x + m, w, K, m, n0, out); break;
    default: break;
  }
}

// out(row, column, vector) for M rows x[0..M) and panels [p0, p1) of w.
template <class W, int PV, class Out>
inline void multiply(const float* const* x, int64_t M, const W* w, int64_t K, int64_t p0, int64_t p1, const Out& out) {
  constexpr int64_t P = PV * VL;
  constexpr int WIDE = 8 / PV, NARROW = MR_MAX == 6 ? 4 / PV : 1;  // vectors in flight for one or two rows; for more
  int64_t p = p0;
  if (M <= (MR_MAX == 6 ? 2 : 1))
    for (; p + WIDE <= p1; p += WIDE) rows<W, WIDE, PV>(x, M, w + p * K * P, K, p * P, out);
  for (; p + NARROW <= p1; p += NARROW) rows<W, NARROW, PV>(x, M, w + p * K * P, K, p * P, out);
  for (; p < p1; ++p) rows<W, 1, PV>(x, M, w + p * K * P, K, p * P, out);
}

constexpr int64_t ROW_BLOCK = 96;  // rows that one task multiplies by a group of panels: 96 x 256 floats fit L2
constexpr int64_t SERIAL_WORK = 1 << 18;  // multiply-adds below which a second thread costs more than it brings

}  // namespace
