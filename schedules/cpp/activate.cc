// swiglu, swiglu_pair: silu(min(gate, LIMIT)) * clamp(up, -LIMIT, LIMIT); PAIR: both are halves of one row.
#include "dsv4c.h"

DSV4C_KERNEL {
  Tensor gate = a[0];
#if PAIR
  Tensor y = a[1];
  a.expect(2);
#else
  Tensor up = a[1], y = a[2];
  a.expect(3);
#endif
  const int64_t T = y.size(0), C = y.size(1);
#pragma omp parallel for if (T * C > (1 << 15)) schedule(static)
  for (int64_t t = 0; t < T; ++t) {
    const float* g = gate.row(t);
#if PAIR
    const float* u = g + C;
#else
    const float* u = up.row(t);
#endif
    for (int64_t c = 0; c < C; c += VL) store(y.row(t) + c, swiglu(load(g + c), load(u + c), LIMIT));
  }
}
DSV4C_END
