// token_slots, entry_slots: the pool row of an entry, page * ENTRIES + entry % ENTRIES.
//   ENDS 0: every token's own entry; 1: the entries of RATIO tokens that the rows `ends` complete
#include "dsv4c.h"

DSV4C_KERNEL {
  Tensor pages = a[0], requests = a[1], positions = a[2];
#if ENDS
  Tensor ends = a[3];
  Tensor y = a[4];
  a.expect(5);
#else
  Tensor y = a[3];
  a.expect(4);
#endif
  const int64_t n = y.size(0);
  for (int64_t i = 0; i < n; ++i) {
#if ENDS
    const int64_t t = ends.data<int64_t>()[i], entry = positions.data<int64_t>()[t] / RATIO;
#else
    const int64_t t = i, entry = positions.data<int64_t>()[t];
#endif
    const int64_t r = requests.data<int64_t>()[t], page = entry / ENTRIES;
    if (r < 0 || r >= pages.size(0) || page < 0 || page >= pages.size(1))
      throw std::runtime_error("a position lies outside its page table");
    y.data<int64_t>()[i] = pages.row<int64_t>(r)[page] * ENTRIES + entry % ENTRIES;
  }
}
DSV4C_END
