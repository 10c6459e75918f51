// markov_draft: BLOCK times, the likeliest token by a row's logits and w2 (packed in panels) times the w1 row of the
// token before; and how confident the row is, a dot product with its x and that w1 row.
// w2 is read once a draft for all requests. A task is a run of panels; ties go to the lower token, whatever the tasks.
#include "gemm.h"

#if BF16
typedef bf16 W;
#else
typedef float W;
#endif
#if BF16_W1
typedef bf16 W1;
#else
typedef float W1;
#endif

namespace {

struct Best {
  float value;
  int64_t token;
};

inline void take(Best& best, float value, int64_t token) {
  if (value > best.value || best.token < 0 || (value == best.value && token < best.token)) best = {value, token};
}

}  // namespace

DSV4C_KERNEL {
  Tensor logits = a[0], x = a[1], ids = a[2], block_rows = a[3], w1 = a[4], w2 = a[5], proj = a[6];
  Tensor drafts = a[7], confidences = a[8];
  a.expect(9);
  constexpr int PV = PANEL / VL;
  constexpr int64_t CHUNK = 32;  // panels of a task: 1,024 tokens' w2 rows, 512 KB in bfloat16 at rank 256
  const int64_t R = block_rows.size(0), T = logits.size(0), D = x.size(1), M = w1.size(1), V = w1.size(0);
  const int64_t panels = w2.size(0), tasks = (panels + CHUNK - 1) / CHUNK;
  static thread_local std::vector<float> before;
  static thread_local std::vector<const float*> rows;
  static thread_local std::vector<Best> found;
  before.resize(R * M);
  rows.resize(R);
  found.resize(tasks * R);
  const int64_t* first = block_rows.data<int64_t>();
  for (int64_t r = 0; r < R; ++r)
    if (first[r] < 0 || first[r] + BLOCK > T) throw std::runtime_error("a block lies outside the batch");
  const float** known = rows.data();
  Best* best = found.data();
  for (int64_t i = 0; i < BLOCK; ++i) {
    for (int64_t r = 0; r < R; ++r) {
      const int64_t token = i ? drafts.row<int64_t>(r)[i - 1] : ids.data<int64_t>()[first[r]];
      if (token < 0 || token >= V) throw std::runtime_error("a token id lies outside the vocabulary");
      float* to = before.data() + r * M;
      vf sure{};
      for (int64_t m = 0; m < M; m += VL) {
        const vf v = load(w1.row<W1>(token) + m);
        store(to + m, v);
        sure += v * load(proj.data() + D + m);
      }
      for (int64_t d = 0; d < D; d += VL) sure += load(x.row(first[r] + i) + d) * load(proj.data() + d);
      confidences.row(r)[i] = sum(sure);
      known[r] = to;
    }
#pragma omp parallel for if (R * V * M > SERIAL_WORK) schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      Best* mine = best + task * R;
      for (int64_t r = 0; r < R; ++r) mine[r] = {-INFINITY, -1};
      multiply<W, PV>(known, R, w2.data<W>(), M, task * CHUNK, std::min(panels, (task + 1) * CHUNK),
                      [&](int64_t r, int64_t n, vf v) {
                        float scores[VL];
                        store(scores, v + load(logits.row(first[r] + i) + n));
                        for (int64_t k = 0; k < VL; ++k) take(mine[r], scores[k], n + k);
                      });
    }
    for (int64_t r = 0; r < R; ++r) {
      Best top = {-INFINITY, -1};
      for (int64_t task = 0; task < tasks; ++task)
        if (best[task * R + r].token >= 0) take(top, best[task * R + r].value, best[task * R + r].token);
      drafts.row<int64_t>(r)[i] = top.token;
    }
  }
}
DSV4C_END
