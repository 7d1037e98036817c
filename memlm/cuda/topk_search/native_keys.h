// A few keys as rows of float32 with what turns a product into a score, and which of them count.
#pragma once

#include <cmath>

#include "../simd.h"

using namespace simd;

enum Metric : int64_t { DOT, COSINE, L2 };
enum KeyType : int64_t { FLOAT32, FLOAT16, BFLOAT16, INT8 };

// Queries are made ready by the caller: normalised for COSINE, doubled for L2.
struct Search {
  int64_t threads, batch, tokens, stored, width, k, metric, key_type;
  int64_t key_batch, key_row;  // elements from one store, from one key to the next
  int64_t scale_batch, valid_batch, position_batch;  // likewise from one store to the next
  const float* queries;      // [batch, tokens, width]
  const void* keys;          // [batch, stored, width]
  const float* scales;       // [batch, stored], with INT8
  const uint8_t* valid;      // [batch, stored] or null
  const int64_t* positions;  // [batch, stored] or null, then first and last too
  const int64_t* first;      // [batch, tokens]
  const int64_t* last;       // [batch, tokens]
  float* scores;             // [batch, tokens, k]
  int64_t* indices;          // [batch, tokens, k]
};

// The numbers [low, high].
struct Range {
  int64_t low = INT64_MAX, high = INT64_MIN;
  void add(int64_t x) {
    low = std::min(low, x);
    high = std::max(high, x);
  }
};

// What queries see together: each sees the positions p with first <= p < last.
struct Window {
  Range first, last;
  void add(int64_t from, int64_t to) {
    first.add(from);
    last.add(to);
  }
  void add(const Window& other) {
    add(other.first.low, other.last.low);
    add(other.first.high, other.last.high);
  }
  bool sees(int64_t at) const { return at >= first.low && at < last.high; }
  bool sees_none_of(const Range& keys) const {
    return keys.high < first.low || keys.low >= last.high;
  }
};

constexpr int64_t BLOCK = 64;  // keys; a multiple of R
constexpr float TINY = 1e-12f;  // the least norm that cosine divides by

typedef uint32_t uvec __attribute__((vector_size(4 * W)));
typedef uint16_t half_bits __attribute__((vector_size(2 * W)));
typedef int8_t byte_vec __attribute__((vector_size(W)));

struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};

inline vec as_float(uvec bits) {
  vec x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline vec widen_bits(const Brain* p) {
  half_bits x;
  std::memcpy(&x, p, sizeof x);
  return as_float(__builtin_convertvector(x, uvec) << 16);
}

inline vec widen_bits(const int8_t* p) {
  byte_vec x;
  std::memcpy(&x, p, sizeof x);
  return __builtin_convertvector(__builtin_convertvector(x, ivec), vec);
}

inline vec widen_bits(const Half* p) {
  half_bits x;
  std::memcpy(&x, p, sizeof x);
#if defined(__AVX512F__)
  return vec(_mm512_cvtph_ps(__m256i(x)));
#elif defined(__F16C__)
  return vec(_mm256_cvtph_ps(__m128i(x)));
#else
  const uvec h = __builtin_convertvector(x, uvec), sign = (h & 0x8000u) << 16;
  const uvec size = h & 0x7fffu, moved = (size << 13) + (112u << 23);
  const vec small = __builtin_convertvector(ivec(size), vec) * (1.0f / (1 << 24));
  uvec bits;
  std::memcpy(&bits, &small, sizeof bits);
  bits = ivec(size) < 0x400 ? bits : moved;
  bits = ivec(size) < 0x7c00 ? bits : (size << 13) | 0x7f800000u;
  return as_float(bits | sign);
#endif
}

inline vec widen_bits(const float* p) { return load(p); }

template <class T>
inline vec widen_part(const T* p, int64_t left) {
  if (left >= W) return widen_bits(p);
  T part[W] = {};
  for (int64_t i = 0; i < left; ++i) part[i] = p[i];
  return widen_bits(part);
}

inline float squares(const float* row, int64_t width) {
  vec total = {};
  for (int64_t d = 0; d < width; d += W) {
    const vec x = load_part(row + d, width - d);
    total += x * x;
  }
  return sum(total);
}

// At most BLOCK keys of one store. score = factor * (query . row) + offset, and an offset of
// -infinity hides a key. Rows are padded up to a multiple of R with hidden ones.
class Keys {
 public:
  // Floats of memory that blocks of keys of a width take.
  static int64_t floats(int64_t width) { return BLOCK * row_length(width); }

  Keys(const Search& p, int64_t store, float* memory)
      : p_(p), store_(store), memory_(memory) {}

  const float* rows() const { return rows_; }
  int64_t stride() const { return stride_; }
  int64_t count() const { return count_; }
  bool plain() const { return plain_; }  // every factor is 1 and every offset 0
  const float* factors() const { return factors_; }
  const float* offsets() const { return offsets_; }
  int64_t position(int64_t key) const {
    return p_.positions[store_ * p_.position_batch + key];
  }
  const Range& positions() const { return range_; }  // of those that some query may see

  // False where none of the keys can be found by a query that sees `window`.
  bool read(int64_t begin, int64_t count, const Window& window) {
    count_ = count;
    plain_ = p_.metric == DOT && p_.scales == nullptr && count % R == 0;
    if (!look(begin, window)) return false;
    switch (p_.key_type) {
      case FLOAT16: widen_rows<Half>(begin); break;
      case BFLOAT16: widen_rows<Brain>(begin); break;
      case INT8: widen_rows<int8_t>(begin); break;
      default:
        rows_ = source<float>(begin);
        stride_ = p_.key_row;
        if (count % R) widen_rows<float>(begin);
    }
    weigh(begin);
    return true;
  }

 private:
  const Search& p_;
  int64_t store_, count_ = 0, stride_ = 0;
  float* memory_;
  const float* rows_ = nullptr;
  bool plain_ = true;
  float factors_[BLOCK], offsets_[BLOCK];
  Range range_;

  template <class T>
  const T* source(int64_t key) const {
    return static_cast<const T*>(p_.keys) + store_ * p_.key_batch + key * p_.key_row;
  }

  // Offsets of keys that count are 0 for now, those of all others -infinity.
  bool look(int64_t begin, const Window& window) {
    const uint8_t* valid = p_.valid ? p_.valid + store_ * p_.valid_batch + begin : nullptr;
    const int64_t* at = p_.positions ? p_.positions + store_ * p_.position_batch + begin : nullptr;
    range_ = Range();
    int64_t found = 0;
    for (int64_t i = 0; i < round_up(count_, R); ++i) {
      bool counts = i < count_ && (valid == nullptr || valid[i]);
      if (counts && at) {
        counts = window.sees(at[i]);
        if (counts) range_.add(at[i]);
      }
      offsets_[i] = counts ? 0 : -INFINITY;
      found += counts;
    }
    plain_ = plain_ && found == count_;
    return found > 0;
  }

  template <class T>
  void widen_rows(int64_t begin) {
    stride_ = row_length(p_.width);
    rows_ = memory_;
    for (int64_t i = 0; i < round_up(count_, R); ++i) {
      float* out = memory_ + i * stride_;
      const T* in = i < count_ ? source<T>(begin + i) : nullptr;
      for (int64_t d = 0; d < p_.width; d += W) {
        store(out + d, in ? widen_part(in + d, p_.width - d) : vec{});
      }
    }
  }

  void weigh(int64_t begin) {
    if (plain_) {
      std::fill(factors_, factors_ + BLOCK, 1.0f);
      return;
    }
    const float* scales = p_.scales ? p_.scales + store_ * p_.scale_batch + begin : nullptr;
    for (int64_t i = 0; i < round_up(count_, R); ++i) {
      const float scale = scales && i < count_ ? scales[i] : 1;
      factors_[i] = scale;
      if (p_.metric == DOT) continue;
      const float size = squares(rows_ + i * stride_, p_.width) * scale * scale;
      if (p_.metric == COSINE) factors_[i] = scale / std::max(std::sqrt(size), TINY);
      if (p_.metric == L2) offsets_[i] -= size;
    }
  }
};
