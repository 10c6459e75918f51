// linear, grouped_linear, unrope_grouped_linear: x [T, K] times packed W -> y [T, N]; group g of W reads columns
// [g * K, (g + 1) * K) of x. With UNROPE, x is first rotated back by the table into the workspace.
#include "gemm.h"
#include "rope.h"

#if BF16
typedef bf16 W;
#else
typedef float W;
#endif

DSV4C_KERNEL {
  int i = 0;
  Tensor x = a[i++];
#if UNROPE
  Tensor table = a[i++];
#endif
  Tensor w = a[i++];
#if UNROPE
  Tensor turned = a[i++];
#endif
  Tensor y = a[i++];
  a.expect(i);
  constexpr int PV = PANEL / VL;
  const int64_t K = w.size(1), panels = w.size(0), N = panels * PANEL, per_group = panels / GROUPS;
  const int64_t T = y.numel() / N;
  if (T == 0) return;
  const float* base = x.data();
#if DENSE
  int64_t step = K;  // rows of all leading dims
#else
  int64_t step = x.step();
#endif
#if UNROPE
  const int64_t H = x.size(1), C = x.size(2);
#pragma omp parallel for if (T * H * C > SERIAL_WORK) schedule(static)
  for (int64_t t = 0; t < T; ++t)
    for (int64_t h = 0; h < H; ++h)
      rotate<true>(x.row(t) + h * C, table.row(t), turned.data() + (t * H + h) * C, C, table.size(1));
  base = turned.data();
  step = H * C;
#endif
  const int64_t group_size = T <= 2 ? 8 / PV : (MR_MAX == 6 ? 4 / PV : 1);  // panels of a task, as in multiply()
  const int64_t row_tasks = (T + ROW_BLOCK - 1) / ROW_BLOCK;
  int64_t chunk = group_size;
  const bool parallel = T * K * N > SERIAL_WORK;
  if (!parallel) chunk = per_group;
  const int64_t chunks = (per_group + chunk - 1) / chunk;
#pragma omp parallel for if (parallel) schedule(static)
  for (int64_t task = 0; task < GROUPS * chunks * row_tasks; ++task) {
    const int64_t g = task / (chunks * row_tasks), c = task / row_tasks % chunks, r = task % row_tasks;
    const int64_t t0 = r * ROW_BLOCK, t1 = std::min(T, t0 + ROW_BLOCK);
    const float* rows[ROW_BLOCK];
    for (int64_t t = t0; t < t1; ++t) rows[t - t0] = base + t * step + g * K;
    float* to = y.data() + t0 * N;
    const int64_t p0 = g * per_group + c * chunk, p1 = std::min((g + 1) * per_group, p0 + chunk);
    multiply<W, PV>(rows, t1 - t0, w.data<W>(), K, p0, p1,
                    [&](int64_t m, int64_t n, vf v) { store(to + m * N + n, v); });
  }
}
DSV4C_END
