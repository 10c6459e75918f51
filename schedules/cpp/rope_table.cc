// rope_table, entry_rope_table: cosines, then sines, of position * frequency, a float32 product.
//   ENDS 1: of the first of the RATIO tokens that each of the rows `ends` completes
#include "dsv4c.h"

DSV4C_KERNEL {
  int i = 0;
  Tensor positions = a[i++];
#if ENDS
  Tensor ends = a[i++];
#endif
  Tensor frequency = a[i++], y = a[i++];
  a.expect(i);
  const int64_t n = y.size(0), half = frequency.size(0);
  const int64_t* position = positions.data<int64_t>();
#if ENDS
  for (int64_t e = 0; e < n; ++e)
    if (ends.data<int64_t>()[e] < 0 || ends.data<int64_t>()[e] >= positions.size(0))
      throw std::runtime_error("an end lies outside the batch");
#endif
#pragma omp parallel for if (n * half > (1 << 11)) schedule(static)
  for (int64_t t = 0; t < n; ++t) {
#if ENDS
    const float at = float(position[ends.data<int64_t>()[t]] - (RATIO - 1));
#else
    const float at = float(position[t]);
#endif
    for (int64_t c = 0; c < half; ++c) {
      const float angle = at * frequency.data()[c];
      y.row(t)[c] = std::cos(angle);
      y.row(t)[half + c] = std::sin(angle);
    }
  }
}
DSV4C_END
