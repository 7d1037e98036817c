// One token per row of the kNN cache, as in decoding: its search of the ring of stored states, and
// its attention to what was found.
#include <cmath>

#include "../simd.h"

using namespace simd;

extern "C" {

enum Metric : int64_t { DOT, COSINE, L2 };

struct Find {
  // Threads; rows; slots of a row; those that were ever written; channels of a state; tokens of a
  // segment; hits; entries around a hit.
  int64_t threads, B, capacity, live, width, segment, metric, top_k, neighborhood;
  double grid;                       // steps per unit of a state in the search
  const float* z;                    // [B, width]
  const float* keys;                 // [B, capacity, width]
  const float *z_norms, *key_norms;  // [B]; [B, live]; with COSINE
  const int64_t* positions;          // [B, capacity]
  const int64_t* written;            // [B], entries since the row's last reset
  const int64_t* position;           // [B], of the tokens
  const float* pending;              // [B, segment, width]
  const int64_t* pending_positions;  // [B, segment]
  float* new_pending;
  int64_t* new_positions;
  float* entries;     // [B, top_k, neighborhood, width]
  float* similarity;  // [B, top_k, neighborhood]
  uint8_t* exists;    // likewise
};

struct Attend {
  // Threads; rows; heads; channels of a head; of a state; entries; those of a place in the
  // neighbourhood lie `neighborhood` apart, those of a token before `reads`.
  int64_t threads, B, H, D, width, count, neighborhood, reads;
  double scale;
  const float* q;                              // [B, H, D]
  const float *k_weight, *v_weight;            // [H, D, width]
  const float *log_temperature, *sink, *bias;  // [H]; [H]; [H, count / reads * neighborhood]
  const float* entries;                        // [B, count, width]
  const float* similarity;                     // [B, count]
  const uint8_t* exists;                       // [B, count]
  float* out;                                  // [B, H, D]
};
}

namespace {

constexpr float TINY = 1e-12f;     // the least norm that cosine divides by
constexpr float WHOLE = 4194304;   // nothing smaller is rounded by adding MAGIC and taking it away
constexpr float MAGIC = 12582912;

// States as whole numbers: divided by their norm or times the scale, in that order and with the
// roundings of torch's operations, so that calls of every length search the same numbers.
class Grid {
 public:
  explicit Grid(const Find& p)
      : steps_(static_cast<float>(p.grid)),
        scale_(static_cast<float>(std::pow(static_cast<double>(p.width), -0.5))),
        divides_(p.metric == COSINE) {}

  INLINE vec operator()(vec x, float norm) const {
    const vec y = (divides_ ? x / all(norm) : x * scale_) * steps_;
    const vec shifted = y + MAGIC, rounded = shifted - MAGIC;
    return choose((y < WHOLE) & (y > -WHOLE), rounded, y);
  }

 private:
  float steps_, scale_;
  bool divides_;
};

// The best so far, among equal ones those that came first.
struct Best {
  int64_t k;
  std::vector<float> scores;
  std::vector<int64_t> slots;

  explicit Best(int64_t k) : k(k) {
    scores.reserve(k + 1);
    slots.reserve(k + 1);
  }

  void add(float score, int64_t slot) {
    const bool full = static_cast<int64_t>(scores.size()) == k;
    if (score != score || (full && !(score > scores.back()))) return;
    const auto behind = std::upper_bound(scores.begin(), scores.end(), score,
                                         [](float x, float y) { return x > y; });
    slots.insert(slots.begin() + (behind - scores.begin()), slot);
    scores.insert(behind, score);
    if (full) {
      scores.pop_back();
      slots.pop_back();
    }
  }
};

float dot(const float* x, const float* y, int64_t width) {
  vec total = {};
  for (int64_t i = 0; i < width; i += W) {
    total += load_part(x + i, width - i) * load_part(y + i, width - i);
  }
  return sum(total);
}

// out[i] = rows[i] . x; `out` has room for a multiple of W.
void products(const float* rows, int64_t count, int64_t width, const float* x, float* out) {
  for (int64_t s = 0; s < count; s += W) {
    vec partial[W] = {};
    for (int64_t r = 0; r < std::min<int64_t>(W, count - s); ++r) {
      const float* row = rows + (s + r) * width;
      for (int64_t i = 0; i < width; i += W) {
        partial[r] += load_part(x + i, width - i) * load_part(row + i, width - i);
      }
    }
    sums(partial, W, out + s);
  }
}

// Whether what waits are the tokens of the unfinished segment, the last one on the right, and the
// token does not complete it.
bool continues(const Find& p, int64_t b) {
  const int64_t at = p.position[b];
  if (at < 0 || at % p.segment == p.segment - 1) return false;
  for (int64_t i = 0; i < p.segment; ++i) {
    const int64_t expected = at - p.segment + i;
    const bool waits = expected >= at - at % p.segment;
    if (p.pending_positions[b * p.segment + i] != (waits ? expected : -1)) return false;
  }
  return true;
}

class Row {
 public:
  Row(const Find& p, int64_t b)
      : p_(p),
        z_(p.z + b * p.width),
        keys_(p.keys + b * p.capacity * p.width),
        norms_(p.key_norms + b * p.live),
        positions_(p.positions + b * p.capacity),
        written_(p.written[b]),
        last_(p.position[b] / p.segment * p.segment),
        first_(std::max<int64_t>(last_ - p.capacity, 0)),
        best_(p.top_k) {}

  void find(int64_t b) {
    search(p_.metric == COSINE ? p_.z_norms[b] : 1);
    const int64_t reads = p_.top_k * p_.neighborhood;
    float* entries = p_.entries + b * reads * p_.width;
    float* similarity = p_.similarity + b * reads;
    uint8_t* exists = p_.exists + b * reads;
    const int64_t before = (p_.neighborhood - 1) / 2;
    const float square = dot(z_, z_, p_.width);
    for (int64_t hit = 0; hit < p_.top_k; ++hit) {
      const int64_t slot = hit < static_cast<int64_t>(best_.slots.size()) ? best_.slots[hit] : -1;
      const float score = slot < 0 ? 0 : compare(slot, square);
      for (int64_t n = 0; n < p_.neighborhood; ++n, entries += p_.width) {
        const int64_t near = slot < 0 ? -1 : neighbor(slot, n - before);
        *similarity++ = score;
        *exists++ = near >= 0;
        if (near >= 0) {
          std::memcpy(entries, keys_ + near * p_.width, sizeof(float) * p_.width);
        } else {
          std::fill(entries, entries + p_.width, 0.0f);
        }
      }
    }
  }

 private:
  const Find& p_;
  const float *z_, *keys_, *norms_;
  const int64_t* positions_;
  int64_t written_, last_, first_;  // the token sees the positions first <= p < last
  Best best_;

  bool sees(int64_t slot) const {
    return slot < written_ && positions_[slot] >= first_ && positions_[slot] < last_;
  }

  // From the oldest entry on, round the ring.
  void search(float norm) {
    const Grid grid(p_);
    std::vector<float> query(round_up(p_.width, W));
    const bool l2 = p_.metric == L2;
    for (int64_t i = 0; i < p_.width; i += W) {
      const vec x = grid(load_part(z_ + i, p_.width - i), std::max(norm, TINY));
      store(query.data() + i, l2 ? x + x : x);
    }
    const int64_t start = written_ > p_.capacity ? written_ % p_.capacity : 0;
    for (int64_t s = start; s < p_.live; s += W) score(grid, query, s, p_.live);
    for (int64_t s = 0; s < start; s += W) score(grid, query, s, start);
  }

  // The slots from `begin` on, W of them or up to `end`.
  void score(const Grid& grid, const std::vector<float>& query, int64_t begin, int64_t end) {
    const int64_t count = std::min<int64_t>(W, end - begin);
    vec partial[W] = {};
    uint32_t seen = 0;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t slot = begin + r;
      if (!sees(slot)) continue;
      seen |= 1u << r;
      const float* key = keys_ + slot * p_.width;
      const float norm = p_.metric == COSINE ? std::max(norms_[slot], TINY) : 1;
      const bool l2 = p_.metric == L2;
      for (int64_t i = 0; i < p_.width; i += W) {
        const vec x = grid(load_part(key + i, p_.width - i), norm), y = load(query.data() + i);
        partial[r] += x * (l2 ? y - x : y);  // 2 q.k - k.k
      }
    }
    if (seen == 0) return;
    float scores[W];
    sums(partial, W, scores);
    for (; seen; seen &= seen - 1) {
      const int r = __builtin_ctz(seen);
      best_.add(scores[r], begin + r);
    }
  }

  // The slot of the entry that comes `offset` positions after that of a hit, or -1.
  int64_t neighbor(int64_t hit, int64_t offset) const {
    const int64_t slot = ((hit + offset) % p_.live + p_.live) % p_.live;
    return sees(slot) && positions_[slot] == positions_[hit] + offset ? slot : -1;
  }

  // On the scale of a cosine for every metric.
  float compare(int64_t slot, float square) const {
    const float* key = keys_ + slot * p_.width;
    const float score = dot(z_, key, p_.width);
    if (p_.metric == DOT) return score / p_.width;
    const float size = dot(key, key, p_.width);
    if (p_.metric == L2) return (2 * score - size) / p_.width;
    return score / std::sqrt(std::max(size * square, 1e-24f));
  }
};

void move_on(const Find& p, int64_t b) {
  const int64_t kept = p.segment - 1, first = b * p.segment;
  float* pending = p.new_pending + first * p.width;
  std::memcpy(pending, p.pending + (first + 1) * p.width, sizeof(float) * kept * p.width);
  std::memcpy(pending + kept * p.width, p.z + b * p.width, sizeof(float) * p.width);
  std::memcpy(p.new_positions + first, p.pending_positions + first + 1, sizeof(int64_t) * kept);
  p.new_positions[first + kept] = p.position[b];
}

void attend(const Attend& p, int64_t b, int64_t h) {
  const int64_t wide = round_up(p.width, W), padded = round_up(p.count, W);
  float* query = workspace(2 * wide + padded + round_up(p.D, W));
  float *mean = query + wide, *logits = mean + wide, *out = logits + padded;
  const float* q = p.q + (b * p.H + h) * p.D;
  const float* k_weight = p.k_weight + h * p.D * p.width;
  const float* entries = p.entries + b * p.count * p.width;
  std::fill(query, query + 2 * wide, 0.0f);
  for (int64_t d = 0; d < p.D; ++d, k_weight += p.width) {
    const float x = q[d] * static_cast<float>(p.scale);
    for (int64_t i = 0; i < p.width; ++i) query[i] += x * k_weight[i];
  }
  products(entries, p.count, p.width, query, logits);
  const float temperature = std::exp(p.log_temperature[h]), sink = p.sink[h];
  const float* bias = p.bias + h * (p.count / p.reads * p.neighborhood);
  float top = sink;
  for (int64_t j = 0; j < padded; ++j) {
    if (j < p.count && p.exists[b * p.count + j]) {
      logits[j] += temperature * p.similarity[b * p.count + j] +
                   bias[j / p.reads * p.neighborhood + j % p.neighborhood];
      top = logits[j] > top ? logits[j] : top;
    } else {
      logits[j] = -INFINITY;
    }
  }
  float total = exp(all(sink - top))[0];
  for (int64_t j = 0; j < padded; j += W) {
    const vec x = exp(load(logits + j) - top);
    store(logits + j, x);
    total += sum(x);
  }
  for (int64_t j = 0; j < p.count; ++j, entries += p.width) {
    const float weight = logits[j] / total;
    for (int64_t i = 0; i < p.width; ++i) mean[i] += weight * entries[i];
  }
  products(p.v_weight + h * p.D * p.width, p.D, p.width, mean, out);
  std::memcpy(p.out + (b * p.H + h) * p.D, out, sizeof(float) * p.D);
}

}  // namespace

// 0: memory ran out; -1: a row's segment completes, or what waits is not known; 1: done.
extern "C" int memlm_find(const Find* p) {
  for (int64_t b = 0; b < p->B; ++b) {
    if (!continues(*p, b)) return -1;
  }
  return parallel(p->B, p->threads, [p](int64_t b) {
    move_on(*p, b);
    Row(*p, b).find(b);
  });
}

// 0 where memory ran out.
extern "C" int memlm_attend(const Attend* p) {
  return parallel(p->B * p->H, p->threads, [p](int64_t i) { attend(*p, i / p->H, i % p->H); });
}
