// The backward pass: see native.cpp for the formulas.
#pragma once

#include "native_chunks.h"

namespace {

// out [height, ld] = (first: 0, else out) + state [height, WIDTH] tokens [WIDTH, ld], for `count`
// tokens.
inline void by_inputs(const float* state, const float* tokens, int64_t ld, int64_t count,
                      int64_t height, int64_t depth, bool first, float* out) {
  for_columns(count, [=](auto size, int64_t t) {
    for (int64_t k = 0; k < height; k += MR) {
      Tile<size> tile;
      tile.template add<false>(state + k * WIDTH, WIDTH, tokens + t, ld, depth);
      float* sum = out + k * ld + t;
      if (!first) {
        tile.map([=](int r, int m, vec x) INLINE_LAMBDA { return load(sum + r * ld + m * W) + x; });
      }
      tile.put(sum, ld);
    }
  });
}

struct Backward : Row {
  int64_t longest;  // chunks of a segment
  // By chunk and by block of rows (high) or of columns (wide).
  float *x, *left, *dx, *dleft;                      // [HEIGHT, Cp]
  float *right, *dy, *dright, *right_mT, *dy_mT;     // [Cp, WIDTH], two of them transposed
  float *states, *dW, *dS;                           // of a block, W and S before every chunk
  float* dots;                                       // of every chunk: two doubles

  Backward(const Problem& problem, int64_t r)
      : Row(problem, r), longest(std::min(p.every, p.chunks)) {
    const int64_t high = high_slots() * HEIGHT * Cp, wide = wide_slots() * WIDTH * Cp;
    const int64_t most = longest + 1;
    place({{&x, most * high}, {&left, longest * high}, {&dx, most * high}, {&dleft, longest * high},
           {&right, longest * wide}, {&dy, most * wide}, {&dright, longest * wide},
           {&right_mT, longest * wide}, {&dy_mT, most * wide}, {&states, 2 * longest * BLOCK},
           {&dW, BLOCK}, {&dS, BLOCK}, {&dots, 4 * longest}});
  }

  float* high_at(float* buffer, int64_t i, int64_t b) const {
    return buffer + (i * high_slots() + high_slot(b)) * HEIGHT * Cp;
  }
  float* wide_at(float* buffer, int64_t i, int64_t j) const {
    return buffer + (i * wide_slots() + wide_slot(j)) * WIDTH * Cp;
  }
  Block state(int64_t i) const { return {states + 2 * i * BLOCK, states + (2 * i + 1) * BLOCK}; }

  void run() const {
    std::memset(p.dn + row * tokens, 0, tokens * sizeof(float));
    for (int64_t first = (p.chunks - 1) / p.every * p.every; first >= 0; first -= p.every) {
      segment(first, std::min(p.every, p.chunks - first));
    }
  }

  void segment(int64_t first, int64_t count) const {
    const int64_t reads = count + (first + count == p.chunks);
    double* sums = reinterpret_cast<double*>(dots);
    std::fill(sums, sums + 2 * count, 0.0);
    walk([=](int64_t b) { high_begin(first, count, reads, b); },
         [=](int64_t j) { wide_begin(first, count, reads, j); },
         [=](int64_t b, int64_t j) { back_through(first, count, b, j); },
         [=](int64_t b) { high_end(first, count, reads, b); },
         [=](int64_t j) { wide_end(first, count, j); });
    for (int64_t i = 0; i < count; ++i) {
      p.dbeta[(first + i) * p.rows + row] = static_cast<float>(sums[2 * i]);
      p.dmu[(first + i) * p.rows + row] = static_cast<float>(sums[2 * i + 1]);
    }
  }

  const float* factors(bool wanted) const { return wanted ? p.n + row * tokens : nullptr; }

  void high_begin(int64_t first, int64_t count, int64_t reads, int64_t b) const {
    const int64_t from = row * tokens * p.in + b * HEIGHT, h = height(b);
    for (int64_t i = 0; i < reads; ++i) {
      lay_out_transposed(p.x + from, p.in, reading(first + i), h, nullptr, Cp, high_at(x, i, b));
    }
    for (int64_t i = 0; i < count; ++i) {
      lay_out_transposed(p.a + from, p.in, {(first + i) * C, C}, h, factors(!narrows()), Cp,
                         high_at(left, i, b));
    }
  }

  void wide_begin(int64_t first, int64_t count, int64_t reads, int64_t j) const {
    const int64_t from = row * tokens * p.out + j * WIDTH, w = width(j);
    for (int64_t i = 0; i < reads; ++i) {
      const Span read = reading(first + i);
      lay_out(p.dy + from, p.out, read, w, nullptr, wide_at(dy, i, j));
      lay_out_transposed(p.dy + from, p.out, read, w, nullptr, Cp, wide_at(dy_mT, i, j));
    }
    for (int64_t i = 0; i < count; ++i) {
      const Span written{(first + i) * C, C};
      lay_out(p.e + from, p.out, written, w, factors(narrows()), wide_at(right, i, j));
      lay_out_transposed(p.e + from, p.out, written, w, factors(narrows()), Cp,
                         wide_at(right_mT, i, j));
    }
  }

  // One block through the chunks of a segment, forward again and back.
  void back_through(int64_t first, int64_t count, int64_t b, int64_t j) const {
    const int64_t h = round_up(height(b), MR), w = round_up(width(j), W);
    const bool ends = first + count == p.chunks;
    load_block(ends ? p.dW_end : p.dW, b, j, dW);
    load_block(ends ? p.dS_end : p.dS, b, j, dS);
    if (ends) {
      load_block(p.W_end, b, j, state(0).W);
      read_backward(state(0).W, first + count, count, b, j, 1, [](const auto&, int64_t) {});
    }
    load_block(before(first, 0), b, j, state(0).W);
    load_block(before(first, 1), b, j, state(0).S);
    for (int64_t i = 0; i + 1 < count; ++i) {
      advance(first + i, high_at(left, i, b), wide_at(right, i, j), h, w, state(i), state(i + 1));
    }
    double* sums = reinterpret_cast<double*>(dots);
    Join last = join(first + count - 1, state(count - 1));
    last.add_block(dW, h, w);
    last.add(sums + 2 * (count - 1));
    for (int64_t i = count - 1; i >= 0; --i) {
      const int64_t c = first + i;
      prefetch(high_at(x, i, b), h * Cp);
      by_tokens(high_at(left, i, b), Cp, dS, C, w, h, b == 0, wide_at(dright, i, j));
      by_inputs(dS, wide_at(right_mT, i, j), Cp, C, h, w, j == 0, high_at(dleft, i, b));
      if (i > 0) {
        Join next = join(c - 1, state(i - 1));
        const auto add = [&next](const auto& d, int64_t at) INLINE_LAMBDA { next.add_tile(d, at); };
        read_backward(state(i).W, c, i, b, j, gate(p.beta, c), add);
        next.add(sums + 2 * (i - 1));
      } else {
        read_backward(state(i).W, c, i, b, j, gate(p.beta, c), [](const auto&, int64_t) {});
      }
    }
    store_block(dW, b, j, p.dW);
    store_block(dS, b, j, p.dS, first == 0 ? gate(p.mu, 0) : 1);
  }

  // dS = joins dW + mu dS, mu of the chunk behind, and the sums of the entries of dW W and dS S.
  struct Join {
    float* dS;
    Block state;
    float joined, decay;
    vec by_W = {}, by_S = {};

    // For a tile of dW at this place of the block.
    template <int N>
    INLINE void add_tile(const Tile<N>& d, int64_t place) {
      float* to = dS + place;
      const float *weights = state.W + place, *momentum = state.S + place;
      const float joins = joined, mu = decay;
      vec sum_W[2] = {}, sum_S[2] = {};
      UNROLL for (int r = 0; r < MR; ++r) {
        UNROLL for (int m = 0; m < N; ++m) {
          const int64_t at = r * WIDTH + m * W;
          const vec z = joins * d.x[r][m] + mu * load(to + at);
          store(to + at, z);
          sum_W[r % 2] += d.x[r][m] * load(weights + at);
          sum_S[r % 2] += z * load(momentum + at);
        }
      }
      by_W += sum_W[0] + sum_W[1];
      by_S += sum_S[0] + sum_S[1];
    }
    void add_block(const float* d, int64_t h, int64_t w) {
      for (int64_t k = 0; k < h; k += MR) {
        for (int64_t column = 0; column < w; column += W) {
          Tile<1> tile;
          for (int r = 0; r < MR; ++r) tile.x[r][0] = load(d + (k + r) * WIDTH + column);
          add_tile(tile, k * WIDTH + column);
        }
      }
    }

    void add(double* sums) const {
      sums[0] += sum(by_W);
      sums[1] += sum(by_S);
    }
  };

  Join join(int64_t c, Block state) const {
    return {dS, state, joins(c), c + 1 < p.chunks ? gate(p.mu, c + 1) : 1};
  }

  // Gradients of the reads before chunk c, the i-th of the segment: dx += dy W^T and, for what the
  // weights were before, dW = beta dW + x^T dy. `then(r, m, d)` gets what dW becomes.
  template <class Then>
  INLINE void read_backward(const float* weights, int64_t c, int64_t i, int64_t b, int64_t j,
                            float beta, Then then) const {
    const int64_t h = round_up(height(b), MR), w = round_up(width(j), W), ld = Cp;
    const int64_t count = reading(c).count;
    by_inputs(weights, wide_at(dy_mT, i, j), ld, count, h, w, j == 0, high_at(dx, i, b));
    const float *asking = high_at(x, i, b), *answers = wide_at(dy, i, j);
    float* gradient = dW;
    for_columns(w, [=](auto size, int64_t column) INLINE_LAMBDA {
      for (int64_t k = 0; k < h; k += MR) {
        Tile<size> tile;
        tile.template add<false>(asking + k * ld, ld, answers + column, WIDTH, count);
        float* d = gradient + k * WIDTH + column;
        tile.map([=](int r, int m, vec product) INLINE_LAMBDA {
          return beta * load(d + r * WIDTH + m * W) + product;
        });
        tile.put(d, WIDTH);
        then(tile, k * WIDTH + column);
      }
    });
  }

  void high_end(int64_t first, int64_t count, int64_t reads, int64_t b) const {
    const int64_t from = row * tokens * p.in + b * HEIGHT, h = height(b);
    for (int64_t i = 0; i < reads; ++i) {
      const Span read = reading(first + i);
      hand_back(high_at(dx, i, b), read, h, nullptr, p.dx + from);
    }
    for (int64_t i = 0; i < count; ++i) {
      hand_back(high_at(dleft, i, b), {(first + i) * C, C}, h, narrows() ? nullptr : p.a + from,
                p.da + from);
    }
  }

  // A gradient [HEIGHT, Cp] to the tokens; with the inputs that n was multiplied with, dn as well.
  void hand_back(const float* gradient, Span span, int64_t columns, const float* inputs,
                 float* out) const {
    for (int64_t t = 0; t < span.count; t += W) {
      for (int64_t i = t; i < std::min(t + W, span.count); ++i) {
        const int64_t ahead = (span.first + i + AHEAD) * p.in;
        prefetch(out + ahead, columns);
        if (inputs) prefetch(inputs + ahead, columns);
      }
      for (int64_t c = 0; c < columns; c += W) {
        vec block[W];
        for (int i = 0; i < W; ++i) {
          block[i] = c + i < columns ? load(gradient + (c + i) * Cp + t) : vec{};
        }
        transpose(block);
        for (int64_t i = 0; i < std::min<int64_t>(W, span.count - t); ++i) {
          finish(block[i], span.first + t + i, c, columns, p.in, inputs, out);
        }
      }
    }
  }

  void wide_end(int64_t first, int64_t count, int64_t j) const {
    const int64_t from = row * tokens * p.out + j * WIDTH;
    for (int64_t i = 0; i < count; ++i) {
      const float* gradient = wide_at(dright, i, j);
      for (int64_t t = 0; t < C; ++t, gradient += WIDTH) {
        for (int64_t c = 0; c < width(j); c += W) {
          finish(load(gradient + c), (first + i) * C + t, c, width(j), p.out,
                 narrows() ? p.e + from : nullptr, p.de + from);
        }
      }
    }
  }

  // W numbers of a token's gradient; inputs, if given, were multiplied with -n.
  void finish(vec gradient, int64_t token, int64_t c, int64_t columns, int64_t ld,
              const float* inputs, float* out) const {
    const int64_t at = token * ld + c, place = row * tokens + token;
    if (inputs) {
      p.dn[place] -= sum(gradient * load_part(inputs + at, columns - c));
      gradient *= -p.n[place];
    }
    store_part(out + at, gradient, columns - c);
  }
};

}  // namespace
