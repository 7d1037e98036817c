// Scores of a block of tokens against the half keys, and the best pairs of half keys.
#pragma once

#include "native_topk.h"

struct Select {
  int64_t threads, tokens, heads, n, half, k;
  const float* query;     // [tokens, heads, 2, half]
  const float* sub_keys;  // [heads, 2, n, half]
  int32_t* indices;       // [tokens, heads, k]
  float* weights;         // [tokens, heads, k]
};

constexpr int64_t BLOCK = 32;  // tokens whose scores are there at a time
constexpr int64_t PANEL_WIDTH = NV * W;

// Half keys as columns, PANEL_WIDTH of them side by side: [2, panels, half, PANEL_WIDTH].
class Columns {
 public:
  Columns(const Select& p, int64_t head)
      : half_(p.half), panels_((p.n + PANEL_WIDTH - 1) / PANEL_WIDTH) {
    columns_.resize(2 * panels_ * p.half * PANEL_WIDTH);
    for (int64_t side = 0; side < 2; ++side) {
      for (int64_t i = 0; i < p.n; ++i) {
        const float* key = p.sub_keys + ((head * 2 + side) * p.n + i) * p.half;
        float* column = of(side, i / PANEL_WIDTH) + i % PANEL_WIDTH;
        for (int64_t d = 0; d < p.half; ++d) column[d * PANEL_WIDTH] = key[d];
      }
    }
  }

  int64_t panels() const { return panels_; }
  int64_t width() const { return panels_ * PANEL_WIDTH; }
  float* of(int64_t side, int64_t panel) {
    return columns_.data() + (side * panels_ + panel) * half_ * PANEL_WIDTH;
  }

 private:
  int64_t half_, panels_;
  std::vector<float> columns_;
};

// scores[i, :] of the tokens first + i of a head against the half keys of one side.
inline void score(const Select& p, Columns& keys, int64_t head, int64_t side, int64_t first,
                  int64_t count, float* scores) {
  const int64_t stride = p.heads * 2 * p.half;
  for (int64_t panel = 0; panel < keys.panels(); ++panel) {
    for (int64_t i = 0; i < count; i += MR) {
      // The last rows of a block are done again rather than rows that are not there.
      const int64_t at = std::max<int64_t>(0, std::min(i, count - MR));
      const float* query = p.query + ((first + at) * p.heads + head) * 2 * p.half + side * p.half;
      float* out = scores + at * keys.width() + panel * PANEL_WIDTH;
      if (count >= MR) {
        Tile<NV> tile;
        tile.add<false>(query, stride, keys.of(side, panel), PANEL_WIDTH, p.half);
        tile.put(out, keys.width());
      } else {
        for (int64_t r = 0; r < count; ++r) {
          vec sum[NV] = {};
          for (int64_t d = 0; d < p.half; ++d) {
            UNROLL for (int v = 0; v < NV; ++v) {
              sum[v] += query[r * stride + d] * load(keys.of(side, panel) + d * PANEL_WIDTH + v * W);
            }
          }
          UNROLL for (int v = 0; v < NV; ++v) store(out + r * keys.width() + v * W, sum[v]);
        }
      }
    }
  }
}

// Chooses for one token of a head after another.
class Chooser {
 public:
  explicit Chooser(const Select& p)
      : p_(p), halves_{TopK(p.n), TopK(p.n)}, pairs_(pair_count(p.k)), best_(p.k) {
    for (int side = 0; side < 2; ++side) {
      order_[side].resize(p.k);
      values_[side].resize(p.k + W);
    }
    for (int32_t i = 0; i < p.k; ++i) {
      for (int32_t j = 0; j < p.k / (i + 1); ++j) {
        first_.push_back(i);
        second_.push_back(j);
      }
    }
    sums_.resize(first_.size() + W);
  }

  void choose(const float* first_scores, const float* second_scores, int32_t* indices,
              float* weights) {
    choose_half(0, first_scores);
    choose_half(1, second_scores);
    // Only pairs of ranks with (i + 1) (j + 1) <= k can be among the k best. Sums may be written
    // past the end of a row: the next row comes there.
    float* sums = sums_.data();
    for (int64_t i = 0; i < p_.k; ++i) {
      const int64_t row = p_.k / (i + 1);
      const vec value = all(values_[0][i]);
      for (int64_t j = 0; j < row; j += W) store(sums + j, value + load(&values_[1][j]));
      sums += row;
    }
    fill(pairs_, sums_.data(), first_.size());
    pairs_.find(p_.k, best_.data());
    const float top = sums_[best_[0]];
    for (int64_t r = 0; r < p_.k; ++r) {
      const int32_t pair = best_[r];
      indices[r] = order_[0][first_[pair]] * p_.n + order_[1][second_[pair]];
      weights[r] = sums_[pair] - top;
    }
    vec totals = {};
    for (int64_t r = 0; r < p_.k; r += W) {
      const int64_t left = p_.k - r;
      const vec e = exp(load_part(weights + r, left));
      store_part(weights + r, e, left);
      totals += load_part(weights + r, left);
    }
    const float part = 1 / sum(totals);
    for (int64_t r = 0; r < p_.k; ++r) weights[r] *= part;
  }

 private:
  const Select& p_;
  TopK halves_[2], pairs_;
  std::vector<int32_t> best_, order_[2], first_, second_;
  std::vector<float> sums_, values_[2];

  static int64_t pair_count(int64_t k) {
    int64_t count = 0;
    for (int64_t i = 1; i <= k; ++i) count += k / i;
    return count;
  }

  void choose_half(int side, const float* scores) {
    fill(halves_[side], scores, p_.n);
    halves_[side].find(p_.k, order_[side].data());
    for (int64_t i = 0; i < p_.k; ++i) values_[side][i] = scores[order_[side][i]];
  }

  static void fill(TopK& into, const float* scores, int64_t count) {
    for (int64_t i = 0; i < count; i += W) store(&into.keys[i], ordered(load(scores + i)));
    std::fill(into.keys.begin() + count, into.keys.end(), INT32_MIN);
  }
};

// Some tokens of a head.
inline void choose_block(const Select& p, Columns& keys, Chooser& chooser, int64_t head,
                         int64_t first) {
  const int64_t count = std::min(BLOCK, p.tokens - first), width = keys.width();
  float* scores = workspace(2 * BLOCK * width);
  for (int64_t side = 0; side < 2; ++side) {
    score(p, keys, head, side, first, count, scores + side * BLOCK * width);
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = ((first + i) * p.heads + head) * p.k;
    chooser.choose(scores + i * width, scores + (BLOCK + i) * width, p.indices + at,
                   p.weights + at);
  }
}

inline bool forward(const Select& p) {
  const int64_t blocks = (p.tokens + BLOCK - 1) / BLOCK;
  // Threads share a head's keys where there are more threads than heads.
  const int64_t parts = std::max<int64_t>(1, std::min(blocks, p.threads / p.heads + 1));
  return parallel(p.heads * parts, p.threads, [&](int64_t task) {
    const int64_t head = task / parts, part = task % parts;
    Columns keys(p, head);
    Chooser chooser(p);
    for (int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block) {
      choose_block(p, keys, chooser, head, block * BLOCK);
    }
  });
}
