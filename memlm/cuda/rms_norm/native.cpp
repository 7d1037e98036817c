// y = x / sqrt(mean(x^2) + eps) * weight of a few rows, times an activation of a gate if there is
// one: what takes torch as many operations.
#include <cmath>

#include "../simd.h"

using namespace simd;

// gate may be null; activation: 0 sigmoid, 1 SiLU.
extern "C" void memlm_rms_norm(const float* x, const float* weight, const float* gate, float* y,
                               int64_t rows, int64_t channels, int64_t activation, double eps) {
  for (int64_t r = 0; r < rows; ++r, x += channels, y += channels) {
    vec squares = {};
    for (int64_t i = 0; i < channels; i += W) {
      const vec part = load_part(x + i, channels - i);
      squares += part * part;
    }
    const float scale = 1 / std::sqrt(sum(squares) / channels + static_cast<float>(eps));
    for (int64_t i = 0; i < channels; i += W) {
      const int64_t left = channels - i;
      vec normed = load_part(x + i, left) * scale * load_part(weight + i, left);
      if (gate) {
        const vec g = load_part(gate + r * channels + i, left);
        normed *= activation ? g * sigmoid(g) : sigmoid(g);
      }
      store_part(y + i, normed, left);
    }
  }
}
