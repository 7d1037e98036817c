// A filter of whole numbers: products of keys and queries rounded to a byte per channel, four times
// as many at once as of floats, with a bound on what rounding does to a score. Pairs that may score
// more than a threshold pass; they are scored from the floats.
//
// With q = s (a + e) and k = t (b + f), a and b whole numbers of -127 .. 127,
//   q . k = s (t a . b + a . (t f) + e . k) <= s (t a . b + |a| |t f| + |e| |k|).
#pragma once

#include "native_keys.h"

#ifdef __AVX512VNNI__
constexpr bool FILTER = true;
#else
constexpr bool FILTER = false;  // without the instruction, products of floats are faster
#endif

constexpr float LARGEST = 127;
// Outside of these sizes of the largest channel the bounds below do not hold.
constexpr float LEAST_SIZE = 1e-12f, MOST_SIZE = 1e12f;
constexpr float MORE = 1.001f;             // norms are not exact
constexpr float ROUNDING = 1.0f / (1 << 20);  // what a few operations in float32 may lose

// acc + the sum of four products each, unsigned times signed bytes.
inline ivec add_products(ivec acc, ivec unsigned_bytes, ivec signed_bytes) {
#ifdef __AVX512VNNI__
  return ivec(_mm512_dpbusd_epi32(__m512i(acc), __m512i(unsigned_bytes), __m512i(signed_bytes)));
#else
  for (int j = 0; j < 32; j += 8) {
    acc += ((unsigned_bytes >> j) & 255) * ((signed_bytes << (24 - j)) >> 24);
  }
  return acc;
#endif
}

// One row as bytes.
struct Rounded {
  float step;   // a byte's unit
  float size;   // at least |row|
  float error;  // at least |row - step * bytes|
  int32_t total;  // of the bytes
};

// bytes[0, round_up(width, W)) of a row; false where the row is not for the filter.
inline bool round_to_bytes(const float* row, int64_t width, int8_t* bytes, Rounded& out) {
  vec largest = {}, squared = {};
  for (int64_t d = 0; d < width; d += W) {
    const vec x = load_part(row + d, width - d), size = choose(x < 0, -x, x);
    largest = size > largest ? size : largest;
    squared += x * x;
  }
  float most = 0;
  for (int i = 0; i < W; ++i) most = std::max(most, largest[i]);
  const float size = std::sqrt(sum(squared));
  const bool zero = most == 0 && size == 0;
  if (!zero && !(most > LEAST_SIZE && most < MOST_SIZE && size < MOST_SIZE)) return false;
  const float step = zero ? 1 : most / LARGEST, inverse = 1 / step;
  const vec magic = all(12582912.0f);  // adding it rounds to whole numbers
  vec wrong = {};
  ivec total = {};
  for (int64_t d = 0; d < width; d += W) {
    const vec x = load_part(row + d, width - d);
    const vec whole = (x * inverse + magic) - magic, missed = x - whole * step;
    const ivec number = __builtin_convertvector(whole, ivec);
    const byte_vec narrow = __builtin_convertvector(number, byte_vec);
    std::memcpy(bytes + d, &narrow, sizeof narrow);
    wrong += missed * missed;
    total += number;
  }
  out = {step, MORE * size, MORE * std::sqrt(sum(wrong)) + ROUNDING * size, 0};
  for (int i = 0; i < W; ++i) out.total += total[i];
  return true;
}

// A block of keys as bytes, with what their bounds need.
class ByteKeys {
 public:
  static int64_t floats(int64_t width) { return BLOCK * round_up(width, W) / 4; }

  ByteKeys(int64_t width, float* memory)
      : stride_(round_up(width, W)), bytes_(reinterpret_cast<int8_t*>(memory)) {}

  int64_t stride() const { return stride_; }
  const int8_t* bytes() const { return bytes_; }

  // False where the filter cannot take these keys.
  bool read(const Keys& keys, int64_t width) {
    for (int64_t i = 0; i < round_up(keys.count(), R); ++i) {
      Rounded row;
      const float factor = keys.factors()[i], size = std::abs(factor);
      if (!round_to_bytes(keys.rows() + i * keys.stride(), width, bytes_ + i * stride_, row)) {
        return false;
      }
      if (!(size * row.size < MOST_SIZE) || !(row.size == 0 || size * row.step > LEAST_SIZE)) {
        return false;
      }
      const float offset = keys.offsets()[i];
      steps[i] = factor * row.step;
      // Bytes of queries are moved up by 128.
      starts[i] = -128 * row.total;
      offsets[i] = offset == -INFINITY ? offset : offset + ROUNDING * std::abs(offset);
      sizes[i] = size * row.size;
      errors[i] = size * row.error;
    }
    for (int64_t i = 0; i < round_up(keys.count(), R); i += MR) {
      group_sizes[i / MR] = *std::max_element(sizes + i, sizes + i + MR);
      group_errors[i / MR] = *std::max_element(errors + i, errors + i + MR);
    }
    return true;
  }

  float steps[BLOCK], offsets[BLOCK], sizes[BLOCK], errors[BLOCK];
  float group_sizes[BLOCK / MR], group_errors[BLOCK / MR];
  int32_t starts[BLOCK];

 private:
  int64_t stride_;
  int8_t* bytes_;
};

// Panels of queries as bytes: four channels of a query side by side, then those of the next.
class ByteQueries {
 public:
  static int64_t floats(int64_t queries, int64_t width) {
    const int64_t places = round_up(queries, W);
    return places * (round_up(width, W) / 4 + 3) + round_up(width, W) / 4;
  }

  ByteQueries(int64_t queries, int64_t width, float* memory)
      : places_(round_up(queries, W)),
        length_(round_up(width, W)),
        bytes_(reinterpret_cast<uint8_t*>(memory)),
        inverses(memory + places_ * length_ / 4),
        norms(inverses + places_),
        errors(norms + places_),
        row_(reinterpret_cast<int8_t*>(errors + places_)) {}

  const uint8_t* panel(int64_t query) const { return bytes_ + query * length_; }

  // False where the filter cannot take these queries, [count, width].
  bool read(const float* queries, int64_t count, int64_t width) {
    // A score's own rounding, of products added up in W lanes, and that of the filter's numbers.
    const float rounding = (width / W + 8) * (1.0f / (1 << 23)) + ROUNDING;
    std::fill(bytes_, bytes_ + places_ * length_, 128);
    for (int64_t q = 0; q < places_; ++q) inverses[q] = norms[q] = errors[q] = 1;
    bool good = true;
    for_panels(count, [&](auto n, int64_t query) {
      constexpr int64_t wide = n.value * W;
      for (int64_t q = query; q < std::min(query + wide, count); ++q) {
        Rounded row;
        if (!round_to_bytes(queries + q * width, width, row_, row)) good = false;
        if (!good) return;
        uint8_t* panel = bytes_ + query * length_ + 4 * (q - query);
        for (int64_t d = 0; d < width; ++d) panel[d / 4 * 4 * wide + d % 4] = 128 + row_[d];
        inverses[q] = 1 / row.step;
        norms[q] = MORE * (row.size + row.error) * inverses[q];
        errors[q] = MORE * (row.error + rounding * row.size) * inverses[q];
      }
    });
    return good;
  }

 private:
  int64_t places_, length_;
  uint8_t* bytes_;

 public:
  float *inverses, *norms, *errors;

 private:
  int8_t* row_;
};

// Whole products of MR keys and N vectors of queries.
template <int N>
struct ByteTile {
  ivec x[MR][N];

  INLINE void multiply(const int8_t* keys, int64_t stride, const int32_t* starts,
                       const uint8_t* panel, int64_t width) {
    UNROLL for (int r = 0; r < MR; ++r) {
      UNROLL for (int n = 0; n < N; ++n) x[r][n] = ivec{} + starts[r];
    }
    for (int64_t d = 0; d < width; d += 4, panel += 4 * N * W) {
      ivec columns[N];
      UNROLL for (int n = 0; n < N; ++n) std::memcpy(&columns[n], panel + 4 * n * W, 4 * W);
      UNROLL for (int r = 0; r < MR; ++r) {
        int32_t four;
        std::memcpy(&four, keys + r * stride + d, 4);
        UNROLL for (int n = 0; n < N; ++n) {
          x[r][n] = add_products(x[r][n], columns[n], ivec{} + four);
        }
      }
    }
  }
};
