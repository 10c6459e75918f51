// take_rows, embed_streams: copies COPIES times row `index[i]` of x to row i of y.
#include "dsv4c.h"

#if BF16
typedef bf16 X;
#else
typedef float X;
#endif

DSV4C_KERNEL {
#if INDEX_FIRST
  Tensor index = a[0], x = a[1];
#else
  Tensor x = a[0], index = a[1];
#endif
  Tensor y = a[2];
  a.expect(3);
  const int64_t n = y.size(0);
  int64_t C = 1;
  for (int d = 1; d < x.t->ndim; ++d) C *= x.size(d);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t r = index.data<int64_t>()[i];
    if (r < 0 || r >= x.size(0)) throw std::runtime_error("a row lies outside its tensor");
    for (int64_t copy = 0; copy < COPIES; ++copy)
      for (int64_t c = 0; c < C; c += VL) store(y.row(i) + copy * C + c, load(x.row<X>(r) + c));
  }
}
DSV4C_END
