// The k best scores of each query so far, and a few more that may belong to them.
#pragma once

#include <cmath>
#include <functional>

#include "../simd.h"

using namespace simd;

// A score and the index of its key as one number: of two the greater is the better one, and of
// equal scores that with the lower index. Zero is none.
inline uint64_t pack(float score, uint32_t index) {
  const float x = score + 0.0f;  // -0 becomes 0
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t{bits} << 32 | (UINT32_MAX - index);
}

inline float score_of(uint64_t packed) {
  uint32_t bits = packed >> 32;
  bits = bits >> 31 ? bits & 0x7fffffffu : ~bits;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline int64_t index_of(uint64_t packed) { return UINT32_MAX - uint32_t(packed); }

// The best k of a list to its front, in no order. k < count.
inline void keep_best(uint64_t* list, int64_t count, int64_t k) {
  std::nth_element(list, list + k - 1, list + count, std::greater<uint64_t>());
}

// Lists of candidates, cut back to the k best whenever they are full.
class Candidates {
 public:
  static int64_t capacity(int64_t k) { return k + k / 2 + 16; }
  // Floats of memory that the lists of some queries take.
  static int64_t floats(int64_t queries, int64_t k) { return queries * (2 * capacity(k) + 2); }

  // `memory` is aligned to 8 bytes; there are `places` >= `queries` thresholds.
  Candidates(int64_t queries, int64_t places, int64_t k, float* memory)
      : k_(k),
        capacity_(capacity(k)),
        lists_(reinterpret_cast<uint64_t*>(memory)),
        thresholds_(memory + places * 2 * capacity_),
        counts_(reinterpret_cast<int32_t*>(thresholds_ + places)) {
    for (int64_t q = 0; q < places; ++q) {
      thresholds_[q] = q < queries ? -INFINITY : INFINITY;
      counts_[q] = 0;
    }
  }

  // Scores that do not exceed it cannot be among the k best of a query, as long as keys come in
  // the order of their indices.
  const float* thresholds() const { return thresholds_; }

  void add(int64_t query, float score, uint32_t index) {
    uint64_t* list = lists_ + query * capacity_;
    list[counts_[query]++] = pack(score, index);
    if (counts_[query] == capacity_) {
      keep_best(list, capacity_, k_);
      counts_[query] = k_;
      thresholds_[query] = score_of(list[k_ - 1]);
    }
  }

  // The k best of a query, best first, then zeros.
  const uint64_t* finish(int64_t query) {
    uint64_t* list = lists_ + query * capacity_;
    int64_t count = counts_[query];
    if (count > k_) {
      keep_best(list, count, k_);
      count = k_;
    }
    std::sort(list, list + count, std::greater<uint64_t>());
    std::fill(list + count, list + k_, 0);
    return list;
  }

 private:
  int64_t k_, capacity_;
  uint64_t* lists_;
  float* thresholds_;
  int32_t* counts_;
};
