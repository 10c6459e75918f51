// gate_bias, gate_hash: the K experts of a token (highest sqrt(softplus) + bias, the earlier wins a tie; or those its
// id names) and their normalised, scaled scores.
#include "dsv4c.h"

namespace {

inline float score(float x) {
  return std::sqrt(x > 20.0f ? x : std::log1p(std::exp(x)));  // torch's softplus is linear above 20
}

}  // namespace

DSV4C_KERNEL {
#if HASH
  Tensor logits = a[0], ids = a[1], table = a[2], experts = a[3], weights = a[4];
#else
  Tensor logits = a[0], bias = a[1], experts = a[2], weights = a[3];
#endif
  a.expect(HASH ? 5 : 4);
  const int64_t T = logits.size(0), E = logits.size(1), K = experts.size(1);
#if HASH
  for (int64_t t = 0; t < T; ++t)
    if (ids.data<int64_t>()[t] < 0 || ids.data<int64_t>()[t] >= table.size(0))
      throw std::runtime_error("a token id lies outside the table of experts");
#endif
#pragma omp parallel for if (T * E > (1 << 13)) schedule(static)
  for (int64_t t = 0; t < T; ++t) {
    const float* x = logits.row(t);
    int64_t* to = experts.row<int64_t>(t);
    float *w = weights.row(t), total = 0;
#if HASH
    const int64_t* from = table.row<int64_t>(ids.data<int64_t>()[t]);
    for (int64_t k = 0; k < K; ++k) to[k] = std::min(std::max<int64_t>(from[k], 0), E - 1);
#else
    static thread_local std::vector<float> rank;
    rank.resize(E);
    for (int64_t e = 0; e < E; ++e) {
      const float s = score(x[e]) + bias.data()[e];
      rank[e] = s != s ? INFINITY : s;  // chosen, and so seen in the weights
    }
    for (int64_t k = 0; k < K; ++k) {
      int64_t best = -1;
      for (int64_t e = 0; e < E; ++e) {
        bool taken = false;
        for (int64_t j = 0; j < k; ++j) taken |= to[j] == e;
        if (!taken && (best < 0 || rank[e] > rank[best])) best = e;
      }
      to[k] = best;
    }
#endif
    for (int64_t k = 0; k < K; ++k) total += w[k] = score(x[to[k]]);
    for (int64_t k = 0; k < K; ++k) w[k] = w[k] / (total + 1e-20f) * SCALING;
  }
}
DSV4C_END
