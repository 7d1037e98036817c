// The forward pass: see native.cpp for the formulas.
#pragma once

#include "native_chunks.h"

namespace {

constexpr int64_t TOGETHER = 256;  // about as many tokens are laid out at a time

struct Forward : Row {
  int64_t group = 1;  // chunks at a time, a divisor of `every`
  // By block of rows (high) or of columns (wide) and by chunk.
  float *x, *left, *right, *y;
  Block block;

  Forward(const Problem& problem, int64_t r) : Row(problem, r) {
    while (2 * group <= p.every && 2 * group * C <= TOGETHER) group *= 2;
    const int64_t high = high_slots() * HEIGHT * Cp, wide = wide_slots() * WIDTH * Cp;
    // One more chunk: that of the last token's read.
    place({{&x, (group + 1) * high}, {&left, group * high}, {&right, group * wide},
           {&y, (group + 1) * wide}, {&block.W, BLOCK}, {&block.S, BLOCK}});
  }

  void run() const {
    for (int64_t first = 0; first < p.chunks; first += group) {
      chunks(first, std::min(group, p.chunks - first));
    }
  }

  void chunks(int64_t first, int64_t count) const {
    const bool ends = first + count == p.chunks;
    const int64_t reads = count + ends;
    const float* n = p.n + row * tokens;
    const auto high = [=](int64_t b) {
      const int64_t place = high_slot(b) * HEIGHT * Cp, from = row * tokens * p.in + b * HEIGHT;
      for (int64_t i = 0; i < reads; ++i) {
        lay_out_transposed(p.x + from, p.in, reading(first + i), height(b), nullptr, Cp,
                           x + i * high_slots() * HEIGHT * Cp + place);
      }
      for (int64_t i = 0; i < count; ++i) {
        lay_out_transposed(p.a + from, p.in, {(first + i) * C, C}, height(b),
                           narrows() ? nullptr : n, Cp,
                           left + i * high_slots() * HEIGHT * Cp + place);
      }
    };
    const auto wide = [=](int64_t j) {
      const int64_t place = wide_slot(j) * WIDTH * Cp, from = row * tokens * p.out + j * WIDTH;
      for (int64_t i = 0; i < count; ++i) {
        lay_out(p.e + from, p.out, {(first + i) * C, C}, width(j), narrows() ? n : nullptr,
                right + i * wide_slots() * WIDTH * Cp + place);
      }
    };
    const auto through = [=](int64_t b, int64_t j) {
      const int64_t h = round_up(height(b), MR), w = round_up(width(j), W);
      const int64_t last = first + count;
      load_block(first ? p.W_end : p.W, b, j, block.W);
      load_block(first ? p.S_end : p.S, b, j, block.S);
      for (int64_t i = 0; i < reads; ++i) {
        const int64_t at = (i * high_slots() + high_slot(b)) * HEIGHT * Cp;
        const int64_t across = (i * wide_slots() + wide_slot(j)) * WIDTH * Cp;
        by_tokens(x + at, Cp, block.W, reading(first + i).count, w, h, b == 0, y + across);
        if (i < count) advance(first + i, left + at, right + across, h, w, block, block);
      }
      store_block(block.W, b, j, p.W_end);
      store_block(block.S, b, j, p.S_end);
      if (!ends && last % p.every == 0) {
        store_block(block.W, b, j, kept(last, 0));
        store_block(block.S, b, j, kept(last, 1));
      }
    };
    const auto answer = [=](int64_t j) {
      for (int64_t i = 0; i < reads; ++i) {
        const Span read = reading(first + i);
        const float* from = y + (i * wide_slots() + wide_slot(j)) * WIDTH * Cp;
        float* to = p.y + (row * tokens + read.first) * p.out + j * WIDTH;
        for (int64_t t = 0; t < read.count; ++t, from += WIDTH, to += p.out) {
          for (int64_t c = 0; c < width(j); c += W) {
            store_part(to + c, load(from + c), width(j) - c);
          }
        }
      }
    };
    walk(high, wide, through, [](int64_t) {}, answer);
  }
};

}  // namespace
