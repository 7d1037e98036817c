// Bags and products: one token after another, its rows fetched ahead.
#pragma once

#include "../panels.h"

using namespace simd;

constexpr int AHEAD = 12;  // rows that are fetched before they are used

struct Bag {
  int64_t threads, tokens, bag, rows, width;
  const int32_t* indices;
  const float* weights;
  const float* values;
  const float* x;     // dot: the tokens; bag: the gate, or null
  float* out;         // dot: [tokens, bag]; bag: [tokens, width]
  float* sums;        // what the gate multiplies, or null

  const float* row(int64_t t, int64_t b) const { return values + indices[t * bag + b] * width; }

  bool inside(int64_t t) const {
    bool good = true;
    for (int64_t b = 0; b < bag; ++b) {
      good &= static_cast<uint32_t>(indices[t * bag + b]) < static_cast<uint64_t>(rows);
    }
    return good;
  }

  // f(t) for every token, as long as its indices are rows.
  template <class F>
  int for_tokens(F f) const {
    constexpr int64_t PART = 16;
    std::atomic<bool> good{true};
    const bool run = parallel((tokens + PART - 1) / PART, threads, [&](int64_t part) {
      for (int64_t t = part * PART; t < std::min(tokens, (part + 1) * PART); ++t) {
        if (inside(t)) {
          f(t);
        } else {
          good = false;
        }
      }
    });
    return !run ? 0 : good ? 1 : -1;
  }
};

template <int N>
inline void add_panel(const Bag& p, int64_t t, int64_t column) {
  const int64_t left = p.width - column;
  Panel<N> sum;
  sum.zero();
  for (int64_t b = 0; b < p.bag; ++b) {
    if (b + AHEAD < p.bag) Panel<N>::fetch(p.row(t, b + AHEAD) + column);
    sum.add(p.row(t, b) + column, p.weights[t * p.bag + b], left);
  }
  const int64_t at = t * p.width + column;
  if (p.sums) sum.write(p.sums + at, left);
  if (p.x) {
    Panel<N> gate;
    gate.read(p.x + at, left);
    UNROLL for (int n = 0; n < Panel<N>::M; ++n) sum.x[n] *= gate.x[n] * sigmoid(gate.x[n]);
  }
  sum.write(p.out + at, left);
}

inline void add_bag(const Bag& p, int64_t t) {
  for_row_panels(p.width, [&](auto n, int64_t column) { add_panel<n.value>(p, t, column); });
}

// Products with a panel of the rows, W rows at a time; added to what other panels gave.
template <int N>
inline void dot_panel(const Bag& p, int64_t t, int64_t column) {
  const int64_t left = p.width - column;
  Panel<N> x, row;
  x.read(p.x + t * p.width + column, left);
  for (int64_t first = 0; first < p.bag; first += W) {
    const int64_t count = std::min<int64_t>(W, p.bag - first);
    vec products[W] = {};
    for (int64_t b = 0; b < count; ++b) {
      if (first + b + AHEAD < p.bag) Panel<N>::fetch(p.row(t, first + b + AHEAD) + column);
      row.read(p.row(t, first + b) + column, left);
      vec even = x.x[0] * row.x[0], odd = {};
      UNROLL for (int n = 1; n < Panel<N>::M; ++n) (n % 2 ? odd : even) += x.x[n] * row.x[n];
      products[b] = even + odd;
    }
    float found[W];
    sums(products, W, found);
    float* out = p.out + t * p.bag + first;
    for (int64_t b = 0; b < count; ++b) out[b] = column ? out[b] + found[b] : found[b];
  }
}

inline void dot_rows(const Bag& p, int64_t t) {
  for_row_panels(p.width, [&](auto n, int64_t column) { dot_panel<n.value>(p, t, column); });
}
