// index_topk: the TOPK entries with the highest lightning-indexer scores of those a token sees, in ascending order,
// then -1. Nothing is scored where all fit. Up to TB tokens of one request share packed keys; 16 entries a vector.
#include "keys.h"

namespace {

constexpr int64_t TB = 8;

// Orders by score, then by the earlier entry; NaN below everything.
inline uint64_t rank(float score, uint32_t entry) {
  if (score != score) score = -INFINITY;
  uint32_t bits;
  std::memcpy(&bits, &score, 4);
  bits = (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
  return uint64_t(bits) << 32 | (0xFFFFFFFFu - entry);
}

}  // namespace

DSV4C_KERNEL {
  Tensor q = a[0], weight = a[1], pool = a[2], pages = a[3], requests = a[4], positions = a[5], y = a[6];
  a.expect(7);
  const int64_t T = q.size(0), I = q.size(1), C = q.size(2);
  const float scale = 1.0f / std::sqrt(float(I * C));
  const int64_t *request = requests.data<int64_t>(), *position = positions.data<int64_t>();
  struct Block {
    int64_t t, n;
  };
  static thread_local std::vector<Block> blocks;
  blocks.clear();
  int64_t work = 0;
  for (int64_t t = 0; t < T; ++t) {
    const int64_t r = request[t], p = position[t], seen = (p + 1) / RATIO;
    if (r < 0 || r >= pages.size(0) || p < 0 || seen > pages.size(1) * ENTRIES)
      throw std::runtime_error("a position lies outside its page table");
    int64_t* to = y.row<int64_t>(t);
    if (seen <= TOPK) {
      for (int64_t k = 0; k < TOPK; ++k) to[k] = k < seen ? k : -1;
      continue;
    }
    work += seen * I * C;
    if (!blocks.empty()) {
      Block& b = blocks.back();
      if (b.n < TB && b.t + b.n == t && request[b.t] == r && position[b.t] + b.n == p) {
        ++b.n;
        continue;
      }
    }
    blocks.push_back({t, 1});
  }
  const Block* block = blocks.data();
  const int64_t count = int64_t(blocks.size());
#pragma omp parallel for if (work > (1 << 19) && count > 1) schedule(dynamic)
  for (int64_t i = 0; i < count; ++i) {
    static thread_local std::vector<float> panels, scores, dots;
    static thread_local std::vector<const float*> rows;
    static thread_local std::vector<uint64_t> order;
    const Block b = block[i];
    const int64_t r = request[b.t], most = (position[b.t + b.n - 1] + 1) / RATIO, tiles = (most + VL - 1) / VL;
    constexpr int64_t GROUP = 4;  // tiles scored together
    panels.resize(GROUP * VL * C);
    scores.resize(b.n * tiles * VL);
    dots.resize(I * GROUP * VL);
    const float* keys[GROUP * VL];
    rows.resize(I);
    for (int64_t tile0 = 0; tile0 < tiles; tile0 += GROUP) {
      const int64_t group = std::min(GROUP, tiles - tile0);
      for (int64_t k = 0; k < group * VL; ++k) {
        const int64_t entry = std::min(tile0 * VL + k, most - 1);
        const int64_t row = pages.row<int64_t>(r)[entry / ENTRIES] * ENTRIES + entry % ENTRIES;
        keys[k] = pool.row(row < 0 || row >= pool.size(0) ? 0 : row);
      }
      pack_keys(keys, group * VL, C, panels.data());
      for (int64_t t = 0; t < b.n; ++t) {
        for (int64_t h = 0; h < I; ++h) rows[h] = q.row(b.t + t) + h * C;
        multiply<float, 1>(rows.data(), I, panels.data(), C, 0, group,
                           [&](int64_t m, int64_t n, vf v) { store(dots.data() + m * GROUP * VL + n, v); });
        const float* w = weight.row(b.t + t);
        for (int64_t n = 0; n < group * VL; n += VL) {
          vf total{};
          for (int64_t h = 0; h < I; ++h) {
            vf d = load(dots.data() + h * GROUP * VL + n);
            total += (d < 0.0f ? vf{} : d) * (w[h] * scale);
          }
          store(scores.data() + (t * tiles + tile0) * VL + n, total);
        }
      }
    }
    for (int64_t t = 0; t < b.n; ++t) {
      const int64_t seen = (position[b.t + t] + 1) / RATIO;
      const float* score = scores.data() + t * tiles * VL;
      order.resize(seen);
      for (int64_t e = 0; e < seen; ++e) order[e] = rank(score[e], uint32_t(e));
      std::nth_element(order.begin(), order.begin() + (TOPK - 1), order.end(), std::greater<uint64_t>());
      const uint64_t least = order[TOPK - 1], hidden = rank(-INFINITY, 0);
      int64_t* to = y.row<int64_t>(b.t + t);
      int64_t k = 0;
      for (int64_t e = 0; e < seen; ++e) {
        const uint64_t own = rank(score[e], uint32_t(e));
        if (own >= least && own > hidden) to[k++] = e;
      }
      for (; k < TOPK; ++k) to[k] = -1;
    }
  }
}
DSV4C_END
