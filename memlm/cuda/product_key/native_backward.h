// Gradients of the chosen scores: to the queries, and to the half keys in the order of the tokens.
#pragma once

#include "../panels.h"

using namespace simd;

struct Gradient {
  int64_t threads, tokens, heads, n, half, k;
  const float* query;      // [tokens, heads, 2, half]
  const float* sub_keys;   // [heads, 2, n, half]
  const int32_t* indices;  // [tokens, heads, k]
  const float* dscores;    // [tokens, heads, k]
  float* dquery;           // as query
  float* dkeys;            // as sub_keys
};

struct Use {
  int32_t token, key;
  float gradient;
};

inline void add_rows(const std::vector<const float*>& rows, const std::vector<float>& weights,
                     int64_t width, float* out) {
  for_row_panels(width, [&](auto n, int64_t column) {
    Panel<n.value> sum;
    sum.zero();
    for (size_t i = 0; i < rows.size(); ++i) sum.add(rows[i] + column, weights[i], width - column);
    sum.write(out + column, width - column);
  });
}

// One side of a head: k pairs hold few half keys, whose gradients are added up first.
inline void backward_side(const Gradient& p, int64_t head, int64_t side) {
  const float* keys = p.sub_keys + (head * 2 + side) * p.n * p.half;
  const auto query = [&](int64_t t) { return ((t * p.heads + head) * 2 + side) * p.half; };
  std::vector<Use> uses;
  std::vector<int64_t> starts(p.n + 1);
  std::vector<float> sums(p.n), weights;
  std::vector<int32_t> token(p.n, -1), chosen;
  std::vector<const float*> rows;
  for (int64_t t = 0; t < p.tokens; ++t) {
    const int64_t at = (t * p.heads + head) * p.k;
    chosen.clear();
    for (int64_t r = 0; r < p.k; ++r) {
      const uint32_t slot = p.indices[at + r], n = p.n;
      const int32_t key = side ? slot % n : slot / n;
      if (token[key] != t) {
        token[key] = t;
        sums[key] = 0;
        chosen.push_back(key);
      }
      sums[key] += p.dscores[at + r];
    }
    rows.clear();
    weights.clear();
    for (const int32_t key : chosen) {
      uses.push_back({static_cast<int32_t>(t), key, sums[key]});
      ++starts[key + 1];
      rows.push_back(keys + key * p.half);
      weights.push_back(sums[key]);
    }
    add_rows(rows, weights, p.half, p.dquery + query(t));
  }
  for (int64_t i = 0; i < p.n; ++i) starts[i + 1] += starts[i];
  std::vector<Use> sorted(uses.size());
  std::vector<int64_t> places(starts.begin(), starts.end() - 1);
  for (const Use& use : uses) sorted[places[use.key]++] = use;
  for (int64_t i = 0; i < p.n; ++i) {
    rows.clear();
    weights.clear();
    for (int64_t u = starts[i]; u < starts[i + 1]; ++u) {
      rows.push_back(p.query + query(sorted[u].token));
      weights.push_back(sorted[u].gradient);
    }
    add_rows(rows, weights, p.half, p.dkeys + ((head * 2 + side) * p.n + i) * p.half);
  }
}

inline bool backward(const Gradient& p) {
  return parallel(2 * p.heads, p.threads,
                  [&](int64_t task) { backward_side(p, task / 2, task % 2); });
}
