// experts: a sorted grouped GEMM. Pairs (token, expert) are grouped by expert; phase 1 multiplies a group's tokens by
// w1 and w3 side by side and stores weight * swiglu; phase 2 multiplies by w2 into one row a pair; phase 3 adds a
// token's rows to the shared expert's in the order the gate gave. Weights [E, out / P, in, P]; an idle expert is free.
#include "gemm.h"

#if BF16
typedef bf16 W;
#else
typedef float W;
#endif

namespace {

constexpr int PV = PANEL / VL;
constexpr int64_t ROWS = 96;  // pairs of one task

// weight * swiglu of MR rows and one panel of each of w1 and w3
template <int MR>
inline void gate_up(const float* const* x, const W* w1, const W* w3, int64_t D, const float* weight, float* const* to) {
  vf gate[MR][PV], up[MR][PV];
  tile<W, MR, 1, PV>(x, w1, D, gate);
  tile<W, MR, 1, PV>(x, w3, D, up);
  for (int m = 0; m < MR; ++m)
    for (int v = 0; v < PV; ++v) store(to[m] + v * VL, swiglu(gate[m][v], up[m][v], LIMIT) * weight[m]);
}

struct Group {
  int64_t expert, first, count;
};

}  // namespace

DSV4C_KERNEL {
  Tensor x = a[0], chosen = a[1], weights = a[2], w1 = a[3], w3 = a[4], w2 = a[5], shared = a[6];
  Tensor hidden = a[7], partial = a[8], y = a[9];
  a.expect(10);
  const int64_t T = x.size(0), D = w1.size(2), I = w2.size(2), K = chosen.size(1), E = w1.size(0), pairs = T * K;
  if (T == 0) return;
  const int64_t up_panels = I / PANEL, down_panels = D / PANEL;
  static thread_local std::vector<int64_t> offset, sorted;
  static thread_local std::vector<Group> groups;
  offset.assign(E + 1, 0);
  sorted.resize(pairs);
  groups.clear();
  for (int64_t t = 0; t < T; ++t)
    for (int64_t k = 0; k < K; ++k) {
      const int64_t e = chosen.row<int64_t>(t)[k];
      if (e < 0 || e >= E) throw std::runtime_error("a chosen expert does not exist");
      ++offset[e + 1];
    }
  for (int64_t e = 0; e < E; ++e) {
    for (int64_t first = 0; first < offset[e + 1]; first += ROWS)
      groups.push_back({e, offset[e] + first, std::min(ROWS, offset[e + 1] - first)});
    offset[e + 1] += offset[e];
  }
  for (int64_t t = 0; t < T; ++t)
    for (int64_t k = 0; k < K; ++k) sorted[offset[chosen.row<int64_t>(t)[k]]++] = t * K + k;
  const int64_t *order = sorted.data(), num_groups = int64_t(groups.size());
  const Group* group = groups.data();
  const bool parallel = pairs * D * I * 3 > SERIAL_WORK;
  float *inner = hidden.data(), *rows_out = partial.data();
#pragma omp parallel if (parallel)
  {
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < num_groups * up_panels; ++task) {
      const Group g = group[task / up_panels];
      const int64_t p = task % up_panels;
      const W *a1 = w1.data<W>() + (g.expert * up_panels + p) * D * PANEL;
      const W *a3 = w3.data<W>() + (g.expert * up_panels + p) * D * PANEL;
      const float *rows[ROWS];
      float weight[ROWS], *to[ROWS];
      for (int64_t m = 0; m < g.count; ++m) {
        const int64_t pair = order[g.first + m];
        rows[m] = x.row(pair / K);
        weight[m] = weights.row(pair / K)[pair % K];
        to[m] = inner + pair * I + p * PANEL;
      }
      int64_t m = 0;
      constexpr int MR = MR_MAX == 6 ? 8 : 3;
      for (; m + MR <= g.count; m += MR) gate_up<MR>(rows + m, a1, a3, D, weight + m, to + m);
      for (; m + 2 <= g.count; m += 2) gate_up<2>(rows + m, a1, a3, D, weight + m, to + m);
      for (; m < g.count; ++m) gate_up<1>(rows + m, a1, a3, D, weight + m, to + m);
    }
    constexpr int64_t CHUNK = 8 / PV;
    const int64_t chunks = (down_panels + CHUNK - 1) / CHUNK;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < num_groups * chunks; ++task) {
      const Group g = group[task / chunks];
      const int64_t p0 = task % chunks * CHUNK, p1 = std::min(down_panels, p0 + CHUNK);
      const float* rows[ROWS];
      float* to[ROWS];
      for (int64_t m = 0; m < g.count; ++m) {
        rows[m] = inner + order[g.first + m] * I;
        to[m] = rows_out + order[g.first + m] * D;
      }
      multiply<W, PV>(rows, g.count, w2.data<W>() + g.expert * down_panels * I * PANEL, I, p0, p1,
                      [&](int64_t m, int64_t n, vf v) { store(to[m] + n, v); });
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < T; ++t)
      for (int64_t d = 0; d < D; d += VL) {
        vf routed = load(rows_out + t * K * D + d);
        for (int64_t k = 1; k < K; ++k) routed += load(rows_out + (t * K + k) * D + d);
        store(y.row(t) + d, load(shared.row(t) + d) + routed);
      }
  }
}
DSV4C_END
