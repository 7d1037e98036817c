// gelu(x) = x Phi(x) with its derivative Phi(x) + x phi(x), and the gradient through both.
#pragma once

#include "../simd.h"

namespace gelu {

using namespace simd;

constexpr float INVERSE_ROOT_TAU = 0.3989422804014327f;  // 1 / sqrt(2 pi)

// e^y for y <= 0, within a few units in the last place; 2^-126 for less than that.
INLINE vec exp_of_negative(vec y) {
  vec t = y * 1.4426950408889634f;
  t = t < all(-126.0f) ? all(-126.0f) : t;
  const ivec n = __builtin_convertvector(t - 0.5f, ivec);
  const vec f = t - __builtin_convertvector(n, vec);
  vec p = all(1.5252734e-5f);  // 2^f for |f| <= 1/2, its series
  for (const float c : {1.5403531e-4f, 1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 0.24022651f,
                        0.69314718f, 1.0f}) {
    p = p * f + c;
  }
  return p * reinterpret_cast<vec>((n + 127) << 23);
}

struct Normal {
  vec below, density;  // Phi and phi
};

// Phi within 1e-7 (Abramowitz and Stegun, 7.1.26).
INLINE Normal normal(vec x) {
  const vec gaussian = exp_of_negative(x * x * -0.5f);
  const vec size = x < all(0.0f) ? -x : x;
  const vec t = 1.0f / (1.0f + 0.23164189f * size);
  vec p = all(1.061405429f);
  for (const float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = p * t + c;
  const vec tail = 0.5f * p * t * gaussian;
  return {x < all(0.0f) ? tail : 1.0f - tail, gaussian * INVERSE_ROOT_TAU};
}

// Of n numbers x; slope may be null.
inline void forward(const float* x, float* value, float* slope, int64_t n) {
  for (int64_t i = 0; i < n; i += W) {
    const vec z = load_part(x + i, n - i);
    const Normal at = normal(z);
    store_part(value + i, z * at.below, n - i);
    if (slope) store_part(slope + i, at.below + z * at.density, n - i);
  }
}

// dx from the gradients of value and slope (null: it has none).
inline void backward(const float* x, const float* dvalue, const float* dslope, float* dx,
                     int64_t n) {
  for (int64_t i = 0; i < n; i += W) {
    const vec z = load_part(x + i, n - i);
    const Normal at = normal(z);
    vec d = load_part(dvalue + i, n - i) * (at.below + z * at.density);
    if (dslope) d += load_part(dslope + i, n - i) * at.density * (2.0f - z * z);
    store_part(dx + i, d, n - i);
  }
}

}  // namespace gelu
