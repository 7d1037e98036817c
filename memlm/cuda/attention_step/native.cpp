// One query per row over the keys and values before it, as in decoding: the new key and query are
// turned by their rotary angles, key, value and position are written behind the last ones, and the
// query attends to those it sees, itself included.
#include <cmath>

#include "../simd.h"

using namespace simd;

extern "C" {

struct Step {
  // Threads; rows; heads; heads of keys; channels of a head; those turned (0: none); slots of a
  // row; the first slot that is seen; the slot to be written.
  int64_t threads, B, H, HK, D, turned, capacity, first, last;
  double scale;
  const float *q, *k, *v, *cos, *sin;  // [B, heads, D]; [B, turned]
  const int64_t* position;             // [B]
  float *keys, *values;                // [B, HK, capacity, D]
  int64_t* positions;                  // [B, capacity]
  float* out;                          // [B, H, D]
};
}

namespace {

void turn(const Step& p, int64_t b, const float* x, float* y) {
  const float *cos = p.cos + b * p.turned, *sin = p.sin + b * p.turned;
  const int64_t half = p.turned / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float low = x[i], high = x[i + half];
    y[i] = low * cos[i] - high * sin[i];
    y[i + half] = high * cos[i + half] + low * sin[i + half];
  }
  for (int64_t i = p.turned; i < p.D; ++i) y[i] = x[i];
}

// All queries that share one head of keys.
void attend(const Step& p, int64_t b, int64_t head) {
  const int64_t D = p.D, groups = p.H / p.HK, seen = p.last + 1 - p.first;
  const int64_t padded = round_up(seen, W), wide = round_up(D, W);
  float* keys = p.keys + (b * p.HK + head) * p.capacity * D;
  float* values = p.values + (b * p.HK + head) * p.capacity * D;
  turn(p, b, p.k + (b * p.HK + head) * D, keys + p.last * D);
  std::memcpy(values + p.last * D, p.v + (b * p.HK + head) * D, sizeof(float) * D);
  float* query = workspace(padded + 2 * wide);
  float *sum_of_values = query + wide, *logits = sum_of_values + wide;
  keys += p.first * D, values += p.first * D;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t own = (b * p.H + head * groups + g) * D;
    turn(p, b, p.q + own, query);
    for (int64_t i = 0; i < D; ++i) query[i] *= static_cast<float>(p.scale);
    vec largest = all(-INFINITY);
    for (int64_t s = 0; s < padded; s += W) {
      vec partial[W] = {};
      for (int64_t r = 0; r < std::min<int64_t>(W, seen - s); ++r) {
        const float* key = keys + (s + r) * D;
        for (int64_t i = 0; i < D; i += W) {
          partial[r] += load_part(query + i, D - i) * load_part(key + i, D - i);
        }
      }
      sums(partial, W, logits + s);
      for (int64_t r = seen - s; r < W; ++r) logits[s + r] = -INFINITY;
      const vec x = load(logits + s);
      largest = choose(x > largest, x, largest);
    }
    float top = largest[0], total = 0;
    for (int i = 1; i < W; ++i) top = std::max(top, largest[i]);
    vec totals = {};
    for (int64_t s = 0; s < padded; s += W) {
      const vec x = exp(load(logits + s) - top);
      store(logits + s, x);
      totals += x;
    }
    total = sum(totals);
    std::fill(sum_of_values, sum_of_values + wide, 0.0f);
    for (int64_t s = 0; s < seen; ++s) {
      const float weight = logits[s], *value = values + s * D;
      for (int64_t i = 0; i < D; ++i) sum_of_values[i] += weight * value[i];
    }
    for (int64_t i = 0; i < D; ++i) p.out[own + i] = sum_of_values[i] / total;
  }
}

}  // namespace

// 0 where memory ran out.
extern "C" int memlm_step(const Step* p) {
  for (int64_t b = 0; b < p->B; ++b) p->positions[b * p->capacity + p->last] = p->position[b];
  return parallel(p->B * p->HK, p->threads, [p](int64_t i) { attend(*p, i / p->HK, i % p->HK); });
}
