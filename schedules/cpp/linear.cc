// linear, grouped_linear: x [T, K] times packed W -> y [T, N]; group g of W reads columns [g * K, (g + 1) * K) of x.
//   DENSE 1: the rows of all leading dims of x follow one another; 0: dimension 0 may be strided
#include "gemm.h"

#if BF16
typedef bf16 W;
#else
typedef float W;
#endif

DSV4C_KERNEL {
  Tensor x = a[0], w = a[1], y = a[2];
  a.expect(3);
  constexpr int PV = PANEL / VL;
  const int64_t K = w.size(1), panels = w.size(0), N = panels * PANEL, per_group = panels / GROUPS;
  const int64_t T = y.numel() / N;
  if (T == 0) return;
  const int64_t step = DENSE ? K : x.step();
  const bool parallel = T * K * N > SERIAL_WORK;
  const int64_t together = T <= 2 ? 8 / PV : (MR_MAX == 6 ? 4 / PV : 1);  // panels that multiply() takes at once
  const int64_t chunk = parallel ? together : per_group, chunks = (per_group + chunk - 1) / chunk;
  const int64_t row_tasks = (T + ROW_BLOCK - 1) / ROW_BLOCK;
#pragma omp parallel for if (parallel) schedule(static)
  for (int64_t task = 0; task < GROUPS * chunks * row_tasks; ++task) {
    const int64_t g = task / (chunks * row_tasks), c = task / row_tasks % chunks, r = task % row_tasks;
    const int64_t t0 = r * ROW_BLOCK, t1 = std::min(T, t0 + ROW_BLOCK);
    const float* rows[ROW_BLOCK];
    for (int64_t t = t0; t < t1; ++t) rows[t - t0] = x.data() + t * step + g * K;
    float* to = y.data() + t0 * N;
    const int64_t p0 = g * per_group + c * chunk, p1 = std::min((g + 1) * per_group, p0 + chunk);
    multiply<W, PV>(rows, t1 - t0, w.data<W>(), K, p0, p1,
                    [&](int64_t m, int64_t n, vf v) { store(to + m * N + n, v); });
  }
}
DSV4C_END
