// Some queries of a row against some keys of its store.
#pragma once

#include "native_candidates.h"
#include "native_keys.h"

constexpr int64_t FEW = 8;  // fewer queries than this are taken one by one
constexpr int64_t MOST = 512;  // queries at a time
constexpr int64_t CACHE = 1 << 17;  // floats of queries that stay in a core's cache
constexpr int64_t LISTS = 1 << 22;  // floats of their candidates

// Queries to take at a time: whole panels.
inline int64_t queries_at_a_time(const Search& p, int64_t k) {
  const int64_t most =
      std::min(CACHE / std::max<int64_t>(p.width, 1), LISTS / Candidates::floats(1, k));
  return std::max<int64_t>(std::min(most, MOST) / (NV * W), 1) * (NV * W);
}

// One bit for each number of a comparison's result.
inline uint32_t bits(ivec condition) {
#if defined(__AVX512F__)
  return _mm512_cmplt_epi32_mask(__m512i(condition), _mm512_setzero_si512());
#elif defined(__AVX__)
  return _mm256_movemask_ps(_mm256_castsi256_ps(__m256i(condition)));
#elif defined(__SSE__)
  return _mm_movemask_ps(_mm_castsi128_ps(__m128i(condition)));
#else
  uint32_t found = 0;
  for (int i = 0; i < W; ++i) found |= uint32_t(condition[i] & 1) << i;
  return found;
#endif
}

class Scan {
 public:
  // Floats of memory that a scan of some queries takes.
  static int64_t floats(const Search& p, int64_t queries, int64_t k) {
    const int64_t places = round_up(queries, W);
    return round_up(places * round_up(p.width, W), 16) + round_up(Keys::floats(p.width), 16) +
           round_up(Candidates::floats(places, k), 16);
  }

  // `memory` is aligned to 64 bytes.
  Scan(const Search& p, int64_t k, int64_t row, int64_t begin, int64_t queries, float* memory)
      : p_(p),
        queries_(queries),
        few_(queries < FEW),
        length_(round_up(p.width, W)),
        packed_(memory),
        keys_(p, row, memory + round_up(round_up(queries, W) * length_, 16)),
        best_(queries, round_up(queries, W), k,
              memory + round_up(round_up(queries, W) * length_, 16) +
                  round_up(Keys::floats(p.width), 16)) {
    const int64_t at = row * p.tokens + begin;
    pack_queries(p.queries + at * p.width);
    if (p.positions) {
      first_ = p.first + at;
      last_ = p.last + at;
      windows_.resize(round_up(queries, W) / W);
      for (int64_t q = 0; q < queries; ++q) {
        windows_[q / W].add(first_[q], last_[q]);
        window_.add(first_[q], last_[q]);
      }
    }
  }

  // Take the keys [begin, end); later calls come with later keys.
  void scan(int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at += BLOCK) {
      if (!keys_.read(at, std::min(BLOCK, end - at), window_)) continue;
      if (few_) {
        keys_.plain() ? scan_few<false>(at) : scan_few<true>(at);
      } else {
        for_panels(queries_, [&](auto n, int64_t query) {
          keys_.plain() ? scan_panel<n.value, false>(query, at)
                        : scan_panel<n.value, true>(query, at);
        });
      }
    }
  }

  // The k best of a query, packed, best first, then zeros; valid until the next scan begins.
  const uint64_t* finish(int64_t query) { return best_.finish(query); }

 private:
  const Search& p_;
  int64_t queries_;
  bool few_;
  int64_t length_;
  float* packed_;  // a panel's queries side by side, or rows of `length_`
  Keys keys_;
  Candidates best_;
  const int64_t *first_ = nullptr, *last_ = nullptr;
  std::vector<Window> windows_;  // of each W queries
  Window window_;                // of all

  void pack_queries(const float* queries) {
    std::fill(packed_, packed_ + round_up(queries_, W) * length_, 0.0f);
    if (few_) {
      for (int64_t q = 0; q < queries_; ++q) {
        std::copy(queries + q * p_.width, queries + (q + 1) * p_.width, packed_ + q * length_);
      }
      return;
    }
    for_panels(queries_, [&](auto n, int64_t query) {
      constexpr int64_t wide = n.value * W;
      float* panel = packed_ + query * length_;
      for (int64_t i = 0; i < std::min(wide, queries_ - query); ++i) {
        const float* from = queries + (query + i) * p_.width;
        for (int64_t d = 0; d < p_.width; ++d) panel[d * wide + i] = from[d];
      }
    });
  }

  void add(int64_t query, float score, int64_t key) {
    if (p_.positions) {
      const int64_t at = keys_.position(key);
      if (at < first_[query] || at >= last_[query]) return;
    }
    best_.add(query, score, key);
  }

  template <int N, bool WEIGHED>
  void scan_panel(int64_t query, int64_t begin) {
    if (p_.positions) {
      Window window = windows_[query / W];
      for (int n = 1; n < N; ++n) window.add(windows_[query / W + n]);
      if (window.sees_none_of(keys_.positions())) return;
    }
    const float* panel = packed_ + query * length_;
    const float* thresholds = best_.thresholds() + query;
    for (int64_t i = 0; i < keys_.count(); i += MR) {
      Tile<N> tile;
      tile.template add<false>(keys_.rows() + i * keys_.stride(), keys_.stride(), panel, N * W,
                               p_.width);
      if constexpr (WEIGHED) {
        const float *factors = keys_.factors() + i, *offsets = keys_.offsets() + i;
        tile.map([=](int r, int, vec y) INLINE_LAMBDA { return y * factors[r] + offsets[r]; });
      }
      ivec above = {};
      UNROLL for (int n = 0; n < N; ++n) {
        const vec least = load(thresholds + n * W);
        vec most = least;  // and not the first row, which may be NaN
        UNROLL for (int r = 0; r < MR; ++r) most = tile.x[r][n] > most ? tile.x[r][n] : most;
        above |= most > least;
      }
      if (bits(above)) {
        alignas(64) float scores[MR * N * W];
        tile.put(scores, N * W);
        collect<N>(scores, query, begin + i);
      }
    }
  }

  // scores[r, q] of keys from `key` on for queries from `query` on.
  template <int N>
  __attribute__((noinline)) void collect(const float* scores, int64_t query, int64_t key) {
    for (int r = 0; r < MR; ++r) {
      for (int n = 0; n < N; ++n) {
        const float* row = scores + (r * N + n) * W;
        const int64_t at = query + n * W;
        uint32_t found = bits(load(row) > load(best_.thresholds() + at));
        for (; found; found &= found - 1) {
          const int lane = __builtin_ctz(found);
          add(at + lane, row[lane], key + r);
        }
      }
    }
  }

  template <bool WEIGHED>
  void scan_few(int64_t begin) {
    for (int64_t i = 0; i < keys_.count(); i += W) {
      const float* rows = keys_.rows() + i * keys_.stride();
      for (int64_t q = 0; q < queries_; ++q) {
        const float* query = packed_ + q * length_;
        vec total[W] = {};
        int64_t d = 0;
        for (; d + W <= p_.width; d += W) {
          const vec x = load(query + d);
          UNROLL for (int r = 0; r < W; ++r) total[r] += x * load(rows + r * keys_.stride() + d);
        }
        if (d < p_.width) {
          const vec x = load(query + d);
          for (int r = 0; r < W; ++r) {
            total[r] += x * load_part(rows + r * keys_.stride() + d, p_.width - d);
          }
        }
        alignas(64) float scores[W];
        sums(total, W, scores);
        vec y = load(scores);
        if constexpr (WEIGHED) y = y * load(keys_.factors() + i) + load(keys_.offsets() + i);
        uint32_t found = bits(y > all(best_.thresholds()[q]));
        for (; found; found &= found - 1) {
          const int lane = __builtin_ctz(found);
          add(q, y[lane], begin + i + lane);
        }
      }
    }
  }
};
