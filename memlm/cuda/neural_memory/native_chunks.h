// What both passes share: arguments, the blocks of a state, tokens laid out for products.
#pragma once

#include <initializer_list>

#include "../simd.h"

using namespace simd;

// As `_Problem` in native.py; everything is contiguous.
struct Problem {
  int64_t threads, rows, chunks, C, in, out;
  int64_t every;  // a power of two: chunks between two kept states
  const float *x, *a, *e, *n;            // [rows, chunks C, in or out], n [rows, chunks C]
  const float *mu, *beta, *joins;        // [chunks, rows]; joins null: all 1
  const float *W, *S;                    // [rows, in, out], before the first chunk
  // Forward. kept [(chunks - 1) / every, 2, rows, in, out]: W and S before those chunks.
  float *y, *W_end, *S_end, *kept;
  // Backward, with W_end and kept as the forward pass left them. The gradients of the last W and S
  // are null where they are zero.
  const float *dy, *dW_end, *dS_end;
  float *dx, *da, *de, *dn, *dW, *dS, *dbeta, *dmu;
};

namespace {

// A block has at most HEIGHT rows and WIDTH columns; a product works on up to 3 vectors of columns
// at once.
constexpr int64_t HEIGHT = 64, WIDTH = 96;
constexpr int64_t BLOCK = HEIGHT * WIDTH;
static_assert(HEIGHT % R == 0 && WIDTH % (3 * W) == 0 && WIDTH % R == 0);

// f(vectors, first column) for panels that cover `width` columns.
template <class F>
INLINE void for_columns(int64_t width, F f) {
  int64_t vectors = (width + W - 1) / W, column = 0;
  for (; vectors >= 3 && vectors != 4; vectors -= 3, column += 3 * W) f(constant<3>(), column);
  for (; vectors >= 2; vectors -= 2, column += 2 * W) f(constant<2>(), column);
  if (vectors > 0) f(constant<1>(), column);
}

inline void prefetch(const float* p, int64_t floats) {
  for (int64_t i = 0; i < floats; i += 16) __builtin_prefetch(p + i);
}

constexpr int64_t AHEAD = 16;  // rows; those of one block lie too far apart for a CPU to foresee

struct Span {
  int64_t first, count;
};

// W and S of a block, rows of WIDTH numbers.
struct Block {
  float *W, *S;
};

// Both passes over one row.
struct Row {
  const Problem& p;
  const int64_t row, C, tokens, Cp;  // Cp: slots of a chunk, zeros behind its tokens
  const bool by_panel;               // walk through the blocks column by column

  Row(const Problem& problem, int64_t r)
      : p(problem), row(r), C(p.C), tokens(p.chunks * p.C), Cp(round_up(p.C, R)),
        by_panel(p.in <= p.out) {}

  // The tokens that read the weights before chunk c, or the last ones for c = chunks.
  Span reading(int64_t c) const {
    const int64_t first = std::max<int64_t>(c * C - 1, 0);
    return {first, std::min(tokens, (c + 1) * C - 1) - first};
  }
  bool narrows() const { return p.out < p.in; }
  int64_t heights() const { return (p.in + HEIGHT - 1) / HEIGHT; }
  int64_t widths() const { return (p.out + WIDTH - 1) / WIDTH; }
  int64_t height(int64_t b) const { return std::min(HEIGHT, p.in - b * HEIGHT); }
  int64_t width(int64_t j) const { return std::min(WIDTH, p.out - j * WIDTH); }
  // Of the narrower side all blocks are at hand at a time, of the other one.
  int64_t high_slots() const { return by_panel ? heights() : 1; }
  int64_t wide_slots() const { return by_panel ? 1 : widths(); }
  int64_t high_slot(int64_t b) const { return by_panel ? b : 0; }
  int64_t wide_slot(int64_t j) const { return by_panel ? 0 : j; }

  float gate(const float* x, int64_t c) const { return x[c * p.rows + row]; }
  float joins(int64_t c) const { return p.joins ? gate(p.joins, c) : 1; }

  // f(b, j) for all blocks, with what is at hand brought in before and taken away after it.
  template <class High, class Wide, class F, class HighEnd, class WideEnd>
  void walk(High high, Wide wide, F f, HighEnd high_end, WideEnd wide_end) const {
    const int64_t hs = heights(), ws = widths();
    if (by_panel) {
      for (int64_t b = 0; b < hs; ++b) high(b);
      for (int64_t j = 0; j < ws; ++j) {
        wide(j);
        for (int64_t b = 0; b < hs; ++b) f(b, j);
        wide_end(j);
      }
      for (int64_t b = 0; b < hs; ++b) high_end(b);
    } else {
      for (int64_t j = 0; j < ws; ++j) wide(j);
      for (int64_t b = 0; b < hs; ++b) {
        high(b);
        for (int64_t j = 0; j < ws; ++j) f(b, j);
        high_end(b);
      }
      for (int64_t j = 0; j < ws; ++j) wide_end(j);
    }
  }

  // Block (b, j) of a state [in, out], zeros behind what the state has; null is a state of zeros.
  void load_block(const float* state, int64_t b, int64_t j, float* out) const {
    const int64_t h = height(b), w = width(j);
    if (state) state += (row * p.in + b * HEIGHT) * p.out + j * WIDTH;
    for (int64_t k = 0; k < round_up(h, R); ++k, out += WIDTH) {
      for (int64_t c = 0; c < round_up(w, W); c += W) {
        store(out + c, state && k < h ? load_part(state + k * p.out + c, w - c) : vec{});
      }
    }
  }

  void store_block(const float* from, int64_t b, int64_t j, float* state, float factor = 1) const {
    const int64_t h = height(b), w = width(j);
    state += (row * p.in + b * HEIGHT) * p.out + j * WIDTH;
    for (int64_t k = 0; k < h; ++k, state += p.out, from += WIDTH) {
      for (int64_t c = 0; c < w; c += W) store_part(state + c, factor * load(from + c), w - c);
    }
  }

  // W or S (part 1) before chunk c, a multiple of `every`.
  const float* before(int64_t c, int64_t part) const {
    return c == 0 ? (part ? p.S : p.W) : kept(c, part);
  }
  float* kept(int64_t c, int64_t part) const {
    return p.kept + ((c / p.every - 1) * 2 + part) * p.rows * p.in * p.out;
  }

  // What a chunk does to a block of h rows and w columns; left [h, Cp] and right [C, WIDTH].
  void advance(int64_t c, const float* left, const float* right, int64_t h, int64_t w,
               Block from, Block to) const {
    const float mu = gate(p.mu, c), beta = gate(p.beta, c), joined = joins(c);
    const int64_t depth = C, ld = Cp;
    for_columns(w, [=](auto size, int64_t j) {
      for (int64_t k = 0; k < h; k += MR) {
        Tile<size> tile;
        tile.template add<false>(left + k * ld, ld, right + j, WIDTH, depth);
        const int64_t place = k * WIDTH + j;
        const float *S = from.S + place, *weights = from.W + place;
        float* next = to.W + place;
        tile.map([=](int r, int m, vec x) INLINE_LAMBDA {
          const int64_t at = r * WIDTH + m * W;
          const vec s = mu * load(S + at) + x;
          store(next + at, beta * load(weights + at) + joined * s);
          return s;
        });
        tile.put(to.S + place, WIDTH);
      }
    });
  }
};

// out [tokens, WIDTH] = (first: 0, else out) + left^T [depth, Cp]^T right [depth, WIDTH]
inline void by_tokens(const float* left, int64_t ld, const float* right, int64_t count,
                      int64_t width, int64_t depth, bool first, float* out) {
  for_columns(width, [=](auto size, int64_t j) {
    for (int64_t t = 0; t < count; t += MR) {
      Tile<size> tile;
      tile.template add<true>(left + t, ld, right + j, WIDTH, depth);
      float* sum = out + t * WIDTH + j;
      if (!first) {
        tile.map([=](int r, int m, vec x) INLINE_LAMBDA {
          return load(sum + r * WIDTH + m * W) + x;
        });
      }
      tile.put(sum, WIDTH);
    }
  });
}

// out[t] = the columns of x[t], times factors[t] if given, for `count` tokens; zeros up to a
// multiple of W columns. Rows of `out` have WIDTH numbers.
inline void lay_out(const float* x, int64_t ld, Span read, int64_t columns, const float* factors,
                    float* out) {
  x += read.first * ld;
  for (int64_t t = 0; t < read.count; ++t, x += ld, out += WIDTH) {
    const float factor = factors ? -factors[read.first + t] : 1;
    prefetch(x + AHEAD * ld, columns);
    for (int64_t c = 0; c < columns; c += W) store(out + c, factor * load_part(x + c, columns - c));
  }
}

// out[c, t] = x[t, c], times factors[t] if given, with zeros up to a multiple of R columns c and to
// Cp tokens.
inline void lay_out_transposed(const float* x, int64_t ld, Span read, int64_t columns,
                               const float* factors, int64_t Cp, float* out) {
  x += read.first * ld;
  for (int64_t t = 0; t < Cp; t += W) {
    for (int64_t i = t; i < std::min(t + W, read.count); ++i) {
      prefetch(x + (i + AHEAD) * ld, columns);
    }
    for (int64_t c = 0; c < round_up(columns, R); c += W) {
      vec block[W];
      for (int64_t i = 0; i < W; ++i) {
        block[i] = vec{};
        if (t + i < read.count && c < columns) {
          block[i] = load_part(x + (t + i) * ld + c, columns - c);
          if (factors) block[i] *= -factors[read.first + t + i];
        }
      }
      transpose(block);
      for (int i = 0; i < W; ++i) store(out + (c + i) * Cp + t, block[i]);
    }
  }
}

// Buffers of these sizes in the thread's memory, one behind the other.
inline void place(std::initializer_list<std::pair<float**, int64_t>> buffers) {
  int64_t total = 0;
  for (const auto& buffer : buffers) total += round_up(buffer.second, 16);
  float* next = workspace(total);
  for (const auto& buffer : buffers) *buffer.first = next, next += round_up(buffer.second, 16);
}

}  // namespace
