// Some queries of a row against some keys of its store.
#pragma once

#include "native_bytes.h"
#include "native_candidates.h"

constexpr int64_t FEW = FILTER ? 16 : 8;  // fewer queries than this are taken one by one
constexpr int64_t MOST = 512;             // queries at a time
constexpr int64_t CACHE = 1 << 17;        // floats of queries that stay in a core's cache
constexpr int64_t LISTS = 1 << 22;        // floats of their candidates
constexpr int64_t LOOK = 16 * BLOCK;      // keys after which the filter's use is looked at
constexpr int64_t PASSING = 8;            // it has none where more than one pair in so many passes

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

// first + the places of the bits that are set, in order; up to W numbers are written. Returns how
// many there are.
inline int64_t put_places(uint32_t found, int32_t first, int32_t* out) {
#if defined(__AVX512F__)
  const __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  _mm512_storeu_si512(
      out, _mm512_maskz_compress_epi32(found, _mm512_add_epi32(places, _mm512_set1_epi32(first))));
#else
  for (uint32_t left = found; left; left &= left - 1) *out++ = first + __builtin_ctz(left);
#endif
  return __builtin_popcount(found);
}

// The sum of a vector's numbers, halves first, and below that of W vectors in the same order.
template <int S = W / 2>
INLINE float sum_halves(vec x) {
  x += exchange_high<S>(x, x, std::make_integer_sequence<int, W>());
  if constexpr (S > 1) return sum_halves<S / 2>(x);
  return x[0];
}

INLINE vec sums_of_halves(vec (&x)[W]) {
  transpose(x);
  UNROLL for (int half = W / 2; half > 0; half /= 2) {
    UNROLL for (int i = 0; i < half; ++i) x[i] += x[i + half];
  }
  return x[0];
}

class Scan {
 public:
  // Floats of memory that a scan of some queries takes.
  static int64_t floats(const Search& p, int64_t queries, int64_t k) {
    const int64_t places = round_up(queries, W);
    return packed_floats(p, queries) + round_up(Keys::floats(p.width), 16) +
           round_up(ByteKeys::floats(p.width), 16) + round_up(Candidates::floats(places, k), 16);
  }

  // `memory` is aligned to 64 bytes.
  Scan(const Search& p, int64_t k, int64_t row, int64_t begin, int64_t queries, float* memory)
      : Scan(p, k, row, begin, queries, memory, memory + packed_floats(p, queries)) {}

  // Take the keys [begin, end); later calls come with later keys.
  void scan(int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at += BLOCK) {
      if (!keys_.read(at, std::min(BLOCK, end - at), window_)) continue;
      if (filter_ && at >= filter_from_ && byte_keys_.read(keys_, p_.width)) {
        for_panels(queries_, [&](auto n, int64_t q) { filter_panel<n.value>(q, at); });
        look_at_filter(at + BLOCK, begin);
      } else if (FILTER || queries_ < FEW) {
        each_with_each(at);
      } else if (keys_.plain()) {
        for_panels(queries_, [&](auto n, int64_t q) { scan_panel<n.value, false>(q, at); });
      } else {
        for_panels(queries_, [&](auto n, int64_t q) { scan_panel<n.value, true>(q, at); });
      }
    }
  }

  // The k best of a query, packed, best first, then zeros; valid until the next scan begins.
  const uint64_t* finish(int64_t query) { return best_.finish(query); }

 private:
  const Search& p_;
  int64_t queries_;
  const float* rows_;  // of the queries
  float* packed_;      // without the filter, a panel's queries side by side
  ByteQueries byte_queries_;
  Keys keys_;
  ByteKeys byte_keys_;
  Candidates best_;
  const int64_t *first_ = nullptr, *last_ = nullptr;
  std::vector<Window> windows_;  // of each W queries
  Window window_;                // of all
  bool filter_ = false;
  int64_t filter_from_ = 0, looked_ = 0, passed_ = 0;

  static int64_t packed_floats(const Search& p, int64_t queries) {
    const int64_t floats = FILTER ? ByteQueries::floats(queries, p.width)
                                  : round_up(queries, W) * round_up(p.width, W);
    return round_up(floats, 16);
  }

  Scan(const Search& p, int64_t k, int64_t row, int64_t begin, int64_t queries, float* packed,
       float* rest)
      : p_(p),
        queries_(queries),
        rows_(p.queries + (row * p.tokens + begin) * p.width),
        packed_(packed),
        byte_queries_(queries, p.width, packed),
        keys_(p, row, rest),
        byte_keys_(p.width, rest + round_up(Keys::floats(p.width), 16)),
        best_(queries, round_up(queries, W), k,
              rest + round_up(Keys::floats(p.width), 16) +
                  round_up(ByteKeys::floats(p.width), 16)) {
    if (queries >= FEW) {
      if constexpr (FILTER) {
        filter_ = byte_queries_.read(rows_, queries, p.width);
      } else {
        pack_queries();
      }
    }
    if (p.positions) {
      first_ = p.first + row * p.tokens + begin;
      last_ = p.last + row * p.tokens + begin;
      windows_.resize(round_up(queries, W) / W);
      for (int64_t q = 0; q < queries; ++q) {
        windows_[q / W].add(first_[q], last_[q]);
        window_.add(first_[q], last_[q]);
      }
    }
  }

  void pack_queries() {
    std::fill(packed_, packed_ + round_up(queries_, W) * round_up(p_.width, W), 0.0f);
    for_panels(queries_, [&](auto n, int64_t query) {
      constexpr int64_t wide = n.value * W;
      float* panel = packed_ + query * round_up(p_.width, W);
      for (int64_t i = 0; i < std::min(wide, queries_ - query); ++i) {
        const float* from = rows_ + (query + i) * p_.width;
        for (int64_t d = 0; d < p_.width; ++d) panel[d * wide + i] = from[d];
      }
    });
  }

  // Whether a panel's queries see any of the keys.
  template <int N>
  bool sees_any(int64_t query) const {
    if (p_.positions == nullptr) return true;
    Window window = windows_[query / W];
    for (int n = 1; n < N; ++n) window.add(windows_[query / W + n]);
    return !window.sees_none_of(keys_.positions());
  }

  bool sees(int64_t query, int64_t key) const {
    if (p_.positions == nullptr) return true;
    const int64_t at = keys_.position(key);
    return at >= first_[query] && at < last_[query];
  }

  template <int N, bool WEIGHED>
  void scan_panel(int64_t query, int64_t begin) {
    if (!sees_any<N>(query)) return;
    const float* panel = packed_ + query * round_up(p_.width, W);
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
          if (sees(at + lane, key + r)) best_.add(at + lane, row[lane], key + r);
        }
      }
    }
  }

  // Least filtered numbers, in units of W queries' steps, with which a score may exceed their
  // thresholds.
  INLINE vec floors(int64_t query, float size, float error) const {
    vec least = load(best_.thresholds() + query) * load(byte_queries_.inverses + query);
    least -= ROUNDING * choose(least < 0, -least, least);
    return least - load(byte_queries_.norms + query) * error -
           load(byte_queries_.errors + query) * size;
  }

  template <int N>
  void filter_panel(int64_t query, int64_t begin) {
    if (!sees_any<N>(query)) return;
    const uint8_t* panel = byte_queries_.panel(query);
    const ByteKeys& keys = byte_keys_;
    for (int64_t i = 0; i < keys_.count(); i += MR) {
      ByteTile<N> tile;
      tile.multiply(keys.bytes() + i * keys.stride(), keys.stride(), keys.starts + i, panel,
                    p_.width);
      ivec above = {};
      UNROLL for (int n = 0; n < N; ++n) {
        const vec least =
            floors(query + n * W, keys.group_sizes[i / MR], keys.group_errors[i / MR]);
        const vec inverse = load(byte_queries_.inverses + query + n * W);
        vec most = least;
        UNROLL for (int r = 0; r < MR; ++r) {
          const vec y = __builtin_convertvector(tile.x[r][n], vec) * keys.steps[i + r] +
                        inverse * keys.offsets[i + r];
          most = y > most ? y : most;
        }
        above |= most > least;
      }
      if (bits(above)) {
        alignas(64) int32_t products[MR * N * W];
        std::memcpy(products, tile.x, sizeof products);
        score_passed<N>(products, query, begin, i);
      }
    }
  }

  // Scores the pairs of a tile that pass. Three loops: what one of them branches on is not known
  // before the one ahead of it is done.
  template <int N>
  __attribute__((noinline)) void score_passed(const int32_t* products, int64_t query, int64_t begin,
                                              int64_t i) {
    int32_t passed[MR * N * W + W];  // r N W + the number of the query in the panel
    float scores[MR * N * W];
    int64_t count = 0;
    for (int r = 0; r < MR; ++r) {
      const float step = byte_keys_.steps[i + r], offset = byte_keys_.offsets[i + r];
      for (int n = 0; n < N; ++n) {
        const int64_t at = query + n * W;
        ivec x;
        std::memcpy(&x, products + (r * N + n) * W, sizeof x);
        const vec y = __builtin_convertvector(x, vec) * step +
                      load(byte_queries_.inverses + at) * offset;
        const vec least = floors(at, byte_keys_.sizes[i + r], byte_keys_.errors[i + r]);
        count += put_places(bits(y > least), (r * N + n) * W, passed + count);
      }
    }
    if (p_.positions) {
      int64_t seen = 0;
      for (int64_t j = 0; j < count; ++j) {
        const int32_t pair = passed[j];
        passed[seen] = pair;
        seen += sees(query + pair % (N * W), begin + i + pair / (N * W));
      }
      count = seen;
    }
    for (int64_t j = 0; j < count; ++j) {
      scores[j] = score(query + passed[j] % (N * W), i + passed[j] / (N * W));
    }
    for (int64_t j = 0; j < count; ++j) {
      const int64_t q = query + passed[j] % (N * W);
      if (scores[j] > best_.thresholds()[q]) {
        best_.add(q, scores[j], begin + i + passed[j] / (N * W));
      }
    }
    passed_ += count;
  }

  // Where many pairs pass, the filter is left out for a while. `at`: keys up to it are done.
  void look_at_filter(int64_t at, int64_t begin) {
    if ((at - begin) % LOOK) return;
    if (at - begin > LOOK && (passed_ - looked_) * PASSING > LOOK * queries_) {
      filter_from_ = at + 7 * LOOK;
    }
    looked_ = passed_;
  }

  // The score of one query and the key i of the block.
  float score(int64_t query, int64_t i) const {
    const float *x = rows_ + query * p_.width, *y = keys_.rows() + i * keys_.stride();
    vec total = {};
    int64_t d = 0;
    for (; d + W <= p_.width; d += W) total += load(x + d) * load(y + d);
    if (d < p_.width) total += load_part(x + d, p_.width - d) * load_part(y + d, p_.width - d);
    return sum_halves(total) * keys_.factors()[i] + keys_.offsets()[i];
  }

  // The same scores of all queries and keys of the block.
  void each_with_each(int64_t begin) {
    const int64_t stride = keys_.stride();
    for (int64_t i = 0; i < keys_.count(); i += W) {
      const float* rows = keys_.rows() + i * stride;
      for (int64_t q = 0; q < queries_; ++q) {
        const float* x = rows_ + q * p_.width;
        vec total[W] = {};
        int64_t d = 0;
        for (; d + W <= p_.width; d += W) {
          UNROLL for (int r = 0; r < W; ++r) total[r] += load(x + d) * load(rows + r * stride + d);
        }
        if (d < p_.width) {
          const vec part = load_part(x + d, p_.width - d);
          for (int r = 0; r < W; ++r) {
            total[r] += part * load_part(rows + r * stride + d, p_.width - d);
          }
        }
        const vec y =
            sums_of_halves(total) * load(keys_.factors() + i) + load(keys_.offsets() + i);
        uint32_t found = bits(y > all(best_.thresholds()[q]));
        for (; found; found &= found - 1) {
          const int lane = __builtin_ctz(found);
          if (sees(q, begin + i + lane)) best_.add(q, y[lane], begin + i + lane);
        }
      }
    }
  }
};
