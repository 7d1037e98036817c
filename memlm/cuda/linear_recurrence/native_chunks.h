// What both passes of the recurrence share: arguments, sequences, gates and products of a chunk.
#pragma once

#include <initializer_list>

#include "../simd.h"

using namespace simd;

namespace {

constexpr int64_t C = 64;  // also what `return_chunk_states` counts in
constexpr float L2_EPS = 1e-6f;

}  // namespace

struct Strides {
  int64_t row, token, head;
};

// As `_Problem` in native.py. Missing tensors are null; strides count floats.
struct Problem {
  int64_t threads, N, T, H, HV, K, V;
  int64_t l2norm, sigmoid, twice;
  double scale;
  const int64_t* bounds;  // [N + 1]: all tokens are in row 0; null: T in each of N rows
  const float *A_log, *dt_bias, *initial_state;
  const float *q, *k, *v, *log_decay, *beta, *dO;
  Strides sq, sk, sv, sg, sb, so;
  // Forward. errors and states are what the backward pass gets: E [tokens, HV, V] and the state at
  // the start of every chunk, in the layout of the chunk states.
  float *o, *state, *chunk_states, *errors, *states;
  // Backward; the gradients of q and k are those of every value head, [tokens, HV, K].
  const float* dstate;
  float *dq, *dk, *dv, *dlog_decay, *dbeta, *dinitial_state;
  double* dgate;  // [N, HV, 2]: sums of the gradient of the raw gate, and of g's times g
};

namespace {

struct Sequence {
  int64_t row, first, length, slot;  // slot: where its chunk states begin

  Sequence(const Problem& p, int64_t n) {
    row = p.bounds ? 0 : n;
    first = p.bounds ? p.bounds[n] : 0;
    length = p.bounds ? p.bounds[n + 1] - first : p.T;
    slot = p.bounds ? first / C + n : n * ((p.T + C - 1) / C);
  }
};

// Decays and write strengths of a chunk; what lies behind its tokens has no decay and no strength.
// G is kept as total + rest: its differences decide, and may be far smaller than the sums.
struct Gates {
  alignas(64) float g[C], beta[C], since_start[C], to_end[C], g_slope[C], beta_slope[C];
  alignas(64) float total[C], rest[C];
  float whole;

  void load(const Problem& p, const Sequence& s, int64_t begin, int64_t n, int64_t head) {
    std::memset(g, 0, sizeof g);
    std::memset(beta, 0, sizeof beta);
    const int64_t token = s.first + begin;
    if (p.log_decay) {
      const float* x = p.log_decay + s.row * p.sg.row + token * p.sg.token + head * p.sg.head;
      for (int64_t i = 0; i < n; ++i) g[i] = x[i * p.sg.token];
    }
    if (p.beta) {
      const float* x = p.beta + s.row * p.sb.row + token * p.sb.token + head * p.sb.head;
      for (int64_t i = 0; i < n; ++i) beta[i] = x[i * p.sb.token];
    }
    const vec rate = p.A_log ? simd::exp(all(p.A_log[head])) : vec{};
    for (int64_t i = 0; i < n; i += W) {
      if (p.A_log) {
        const vec x = simd::load(g + i) + p.dt_bias[head];
        store(g + i, -rate * softplus(x));
        store(g_slope + i, -rate * simd::sigmoid(x));
      }
      const vec x = simd::load(g + i);
      store(g + i, choose(x < LOG_ZERO, all(LOG_ZERO), x));
      vec b = simd::load(beta + i), slope = all(1);
      if (p.sigmoid) b = simd::sigmoid(b), slope = b * (1 - b);
      if (p.twice) b = 2 * b, slope = 2 * slope;
      store(beta + i, b);
      store(beta_slope + i, slope);
    }
    std::memset(g + n, 0, (C - n) * sizeof(float));
    std::memset(beta + n, 0, (C - n) * sizeof(float));
  }

  void accumulate(int64_t rows) {
    double sum = 0, sums[C];
    for (int64_t i = 0; i < rows; ++i) sums[i] = sum += g[i];
    for (int64_t i = 0; i < rows; ++i) {
      total[i] = static_cast<float>(sums[i]);
      rest[i] = static_cast<float>(sums[i] - total[i]);
      to_end[i] = static_cast<float>(sum - sums[i]);
    }
    for (int64_t i = 0; i < rows; i += W) {
      store(since_start + i, simd::exp(simd::load(total + i)));
      store(to_end + i, simd::exp(simd::load(to_end + i)));
    }
    whole = since_start[rows - 1];
  }

  // Gamma, in the blocks of R rows and columns on the diagonal and below it. Away from the
  // diagonal, the decay up to the last token before the block of rows is split off, which leaves
  // one exponential per row and column.
  void between(int64_t rows, float* gamma, int64_t ld) const {
    alignas(64) float column[C], row[R];
    for (int64_t i0 = 0; i0 < rows; i0 += R) {
      const int64_t last = i0 - 1;
      for (int64_t j = 0; j < i0; j += W) {
        store(column + j, simd::exp((total[last] - simd::load(total + j)) +
                                    (rest[last] - simd::load(rest + j))));
      }
      for (int r = 0; i0 > 0 && r < R; r += W) {
        store(row + r, simd::exp((simd::load(total + i0 + r) - total[last]) +
                                 (simd::load(rest + i0 + r) - rest[last])));
      }
      for (int r = 0; r < R; ++r) {
        const int64_t i = i0 + r;
        float* out = gamma + i * ld;
        for (int64_t j = 0; j < i0; j += W) store(out + j, row[r] * simd::load(column + j));
        for (int64_t j = i0; j < i0 + R; j += W) {
          const vec x = simd::exp((total[i] - simd::load(total + j)) +
                                  (rest[i] - simd::load(rest + j)));
          store(out + j, choose(lanes() > all(static_cast<float>(i - j)), vec{}, x));
        }
      }
    }
  }
};

// Rows and columns of the buffers of one sequence and head; ld*: floats between rows.
struct Buffers {
  int64_t K, V, ldc, ldk, ldv;

  Buffers(const Problem& p)
      : K(round_up(p.K, R)), V(round_up(p.V, R)),
        ldc(row_length(C)), ldk(row_length(p.K)), ldv(row_length(p.V)) {}

  // Lay buffers of these sizes one behind the other in the thread's memory.
  static void place(std::initializer_list<std::pair<float**, int64_t>> buffers) {
    int64_t total = 0;
    for (const auto& buffer : buffers) total += round_up(buffer.second, 16);
    float* next = workspace(total);
    for (const auto& buffer : buffers) *buffer.first = next, next += round_up(buffer.second, 16);
  }
};

// Queries or keys of a chunk: `rows` rows of which n are tokens, of unit length if asked for.
// factor, if given, gets what they were multiplied with.
void load_heads(const Problem& p, const float* x, const Strides& strides, const Sequence& s,
                int64_t begin, int64_t n, int64_t rows, int64_t head, float* out, int64_t ld,
                float* factor) {
  x += s.row * strides.row + (s.first + begin) * strides.token + head * strides.head;
  for (int64_t i = 0; i < rows; ++i, x += strides.token, out += ld) {
    vec squares = {};
    for (int64_t c = 0; c < round_up(p.K, R); c += W) {
      const vec part = i < n ? load_part(x + c, p.K - c) : vec{};
      squares += part * part;
      store(out + c, part);
    }
    if (p.l2norm && i < n) {
      const float f = 1 / __builtin_sqrtf(sum(squares) + L2_EPS);
      for (int64_t c = 0; c < round_up(p.K, R); c += W) store(out + c, f * load(out + c));
      if (factor) factor[i] = f;
    }
  }
}

// put(place, x y^T there) in the blocks on the diagonal and below; yT is y transposed, and places
// count floats in matrices with ld floats between rows.
template <class Put>
void lower_products(const float* x, int64_t ldx, const float* yT, int64_t ld, int64_t rows,
                    int64_t depth, Put put) {
  const auto product = [=](auto size, int64_t i, int64_t j) {
    Tile<size> tile;
    tile.template add<false>(x + i * ldx, ldx, yT + j, ld, depth);
    tile.map([=](int r, int m, vec y) INLINE_LAMBDA {
      put((i + r) * ld + j + m * W, y);
      return y;
    });
  };
  for_panels(rows, [=](auto size, int64_t j) {
    int64_t i = j / MR * MR;
    for (; i < rows && round_up(i + MR, R) < j + size * W; i += MR) product(constant<1>(), i, j);
    for (; i < rows; i += MR) product(size, i, j);
  });
}

// out = x k^T * Gamma
void decayed_products(const float* x, int64_t ldx, const float* kT, const float* gamma, int64_t ld,
                      int64_t rows, int64_t K, float* out) {
  lower_products(x, ldx, kT, ld, rows, K, [=](int64_t place, vec products) INLINE_LAMBDA {
    store(out + place, products * load(gamma + place));
  });
}

void keep_state(const float* S, int64_t ld, int64_t K, int64_t V, float* out) {
  for (int64_t c = 0; c < K; ++c) std::memcpy(out + c * V, S + c * ld, V * sizeof(float));
}

void load_state(const float* x, const Buffers& b, int64_t K, int64_t V, float* S) {
  for (int64_t c = 0; c < b.K; ++c) {
    for (int64_t j = 0; j < b.V; j += W) {
      const bool real = x && c < K;
      store(S + c * b.ldv + j, real ? load_part(x + c * V + j, V - j) : vec{});
    }
  }
}

}  // namespace
