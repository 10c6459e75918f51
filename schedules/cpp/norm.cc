// rms_norm, head_norm, rope and their fusions: row by row, NORM, then ROPE, then WRITE into the row's page.
//   NORM 0 none, 1 with a weight, 2 without; ROPE 0 none, 1 forwards, 2 backwards; HEADS of one row share its angles
#include "rope.h"

namespace {

// x * rsqrt(mean(x^2) + EPS) [* weight]
inline void normalise(const float* x, const float* weight, float* y, int64_t C) {
  vf squares{};
  for (int64_t c = 0; c < C; c += VL) squares += load(x + c) * load(x + c);
  const float rho = 1.0f / std::sqrt(sum(squares) / C + EPS);
  for (int64_t c = 0; c < C; c += VL)
    store(y + c, weight ? load(x + c) * rho * load(weight + c) : load(x + c) * rho);
}

}  // namespace

DSV4C_KERNEL {
  int i = 0;
#if WRITE
  Tensor pool = a[i++], slots = a[i++];
#endif
  Tensor x = a[i++];
#if NORM == 1
  Tensor weight = a[i++];
  const float* w = weight.data();
#else
  const float* w = nullptr;
#endif
#if ROPE
  Tensor table = a[i++];
#endif
#if !WRITE
  Tensor y = a[i++];
#endif
  a.expect(i);
  const int64_t T = x.size(0);
  if (T == 0) return;
  int64_t C = 1;
  for (int d = 1; d < x.t->ndim; ++d) C *= x.size(d);
  C /= HEADS;
#if WRITE
  for (int64_t t = 0; t < T; ++t)
    if (slots.data<int64_t>()[t] < 0 || slots.data<int64_t>()[t] >= pool.size(0))
      throw std::runtime_error("a slot lies outside its pool");
#endif
#pragma omp parallel for if (T * HEADS * C > (1 << 16)) schedule(static)
  for (int64_t t = 0; t < T; ++t) {
#if WRITE
    float* to = pool.row(slots.data<int64_t>()[t]);
#else
    float* to = y.row(t);
#endif
    for (int64_t h = 0; h < HEADS; ++h) {
      const float* from = x.row(t) + h * C;
#if NORM
      normalise(from, w, to + h * C, C);
      from = to + h * C;
#endif
#if ROPE
      rotate<ROPE == 2>(from, table.row(t), to + h * C, C, table.size(1));
#elif !NORM
      std::memcpy(to + h * C, from, C * sizeof(float));
#endif
    }
  }
}
DSV4C_END
