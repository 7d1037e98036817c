// The k best visible keys of every query, exactly, in float32.
//
// Queries lie side by side in the lanes of vectors. The products of a few keys with a panel of
// queries stay in registers; only where one of them beats the k-th best of its query so far it is
// written down as a candidate. No score matrix exists, not even a block of one.
#include <numeric>

#include "native_scan.h"

// One list of results of a query, packed, best first.
inline void write_out(const Search& p, int64_t query, const uint64_t* list, int64_t k) {
  for (int64_t i = 0; i < p.k; ++i) {
    const uint64_t packed = i < k ? list[i] : 0;
    p.scores[query * p.k + i] = packed ? score_of(packed) : -INFINITY;
    p.indices[query * p.k + i] = packed ? index_of(packed) : -1;
  }
}

// Blocks of queries, each with a part of the keys, are shared out among the threads.
inline bool search(const Search& p) {
  const int64_t queries = p.batch * p.tokens, k = std::min(p.k, p.stored);
  if (queries == 0 || k == 0) {
    for (int64_t q = 0; q < queries; ++q) write_out(p, q, nullptr, 0);
    return true;
  }
  const int64_t size = std::min(queries_at_a_time(p, k), p.tokens);
  const int64_t blocks = (p.tokens + size - 1) / size, jobs = p.batch * blocks;
  // Keys are cut only where there are too few blocks of queries to share evenly.
  const bool enough = jobs >= 4 * p.threads;
  const int64_t parts = enough ? 1 : p.threads / std::gcd(jobs, p.threads);
  const int64_t units = jobs * parts, tasks = std::min(p.threads, units);
  const int64_t scratch = Scan::floats(p, size, k), partial = parts > 1 ? 2 * size * k : 0;
  float* memory = workspace(tasks * scratch + units * partial);
  const auto partial_of = [=](int64_t unit) {
    return reinterpret_cast<uint64_t*>(memory + tasks * scratch + unit * partial);
  };
  const auto begin_of = [=](int64_t part) {
    return part == parts ? p.stored : p.stored * part / parts / BLOCK * BLOCK;
  };
  const auto run = [&](int64_t task) {
    for (int64_t unit = units * task / tasks; unit < units * (task + 1) / tasks; ++unit) {
      const int64_t job = unit / parts, part = unit % parts, row = job / blocks;
      const int64_t first = job % blocks * size, count = std::min(size, p.tokens - first);
      Scan scan(p, k, row, first, count, memory + task * scratch);
      scan.scan(begin_of(part), begin_of(part + 1));
      for (int64_t q = 0; q < count; ++q) {
        const uint64_t* list = scan.finish(q);
        if (parts > 1) {
          std::copy(list, list + k, partial_of(unit) + q * k);
        } else {
          write_out(p, row * p.tokens + first + q, list, k);
        }
      }
    }
  };
  if (!parallel(tasks, p.threads, run)) return false;
  if (parts == 1) return true;
  std::vector<uint64_t> merged(parts * k);
  for (int64_t query = 0; query < queries; ++query) {
    const int64_t row = query / p.tokens, token = query % p.tokens;
    const int64_t unit = (row * blocks + token / size) * parts;
    for (int64_t part = 0; part < parts; ++part) {
      const uint64_t* list = partial_of(unit + part) + token % size * k;
      std::copy(list, list + k, merged.begin() + part * k);
    }
    std::partial_sort(merged.begin(), merged.begin() + k, merged.end(), std::greater<uint64_t>());
    write_out(p, query, merged.data(), k);
  }
  return true;
}

extern "C" {

// Returns 0 where memory ran out.
int memlm_search(const Search* p) {
  try {
    return search(*p);
  } catch (const std::bad_alloc&) {
    return 0;
  }
}
}
