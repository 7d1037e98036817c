// The k largest of a row of scores in one pass over few candidates, equal ones by lowest position.
#pragma once

#include "../simd.h"

using namespace simd;

constexpr int64_t SLACK = 16;  // candidates above k that are not worth another look at the row

// Whole numbers in the order of the floats; zeros are equal, NaN is above all.
inline ivec ordered(vec x) {
  const vec y = x + 0.0f;  // -0 becomes 0
  ivec bits;
  std::memcpy(&bits, &y, sizeof bits);
  const ivec flipped = bits ^ ((bits >> 31) & 0x7fffffff);
  return y == y ? flipped : ivec{} + INT32_MAX;
}

inline ivec load(const int32_t* p) {
  ivec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline void store(int32_t* p, ivec x) { std::memcpy(p, &x, sizeof x); }

inline int64_t sum(ivec x) {
  int64_t total = 0;
  for (int i = 0; i < W; ++i) total += x[i];
  return total;
}

// Up to `length` keys, filled up to a multiple of W with INT32_MIN, which no score has.
struct TopK {
  explicit TopK(int64_t length)
      : keys(round_up(length, W)), candidates(keys.size() + W), positions(keys.size() + W) {}

  std::vector<int32_t> keys, candidates, positions;
  int32_t guess = 0;  // a threshold that left few candidates before

  int64_t count_from(int32_t threshold) const {
    ivec found = {};
    for (size_t i = 0; i < keys.size(); i += W) found += load(&keys[i]) >= threshold;
    return -sum(found);
  }

  // A threshold that at least k keys reach, and few more unless many are equal.
  int32_t threshold(int64_t k) {
    int64_t low = INT32_MIN + int64_t{1}, high = INT64_C(1) + INT32_MAX;  // low: k; high: fewer
    int64_t at = guess, step = 1 << 21;
    while (true) {
      const int64_t count = count_from(at);
      if (count >= k) {
        low = at;
        if (count <= k + SLACK) break;
      } else {
        high = at;
      }
      if (high - low <= 1) break;
      at = count >= k ? at + step : at - step;
      step *= 2;
      // Once both ends are known, or the steps leave them, halve what lies between.
      if (at <= low || at >= high) at = low + (high - low) / 2;
    }
    guess = low;
    return low;
  }

  // Positions of the k largest, best first.
  void find(int64_t k, int32_t* best) {
    const int64_t count = gather(threshold(k));
    for (int64_t i = count; i < round_up(count, W); ++i) candidates[i] = INT32_MIN;
    // The rank of a candidate is how many are larger, or equal and earlier.
    for (int64_t first = 0; first < count; first += W) {
      const ivec mine = load(&candidates[first]);
      ivec rank = {};
      for (int64_t j = 0; j < first; ++j) rank -= candidates[j] >= mine;
      for (int64_t j = first; j < std::min(count, first + W); ++j) {
        rank -= (candidates[j] > mine) | ((candidates[j] == mine) & (index() > int32_t(j - first)));
      }
      for (int64_t j = first + W; j < count; ++j) rank -= candidates[j] > mine;
      for (int64_t i = first; i < std::min(count, first + W); ++i) {
        if (rank[i - first] < k) best[rank[i - first]] = positions[i];
      }
    }
  }

 private:
  static ivec index() {
    ivec x = {};
    for (int i = 0; i < W; ++i) x[i] = i;
    return x;
  }

  // Candidates are the keys from the threshold on, in the order of their positions.
  int64_t gather(int32_t threshold) {
    int64_t count = 0;
    for (size_t i = 0; i < keys.size(); i += W) {
      const ivec x = load(&keys[i]);
#if defined(__AVX512F__)
      const __mmask16 mask = _mm512_cmpge_epi32_mask(__m512i(x), _mm512_set1_epi32(threshold));
      store(&candidates[count], ivec(_mm512_maskz_compress_epi32(mask, __m512i(x))));
      store(&positions[count], ivec(_mm512_maskz_compress_epi32(mask, __m512i(index() + int32_t(i)))));
      count += __builtin_popcount(mask);
#else
      for (int j = 0; j < W; ++j) {
        candidates[count] = x[j];
        positions[count] = i + j;
        count += x[j] >= threshold;
      }
#endif
    }
    return count;
  }
};
