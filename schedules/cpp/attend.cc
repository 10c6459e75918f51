// attend_window, attend_csa, attend_hca, attend_block: softmax over the window, the picked (KIND 1) or all completed
// (KIND 2) compressed entries or the rows of a token's own block (KIND 3), and the sink, times the keys. A task is up to
// TB neighbouring tokens of one request and HB heads: their window keys (and hca entries, and block) are packed once;
// logits of one task only are kept. Tiles of 16 keys are aligned to positions and entry numbers, so that sums do not
// depend on the task's other tokens. The window of a block is that of its first row, which it does not hold.
#include "keys.h"

namespace {

constexpr int64_t TB = 8, HB = HEADS < 16 ? HEADS : 16;
constexpr float SCALE = ATTEND_SCALE;

struct Scratch {
  std::vector<float> panels, logits;
  std::vector<const float*> keys;
};

// -inf for all keys but [from, to) of these tiles; keeps the largest logit of every lane
inline void mask(float* logits, int64_t tiles, int64_t from, int64_t to, vf& top) {
  const vf hidden = splat(-INFINITY);
  for (int64_t k = 0; k < tiles * VL; k += VL) {
    vf l = load(logits + k);
    l = lanes() < float(from - k) ? hidden : l;
    l = lanes() >= float(to - k) ? hidden : l;
    top = max(top, l);
    store(logits + k, l);
  }
}

}  // namespace

DSV4C_KERNEL {
  int i = 0;
  Tensor q = a[i++], pool = a[i++], pages = a[i++];
#if KIND == 1 || KIND == 2
  Tensor entry_pool = a[i++], entry_pages = a[i++];
#endif
#if KIND == 1
  Tensor picks = a[i++];
#elif KIND == 3
  Tensor own = a[i++];
#endif
  Tensor requests = a[i++], positions = a[i++];
#if KIND == 3
  Tensor block_rows = a[i++];
#endif
  Tensor sink = a[i++], y = a[i++];
  a.expect(i);
  const int64_t T = q.size(0), C = DIM;
  const int64_t *request = requests.data<int64_t>(), *position = positions.data<int64_t>();
  struct Block {
    int64_t t, n;
  };
  static thread_local std::vector<Block> blocks;
  blocks.clear();
  for (int64_t t = 0; t < T; ++t) {
    const int64_t r = request[t], p = position[t];
    if (r < 0 || r >= pages.size(0)) throw std::runtime_error("a token's request has no page table");
#if KIND == 3
    const int64_t row = block_rows.data<int64_t>()[r];
    if (row < 0 || row + BLOCK > T) throw std::runtime_error("a block lies outside the batch");
    const int64_t newest = position[row] - 1;
#else
    const int64_t newest = p;
#endif
    if (newest < (KIND == 3 ? -1 : 0) || newest / PAGE >= pages.size(1))
      throw std::runtime_error("a position lies outside its page table");
    if (!blocks.empty()) {
      Block& b = blocks.back();
      if (b.n < TB && request[b.t] == r && position[b.t] + b.n == p) {
        ++b.n;
        continue;
      }
    }
    blocks.push_back({t, 1});
  }
  const auto row_of = [](const Tensor& from, const Tensor& table, int64_t r, int64_t entry, int64_t per_page) {
    const int64_t row = table.row<int64_t>(r)[entry / per_page] * per_page + entry % per_page;
    return from.row(row < 0 || row >= from.size(0) ? 0 : row);
  };
  const Block* block = blocks.data();
  const int64_t head_blocks = (HEADS + HB - 1) / HB, tasks = int64_t(blocks.size()) * head_blocks;
#pragma omp parallel for if (T * HEADS * C * WINDOW > (1 << 21)) schedule(dynamic)
  for (int64_t task = 0; task < tasks; ++task) {
    static thread_local Scratch s;
    const Block b = block[task / head_blocks];
    const int64_t h0 = task % head_blocks * HB, heads = std::min<int64_t>(HB, HEADS - h0), M = b.n * heads;
    const int64_t r = request[b.t], p0 = position[b.t];
#if KIND == 3
    const int64_t row0 = block_rows.data<int64_t>()[r], p1 = position[row0] - 1;
#else
    const int64_t p1 = p0 + b.n - 1;
#endif
    const int64_t first = std::max<int64_t>(0, (KIND == 3 ? p1 : p0) - WINDOW + 1), base = first / VL * VL;
    const int64_t window_tiles = (p1 + 1 - base + VL - 1) / VL, window_keys = window_tiles * VL;
    int64_t entry_tiles = 0;
#if KIND == 2
    const int64_t most = std::min((p1 + 1) / RATIO, entry_pages.size(1) * ENTRIES);
    entry_tiles = (most + VL - 1) / VL;
#elif KIND == 3
    const int64_t most = BLOCK;
    entry_tiles = (most + VL - 1) / VL;
#elif KIND == 1
    int64_t most = 0;  // the most picks of a token in the block; -1 can only follow the last pick
    for (int64_t t = b.t; t < b.t + b.n; ++t) {
      int64_t n = 0;
      while (n < picks.size(1) && picks.row<int64_t>(t)[n] >= 0) ++n;
      most = std::max(most, n);
    }
    entry_tiles = (most + VL - 1) / VL;
#endif
    const int64_t stride = (window_tiles + entry_tiles) * VL, entries = entry_tiles * VL;
    s.logits.resize(M * stride);
    s.keys.resize(window_keys + (KIND == 1 ? b.n : 1) * entries);
    s.panels.resize(std::max(window_keys, entries) * C);
    const float** entry_keys = s.keys.data() + window_keys;
    const float *rows[TB * HB], *weights[TB * HB], *entry_weights[TB * HB];
    float *outs[TB * HB], inverse[TB * HB];
    for (int64_t m = 0; m < M; ++m) {
      const int64_t t = b.t + m / heads, h = h0 + m % heads;
      rows[m] = q.row(t) + h * C;
      weights[m] = s.logits.data() + m * stride;
      entry_weights[m] = weights[m] + window_keys;
      outs[m] = y.row(t) + h * C;
    }
    const auto score = [&](const float* const* keys, int64_t m0, int64_t count, int64_t column, int64_t tiles) {
      pack_keys(keys, tiles * VL, C, s.panels.data());
      multiply<float, 1>(rows + m0, count, s.panels.data(), C, 0, tiles, [&](int64_t m, int64_t n, vf v) {
        store(s.logits.data() + (m0 + m) * stride + column + n, v * SCALE);
      });
    };
    // window keys outside [first, p1] belong to nobody: they repeat a live one and are masked
    for (int64_t k = 0; k < window_keys; ++k)
      s.keys[k] = row_of(pool, pages, r, std::min(std::max(base + k, first), p1), PAGE);
    score(s.keys.data(), 0, M, 0, window_tiles);
#if KIND == 2
    for (int64_t k = 0; k < entries; ++k)
      entry_keys[k] = row_of(entry_pool, entry_pages, r, std::min(k, most - 1), ENTRIES);
#elif KIND == 3
    for (int64_t k = 0; k < entries; ++k) entry_keys[k] = own.row(row0 + std::min(k, most - 1));
#endif
#if KIND >= 2
    if (entries) score(entry_keys, 0, M, window_keys, entry_tiles);
#endif
    int64_t seen[TB] = {};
    for (int64_t t = 0; t < b.n; ++t) {
#if KIND >= 2
      seen[t] = KIND == 3 ? most : std::min((p0 + t + 1) / RATIO, most);
      const int64_t tiles = entry_tiles;
#elif KIND == 1
      const int64_t* pick = picks.row<int64_t>(b.t + t);
      while (seen[t] < picks.size(1) && pick[seen[t]] >= 0) ++seen[t];
      const int64_t tiles = (seen[t] + VL - 1) / VL;
      for (int64_t k = 0; k < tiles * VL; ++k) {
        const int64_t entry = pick[std::min(k, seen[t] - 1)];
        const bool known = entry / ENTRIES < entry_pages.size(1);
        entry_keys[t * entries + k] = row_of(entry_pool, entry_pages, r, known ? entry : 0, ENTRIES);
      }
      if (tiles) score(entry_keys + t * entries, t * heads, heads, window_keys, tiles);
#else
      const int64_t tiles = 0;
#endif
      const int64_t from = KIND == 3 ? first : std::max<int64_t>(0, p0 + t - WINDOW + 1);
      const int64_t to = KIND == 3 ? p1 + 1 : p0 + t + 1;
      for (int64_t m = t * heads; m < (t + 1) * heads; ++m) {
        float* l = s.logits.data() + m * stride;
        vf top = splat(-INFINITY);
        mask(l, window_tiles, from - base, to - base, top);
        mask(l + window_keys, tiles, 0, seen[t], top);
        const float sunk = sink.data()[h0 + m % heads], peak = std::max(maximum(top), sunk);
        vf total{};
        for (int64_t k = 0; k < window_keys + tiles * VL; k += VL) {
          vf e = exp(load(l + k) - peak);
          total += e;
          store(l + k, e);
        }
        inverse[m] = 1.0f / (sum(total) + std::exp(sunk - peak));
        std::memset(outs[m], 0, C * sizeof(float));
      }
    }
    add_all_values(weights, M, s.keys.data(), first - base, p1 + 1 - base, C, outs);
#if KIND >= 2
    add_all_values(entry_weights, M, entry_keys, 0, most, C, outs);
#elif KIND == 1
    for (int64_t t = 0; t < b.n; ++t)
      add_all_values(entry_weights + t * heads, heads, entry_keys + t * entries, 0, seen[t], C, outs + t * heads);
#endif
    for (int64_t m = 0; m < M; ++m)
      for (int64_t c = 0; c < C; c += VL) store(outs[m] + c, load(outs[m] + c) * inverse[m]);
  }
}
DSV4C_END
