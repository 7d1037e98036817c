// Reads sorted by row, summed, and what becomes of the sums.
#pragma once

#include "native_bag.h"

// What one call of the bag left: row indices[t, b] gets weights[t, b] grads[t].
struct Reads {
  int64_t tokens, bag;
  const int32_t* indices;
  const float* weights;
  const float* grads;
};

struct Hit {
  const float* grad;
  float weight;
};

struct Segment {
  int64_t row, first;  // of the row's hits
};

struct Rows {
  int64_t threads, lists, num_rows, width, found;
  const Reads* reads;
  int64_t* rows;
  float* gradient;
  float* values;
  float* first;   // exp_avg or square_sum
  float* second;  // exp_avg_sq
  float scale, decay, step_size, beta1, beta2, second_bias, eps;

  template <class F>
  int for_rows(F f);
};

// Numbers of this thread that the next call uses again.
template <class T>
inline std::vector<T>& kept() {
  thread_local std::vector<T> memory;
  return memory;
}

// Keys row << 32 | number of the read, sorted by row; reads of a row stay in their order.
inline bool sorted_keys(const Rows& p, std::vector<uint64_t>& keys) {
  size_t count = 0;
  for (int64_t list = 0; list < p.lists; ++list) count += p.reads[list].tokens * p.reads[list].bag;
  keys.resize(count);
  uint64_t number = 0;
  bool good = true;
  for (int64_t list = 0; list < p.lists; ++list) {
    const Reads& reads = p.reads[list];
    for (int64_t i = 0; i < reads.tokens * reads.bag; ++i, ++number) {
      const uint32_t row = reads.indices[i];
      good &= row < static_cast<uint64_t>(p.num_rows);
      keys[number] = static_cast<uint64_t>(row) << 32 | number;
    }
  }
  if (!good) return false;
  constexpr int BITS = 11;
  static thread_local std::vector<uint64_t> other;
  other.resize(count);
  const uint64_t last = std::max<int64_t>(0, p.num_rows - 1);
  for (int shift = 32; last >> (shift - 32); shift += BITS) {
    uint32_t places[1 << BITS] = {};
    for (const uint64_t key : keys) ++places[key >> shift & ((1 << BITS) - 1)];
    uint32_t before = 0;
    for (uint32_t& place : places) before += std::exchange(place, before);
    for (const uint64_t key : keys) other[places[key >> shift & ((1 << BITS) - 1)]++] = key;
    keys.swap(other);
  }
  return true;
}

// The hits of the sorted reads, and where each row's begin; the last segment ends them all.
inline void lay_out(const Rows& p, const std::vector<uint64_t>& keys, std::vector<Hit>& hits,
                    std::vector<Segment>& segments) {
  std::vector<int64_t> starts(p.lists + 1);
  for (int64_t list = 0; list < p.lists; ++list) {
    starts[list + 1] = starts[list] + p.reads[list].tokens * p.reads[list].bag;
  }
  hits.resize(keys.size());
  segments.clear();
  int64_t list = 0, row = -1;
  for (size_t h = 0; h < keys.size(); ++h) {
    const int64_t number = static_cast<uint32_t>(keys[h]);
    if (number < starts[list] || number >= starts[list + 1]) {
      list = std::upper_bound(starts.begin(), starts.end(), number) - starts.begin() - 1;
    }
    const Reads& reads = p.reads[list];
    const uint32_t i = number - starts[list];
    hits[h] = {reads.grads + i / static_cast<uint32_t>(reads.bag) * p.width, reads.weights[i]};
    if (static_cast<int64_t>(keys[h] >> 32) != row) {
      row = keys[h] >> 32;
      segments.push_back({row, static_cast<int64_t>(h)});
    }
  }
  segments.push_back({p.num_rows, static_cast<int64_t>(keys.size())});
}

inline void sum_hits(const Hit* hits, int64_t count, int64_t width, float* out) {
  for_row_panels(width, [&](auto n, int64_t column) {
    Panel<n.value> sum;
    sum.zero();
    for (int64_t h = 0; h < count; ++h) {
      // Hits lie one after another in memory: those of the next row are fetched too.
      Panel<n.value>::fetch(hits[h + AHEAD].grad + column);
      sum.add(hits[h].grad + column, hits[h].weight, width - column);
    }
    sum.write(out + column, width - column);
  });
}

// f(number, row, gradient) for every row that was read.
template <class F>
int Rows::for_rows(F f) {
  try {
    auto& keys = kept<uint64_t>();
    auto& hits = kept<Hit>();
    auto& segments = kept<Segment>();
    if (!sorted_keys(*this, keys)) return -1;
    lay_out(*this, keys, hits, segments);
    hits.resize(keys.size() + AHEAD, {reads[0].grads, 0});
    found = segments.size() - 1;
    constexpr int64_t PART = 64;
    return parallel((found + PART - 1) / PART, threads, [&](int64_t part) {
      float* sum = workspace(width);
      for (int64_t u = part * PART; u < std::min(found, (part + 1) * PART); ++u) {
        const Segment& one = segments[u];
        sum_hits(&hits[one.first], segments[u + 1].first - one.first, width, sum);
        f(u, one.row, sum);
      }
    });
  } catch (const std::bad_alloc&) {
    return 0;
  }
}

inline vec root(vec x) {
#if defined(__AVX512F__)
  return vec(_mm512_sqrt_ps(__m512(x)));
#elif defined(__AVX__)
  return vec(_mm256_sqrt_ps(__m256(x)));
#else
  for (int i = 0; i < W; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

inline void lazy_adam(const Rows& p, int64_t row, const float* g) {
  const int64_t at = row * p.width;
  const float root_bias = 1 / p.second_bias;
  for (int64_t c = 0; c < p.width; c += W) {
    const int64_t left = p.width - c;
    const vec gradient = load_part(g + c, left) * p.scale;
    vec m = load_part(p.first + at + c, left), v = load_part(p.second + at + c, left);
    m += (gradient - m) * (1 - p.beta1);
    v = v * p.beta2 + gradient * gradient * (1 - p.beta2);
    store_part(p.first + at + c, m, left);
    store_part(p.second + at + c, v, left);
    const vec value = load_part(p.values + at + c, left) * p.decay;
    const vec step = p.step_size * m / (root(v) * root_bias + p.eps);
    store_part(p.values + at + c, value - step, left);
  }
}

inline void rowwise_adagrad(const Rows& p, int64_t row, const float* g) {
  vec squares = {};
  for (int64_t c = 0; c < p.width; c += W) {
    const vec gradient = load_part(g + c, p.width - c) * p.scale;
    squares += gradient * gradient;
  }
  p.first[row] += sum(squares) / p.width;
  const float rate = p.step_size * p.scale / (__builtin_sqrtf(p.first[row]) + p.eps);
  float* values = p.values + row * p.width;
  for (int64_t c = 0; c < p.width; c += W) {
    const int64_t left = p.width - c;
    const vec gradient = load_part(g + c, left);
    store_part(values + c, load_part(values + c, left) * p.decay - rate * gradient, left);
  }
}
