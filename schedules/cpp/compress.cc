// compress: softmax-pools the rows of completed entries, for each channel, and updates the rings in place. A row comes
// from this step's tokens, or from its request's ring; entries are pooled before any ring changes.
#include "dsv4c.h"

namespace {
constexpr int64_t WIDTH = OVERLAP ? 2 * RATIO : RATIO;
}

DSV4C_KERNEL {
  Tensor k = a[0], gate = a[1], ape = a[2], ring_k = a[3], ring_z = a[4], positions = a[5], requests = a[6];
  Tensor starts = a[7], seq_ends = a[8], slots = a[9], ends = a[10], y = a[11];
  a.expect(12);
  const int64_t T = k.size(0), C = k.size(1), E = ends.size(0), ring = ring_k.size(1), half = OVERLAP ? C / 2 : C;
  const int64_t *position = positions.data<int64_t>(), *request = requests.data<int64_t>();
  for (int64_t t = 0; t < T; ++t) {
    if (request[t] < 0 || request[t] >= slots.size(0)) throw std::runtime_error("a request row lies outside the batch");
    const int64_t slot = slots.data<int64_t>()[request[t]];
    if (slot < 0 || slot >= ring_k.size(0)) throw std::runtime_error("a state slot lies outside its pool");
  }
#pragma omp parallel for if (E * WIDTH * half > (1 << 15)) schedule(static)
  for (int64_t e = 0; e < E; ++e) {
    const int64_t t = ends.data<int64_t>()[e], r = request[t], start = starts.data<int64_t>()[r];
    const int64_t slot = slots.data<int64_t>()[r];
    const float *ks[WIDTH], *zs[WIDTH], *apes[WIDTH];
    int64_t rows = 0;
    for (int64_t w = 0; w < WIDTH; ++w) {
      const int64_t p = position[t] - (WIDTH - 1 - w), back = WIDTH - 1 - w;
      if (p < 0) continue;
      const int64_t shift = OVERLAP && w >= RATIO ? half : 0;
      if (p >= start) {
        ks[rows] = k.row(t - back) + shift;
        zs[rows] = gate.row(t - back) + shift;
        apes[rows] = ape.row(p % RATIO) + shift;
      } else {
        ks[rows] = ring_k.row(slot) + (p % ring) * C + shift;
        zs[rows] = ring_z.row(slot) + (p % ring) * C + shift;
        apes[rows] = nullptr;  // the ring's scores hold it already
      }
      ++rows;
    }
    for (int64_t c = 0; c < half; c += VL) {
      vf top = splat(-INFINITY);
      for (int64_t w = 0; w < rows; ++w) top = max(top, apes[w] ? load(zs[w] + c) + load(apes[w] + c) : load(zs[w] + c));
      vf total{}, mixed{};
      for (int64_t w = 0; w < rows; ++w) {
        vf z = apes[w] ? load(zs[w] + c) + load(apes[w] + c) : load(zs[w] + c);
        vf p = exp(z - top);
        total += p;
        mixed += p * load(ks[w] + c);
      }
      store(y.row(e) + c, mixed / total);
    }
  }
  for (int64_t t = 0; t < T; ++t) {
    const int64_t r = request[t], p = position[t], slot = slots.data<int64_t>()[r];
    if (p < seq_ends.data<int64_t>()[r] - ring) continue;
    float *to_k = ring_k.row(slot) + (p % ring) * C, *to_z = ring_z.row(slot) + (p % ring) * C;
    for (int64_t c = 0; c < C; c += VL) {
      store(to_k + c, load(k.row(t) + c));
      store(to_z + c, load(gate.row(t) + c) + load(ape.row(p % RATIO) + c));
    }
  }
}
DSV4C_END
