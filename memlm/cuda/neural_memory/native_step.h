// One token per row, as in decoding: `step` in step.py. Rows are sequences times heads; with the
// inputs a and errors e of every layer at the anchor, and the weights W and momentum S:
//
//   S' = carry S - size a^T e        W' = decay W + S'        o = the query through W'
//
// A layer's weights and momentum are read once and written once, and the query goes through W' in
// the same pass.
#pragma once

#include <cmath>

#include "native_gelu.h"

struct Step {
  int64_t threads, rows, heads, depth, clips, reads_anchor, cycle;
  double clip;
  int64_t widths[5];  // channels of a head, of the hidden layers, of a head
  const float *q, *k, *v, *alpha, *eta, *theta;
  const int64_t* offset;
  const float *anchor[4], *weights[4], *momentum[4];
  float *new_weights[4], *new_momentum[4], *o, *loss, *square;
  int64_t* new_offset;
};

namespace step {

using namespace simd;

constexpr float NORM_EPS = 1e-5f;

inline float dot(const float* a, const float* b, int64_t n) {
  vec total = {};
  for (int64_t i = 0; i < n; i += W) total += load_part(a + i, n - i) * load_part(b + i, n - i);
  return sum(total);
}

// y = x W with W [in, out]
inline void through(const float* x, const float* weights, int64_t in, int64_t out, float* y) {
  std::fill(y, y + out, 0.0f);
  for (int64_t i = 0; i < in; ++i) {
    const float a = x[i], *row = weights + i * out;
    for (int64_t j = 0; j < out; ++j) y[j] += a * row[j];
  }
}

// Mean 0 and variance 1 of n numbers, in place; 1 / standard deviation.
inline float normalize(float* x, int64_t n) {
  float mean = 0, square = 0;
  for (int64_t i = 0; i < n; ++i) mean += x[i];
  mean /= n;
  for (int64_t i = 0; i < n; ++i) x[i] -= mean;
  for (int64_t i = 0; i < n; ++i) square += x[i] * x[i];
  const float inverse = 1 / std::sqrt(square / n + NORM_EPS);
  for (int64_t i = 0; i < n; ++i) x[i] *= inverse;
  return inverse;
}

class Row {
 public:
  Row(const Step& p, int64_t row) : p(p), row(row), D(p.widths[0]), L(p.depth) {
    int64_t total = 0;
    for (int64_t l = 0; l <= L; ++l) total += 5 * round_up(p.widths[l], R);
    float* next = workspace(total);
    for (int64_t l = 0; l <= L; ++l) {
      for (float** part : {&inputs[l], &slopes[l], &errors[l], &read[l], &spare[l]}) {
        *part = next;
        next += round_up(p.widths[l], R);
      }
    }
  }

  void run() {
    const float* k = p.k + row * D;
    std::copy(k, k + D, inputs[0]);
    for (int64_t l = 0; l < L; ++l) {
      through(inputs[l], anchor(l), p.widths[l], p.widths[l + 1], spare[l + 1]);
      if (l + 1 < L) gelu::forward(spare[l + 1], inputs[l + 1], slopes[l + 1], p.widths[l + 1]);
    }
    p.loss[row] = last_errors();
    float square = 0;
    for (int64_t l = L - 1; l >= 0; --l) {
      const int64_t in = p.widths[l], out = p.widths[l + 1];
      if (l > 0) {
        for (int64_t i = 0; i < in; ++i) {
          errors[l][i] = dot(anchor(l) + i * out, errors[l + 1], out) * slopes[l][i];
        }
      }
      square += dot(inputs[l], inputs[l], in) * dot(errors[l + 1], errors[l + 1], out);
    }
    p.square[row] = square;
    float size = p.theta[row];
    if (p.clips) {
      const float bound = static_cast<float>(p.clip);
      size *= bound / std::sqrt(std::max(square, bound * bound));
    }
    const float* q = p.q + row * D;
    std::copy(q, q + D, read[0]);
    for (int64_t l = 0; l < L; ++l) {
      advance(l, 1 - p.alpha[row], p.eta[row], size);
      if (l + 1 < L) gelu::forward(spare[l + 1], read[l + 1], nullptr, p.widths[l + 1]);
    }
    float* o = p.o + row * D;
    if (L > 1) normalize(spare[L], D);
    for (int64_t j = 0; j < D; ++j) o[j] = spare[L][j] + (L > 1 ? q[j] : 0);
  }

 private:
  const Step& p;
  const int64_t row, D, L;
  float *inputs[5], *slopes[5], *errors[5], *read[5], *spare[5];

  int64_t place(int64_t l) const { return row * p.widths[l] * p.widths[l + 1]; }
  const float* anchor(int64_t l) const { return p.anchor[l] + place(l); }

  // The errors of the last layer, from what it gave; the loss.
  float last_errors() {
    const float *k = p.k + row * D, *v = p.v + row * D;
    float *z = spare[L], *error = errors[L], loss = 0;
    if (L == 1) {
      for (int64_t j = 0; j < D; ++j) {
        const float difference = z[j] - v[j];
        loss += difference * difference;
        error[j] = 2 * difference;
      }
      return loss;
    }
    const float inverse = normalize(z, D);
    float mean = 0, along = 0;
    for (int64_t j = 0; j < D; ++j) {
      const float difference = (k[j] - v[j]) + z[j];
      loss += difference * difference;
      error[j] = 2 * difference;
      mean += error[j];
      along += error[j] * z[j];
    }
    mean /= D, along /= D;
    for (int64_t j = 0; j < D; ++j) error[j] = (error[j] - mean - z[j] * along) * inverse;
    return loss;
  }

  void advance(int64_t l, float decay, float carry, float size) {
    const int64_t in = p.widths[l], out = p.widths[l + 1];
    const float *weights = p.weights[l] + place(l), *momentum = p.momentum[l] + place(l);
    float *new_weights = p.new_weights[l] + place(l), *new_momentum = p.new_momentum[l] + place(l);
    const float* __restrict error = errors[l + 1];
    float* __restrict y = spare[l + 1];
    std::fill(y, y + out, 0.0f);
    for (int64_t i = 0; i < in; ++i) {
      const float a = size * inputs[l][i], x = read[l][i];
      const float *__restrict w = weights + i * out, *__restrict s = momentum + i * out;
      float *__restrict w_new = new_weights + i * out, *__restrict s_new = new_momentum + i * out;
      for (int64_t j = 0; j < out; ++j) {
        const float moved = carry * s[j] - a * error[j];
        s_new[j] = moved;
        w_new[j] = decay * w[j] + moved;
        y[j] += x * w_new[j];
      }
    }
    if (p.reads_anchor) through(read[l], anchor(l), in, out, y);
  }
};

}  // namespace step
