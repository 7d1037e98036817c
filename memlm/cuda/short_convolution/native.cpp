// One token per row of the short convolution, as in decoding: every channel's last W inputs times
// its taps, SiLU, and heads divided by their length.
#include <cmath>

#include "../simd.h"

using namespace simd;

constexpr float L2_NORM_EPS = 1e-6f;

extern "C" {

struct Part {
  int64_t heads, channels, normalize;
  float* out;  // [B, heads, channels]
};

// x: rows `stride` numbers apart; weight [D, W]; tail and new_tail [B, W - 1, D].
void memlm_step(const float* x, int64_t stride, const float* weight, const float* tail,
                float* new_tail, int64_t B, int64_t D, int64_t W, int64_t silu,
                int64_t count, const Part* parts) {
  FlushDenormals flush;
  const int64_t reach = W - 1;
  for (int64_t b = 0; b < B; ++b) {
    const float* own = x + b * stride;
    const float* before = tail + b * reach * D;
    float* after = new_tail + b * reach * D;
    int64_t first = 0;
    for (const Part* part = parts; part < parts + count; ++part) {
      const int64_t width = part->heads * part->channels;
      float* out = part->out + b * width;
      for (int64_t i = 0; i < width; ++i) {
        const int64_t d = first + i;
        float y = own[d] * weight[d * W + reach];
        for (int64_t j = 0; j < reach; ++j) y += before[j * D + d] * weight[d * W + j];
        out[i] = y;
      }
      if (silu) {
        for (int64_t i = 0; i < width; i += simd::W) {
          const vec y = load_part(out + i, width - i);
          store_part(out + i, y * sigmoid(y), width - i);
        }
      }
      for (int64_t h = 0; part->normalize && h < part->heads; ++h) {
        float *head = out + h * part->channels, square = L2_NORM_EPS;
        for (int64_t i = 0; i < part->channels; ++i) square += head[i] * head[i];
        const float scale = 1 / std::sqrt(square);
        for (int64_t i = 0; i < part->channels; ++i) head[i] *= scale;
      }
      first += width;
    }
    if (reach) {
      std::memcpy(after, before + D, sizeof(float) * (reach - 1) * D);
      std::memcpy(after + (reach - 1) * D, own, sizeof(float) * D);
    }
  }
}
}
