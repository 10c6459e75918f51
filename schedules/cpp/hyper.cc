// Hyper-connections: POST mixes the sublayer's result into the N streams; PRE computes the coefficients of the next
// sublayer from all streams and its input; HEAD collapses the streams at the end; NORM divides the result by its root
// mean square. Blocks of 16 tokens: the projection fn (24 dot products over N * D) streams through the cache once a
// block; Sinkhorn runs with one token in each lane, since a single 4 x 4 matrix would wait for every division.
#include "dsv4c.h"

namespace {

constexpr int MIX = HEAD ? N : N * (2 + N);
constexpr int64_t CHUNK = 512;  // columns of fn at a time: 24 x 512 floats stay in L1 and L2
constexpr int RT = 4, RR = MIX % 6 == 0 ? 6 : N;  // 4 tokens x 6 rows of fn in registers

template <int TT>
inline void dots(const float* const* x, const float* fn, int64_t L, int64_t from, int64_t to, vf (*acc)[MIX + 1]) {
  for (int r0 = 0; r0 < MIX; r0 += RR) {
    vf s[TT][RR];
    for (int t = 0; t < TT; ++t)
      for (int r = 0; r < RR; ++r) s[t][r] = acc[t][r0 + r];
    for (int64_t c = from; c < to; c += VL) {
      vf v[TT];
      for (int t = 0; t < TT; ++t) v[t] = load(x[t] + c);
      for (int r = 0; r < RR; ++r) {
        vf f = load(fn + (r0 + r) * L + c);
        for (int t = 0; t < TT; ++t) s[t][r] += v[t] * f;
      }
    }
    for (int t = 0; t < TT; ++t)
      for (int r = 0; r < RR; ++r) acc[t][r0 + r] = s[t][r];
  }
  for (int t = 0; t < TT; ++t)
    for (int64_t c = from; c < to; c += VL) acc[t][MIX] += load(x[t] + c) * load(x[t] + c);
}

inline void sinkhorn(vf (&m)[N][N]) {
  for (int j = 0; j < N; ++j) {
    vf top = m[j][0], total{};
    for (int k = 1; k < N; ++k) top = max(top, m[j][k]);
    for (int k = 0; k < N; ++k) total += m[j][k] = exp(m[j][k] - top);
    vf inverse = 1.0f / total;
    for (int k = 0; k < N; ++k) m[j][k] = m[j][k] * inverse + HC_EPS;
  }
  for (int step = 0;; ++step) {
    for (int k = 0; k < N; ++k) {
      vf total = splat(HC_EPS);
      for (int j = 0; j < N; ++j) total += m[j][k];
      vf inverse = 1.0f / total;
      for (int j = 0; j < N; ++j) m[j][k] *= inverse;
    }
    if (step == ITERS - 1) return;
    for (int j = 0; j < N; ++j) {
      vf total = splat(HC_EPS);
      for (int k = 0; k < N; ++k) total += m[j][k];
      vf inverse = 1.0f / total;
      for (int k = 0; k < N; ++k) m[j][k] *= inverse;
    }
  }
}

}  // namespace

DSV4C_KERNEL {
  int i = 0;
#if POST
  Tensor y = a[i++], before = a[i++], post_in = a[i++], comb_in = a[i++];
#else
  Tensor streams = a[i++];
#endif
#if PRE || HEAD
  Tensor fn = a[i++], base = a[i++], scale = a[i++];
#if NORM
  Tensor weight = a[i++];
#endif
#endif
#if POST
  Tensor streams = a[i++];
#endif
#if PRE || HEAD
  Tensor x = a[i++];
#endif
#if PRE
  Tensor post = a[i++], comb = a[i++];
#endif
  a.expect(i);
  const int64_t T = streams.size(0), D = streams.size(2), L = N * D;
  const int64_t blocks = (T + VL - 1) / VL;
#pragma omp parallel for if (blocks > 1) schedule(static)
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t t0 = b * VL, n = std::min(VL, T - t0);
#if POST
    for (int64_t t = t0; t < t0 + n; ++t) {
      const float *p = post_in.row(t), *c = comb_in.row(t), *from = before.row(t), *add = y.row(t);
      float* to = streams.row(t);
      for (int64_t d = 0; d < D; d += VL) {
        vf old[N], fresh = load(add + d);
        for (int j = 0; j < N; ++j) old[j] = load(from + j * D + d);
        for (int k = 0; k < N; ++k) {
          vf mixed = old[0] * c[k];
          for (int j = 1; j < N; ++j) mixed += old[j] * c[j * N + k];
          store(to + k * D + d, mixed + fresh * p[k]);
        }
      }
    }
#endif
#if PRE || HEAD
    const float* row[VL];
    vf acc[VL][MIX + 1] = {};
    for (int64_t t = 0; t < n; ++t) row[t] = streams.row(t0 + t);
    for (int64_t from = 0; from < L; from += CHUNK) {
      const int64_t to = std::min(L, from + CHUNK);
      int64_t t = 0;
      for (; t + RT <= n; t += RT) dots<RT>(row + t, fn.data(), L, from, to, acc + t);
      for (; t < n; ++t) dots<1>(row + t, fn.data(), L, from, to, acc + t);
    }
    float lane[MIX + 1][VL] = {};  // one token a lane
    for (int64_t t = 0; t < n; ++t)
      for (int r = 0; r <= MIX; ++r) lane[r][t] = sum(acc[t][r]);
    float rho_lane[VL];
    for (int64_t t = 0; t < VL; ++t) rho_lane[t] = 1.0f / std::sqrt(lane[MIX][t] / L + NORM_EPS);
    const vf rho = load(rho_lane);
    const float *bias = base.data(), *gain = scale.data();
    float pre[N][VL];
    for (int k = 0; k < N; ++k) store(pre[k], sigmoid(load(lane[k]) * rho * gain[0] + bias[k]) + HC_EPS);
#if PRE
    float post_lane[N][VL], comb_lane[N * N][VL];
    for (int k = 0; k < N; ++k)
      store(post_lane[k], 2.0f * sigmoid(load(lane[N + k]) * rho * gain[1] + bias[N + k]));
    vf m[N][N];
    for (int j = 0; j < N; ++j)
      for (int k = 0; k < N; ++k) {
        const int r = 2 * N + j * N + k;
        m[j][k] = load(lane[r]) * rho * gain[2] + bias[r];
      }
    sinkhorn(m);
    for (int j = 0; j < N; ++j)
      for (int k = 0; k < N; ++k) store(comb_lane[j * N + k], m[j][k]);
#endif
    for (int64_t t = 0; t < n; ++t) {
#if PRE
      for (int k = 0; k < N; ++k) post.row(t0 + t)[k] = post_lane[k][t];
      for (int k = 0; k < N * N; ++k) comb.row(t0 + t)[k] = comb_lane[k][t];
#endif
      float* to = x.row(t0 + t);
      vf squares{};
      for (int64_t d = 0; d < D; d += VL) {
        vf v = load(row[t] + d) * pre[0][t];
        for (int j = 1; j < N; ++j) v += load(row[t] + j * D + d) * pre[j][t];
        squares += v * v;
        store(to + d, v);
      }
#if NORM
      const float inverse = 1.0f / std::sqrt(sum(squares) / D + OUT_EPS);
      for (int64_t d = 0; d < D; d += VL) store(to + d, load(to + d) * inverse * load(weight.data() + d));
#endif
    }
#endif
  }
}
DSV4C_END
