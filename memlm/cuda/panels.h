// Rows of numbers in registers: what is added up over many rows is written once.
#pragma once

#include "simd.h"

namespace simd {

constexpr int PANEL = W == 16 ? 16 : 8;  // vectors

// f(N, first column) for panels of N vectors that cover `width` columns; N = 0: part of a vector.
template <class F>
INLINE void for_row_panels(int64_t width, F f) {
  int64_t column = 0;
  for (; width - column >= PANEL * W; column += PANEL * W) f(constant<PANEL>(), column);
  if (PANEL > 8 && width - column >= 8 * W) f(constant<8>(), column), column += 8 * W;
  if (width - column >= 4 * W) f(constant<4>(), column), column += 4 * W;
  for (; width - column >= W; column += W) f(constant<1>(), column);
  if (column < width) f(constant<0>(), column);
}

// A panel of a row; `left` columns are left in the row.
template <int N>
struct Panel {
  static constexpr int M = N ? N : 1;
  vec x[M];

  INLINE void zero() {
    UNROLL for (int n = 0; n < M; ++n) x[n] = vec{};
  }
  INLINE void read(const float* p, int64_t left) {
    UNROLL for (int n = 0; n < M; ++n) x[n] = N ? load(p + n * W) : load_part(p, left);
  }
  INLINE void add(const float* p, float weight, int64_t left) {
    UNROLL for (int n = 0; n < M; ++n) x[n] += weight * (N ? load(p + n * W) : load_part(p, left));
  }
  INLINE void write(float* p, int64_t left) const {
    UNROLL for (int n = 0; n < M; ++n) N ? store(p + n * W, x[n]) : store_part(p, x[n], left);
  }
  // Into the second cache: there is room for more lines on their way than to the first.
  static INLINE void fetch(const float* p) {
    UNROLL for (int n = 0; n < M; n += 16 / W) __builtin_prefetch(p + n * W, 0, 2);
  }
};

}  // namespace simd
