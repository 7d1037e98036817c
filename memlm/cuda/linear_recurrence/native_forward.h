// The forward pass: see native.cpp for the formulas.
#pragma once

#include "native_chunks.h"

namespace {

struct Forward : Buffers {
  float *q, *k, *kT, *gamma, *P, *A, *V_new, *V_end, *S;

  Forward(const Problem& p) : Buffers(p) {
    place({{&q, C * ldk}, {&k, C * ldk}, {&kT, K * ldc}, {&gamma, C * ldc}, {&P, C * ldc},
           {&A, C * ldc}, {&V_new, C * ldv}, {&V_end, C * ldv}, {&S, K * ldv}});
  }
};

// States a step reads and writes, which may be one: rows of V numbers, ld* apart.
struct States {
  const float* before;
  int64_t ldb;
  float* after;
  int64_t lda;
};

// One token: the recurrence as it is written, in one pass that reads the state and one that writes.
void step(const Problem& p, const Sequence& s, int64_t begin, int64_t head, const Gates& gates,
          const Forward& b, const States& S) {
  const int64_t token = s.row * p.T + s.first + begin, V = p.V;
  const float *q = b.q, *k = b.k, decay = gates.since_start[0], scale = static_cast<float>(p.scale);
  const float* v = p.v + s.row * p.sv.row + (s.first + begin) * p.sv.token + head * p.sv.head;
  float* o = p.o + (token * p.HV + head) * V;
  float* errors = p.errors ? p.errors + (token * p.HV + head) * V : nullptr;
  vec qk = {};
  for (int64_t c = 0; c < b.K; c += W) qk += load(q + c) * load(k + c);
  const float own = sum(qk);
  const auto columns = [=, &gates, &p](auto size, int64_t j) {
    vec held[size] = {}, read[size] = {};
    for (int64_t c = 0; c < p.K; ++c) {
      for (int m = 0; m < size; ++m) {
        const int64_t place = j + m * W;
        const vec x = load_part(S.before + c * S.ldb + place, V - place);
        held[m] += k[c] * x;
        read[m] += q[c] * x;
      }
    }
    for (int m = 0; m < size; ++m) {
      const int64_t place = j + m * W;
      vec x = load_part(v + place, V - place);
      if (p.beta) {
        x -= decay * held[m];
        if (errors) store_part(errors + place, x, V - place);
        x *= gates.beta[0];
      }
      store_part(o + place, scale * (decay * read[m] + own * x), V - place);
      held[m] = x;
    }
    for (int64_t c = 0; c < p.K; ++c) {
      for (int m = 0; m < size; ++m) {
        const int64_t place = j + m * W;
        const vec x = load_part(S.before + c * S.ldb + place, V - place);
        store_part(S.after + c * S.lda + place, decay * x + k[c] * held[m], V - place);
      }
    }
  };
  int64_t j = 0;
  for (; j + 4 * W <= V; j += 4 * W) columns(constant<4>(), j);
  for (; j < V; j += W) columns(constant<1>(), j);
}

// Solve for the errors of MR rows in registers, from the values less what the state and earlier
// rows hold; A is their block on the diagonal.
template <int N>
INLINE void substitute(Tile<N>& tile, const float* A, int64_t lda, const float* beta) {
  UNROLL for (int r = 0; r < MR; ++r) {
    UNROLL for (int m = 0; m < N; ++m) {
      const vec written = beta[r] * tile.x[r][m];
      UNROLL for (int u = r + 1; u < MR; ++u) tile.x[u][m] -= A[u * lda + r] * written;
    }
  }
}

template <bool DELTA>
void forward_chunk(const Problem& p, const Sequence& s, int64_t begin, int64_t n, int64_t rows,
                   int64_t head, const Gates& gates, const Forward& buffers) {
  const Forward b = buffers;
  const int64_t ldk = b.ldk, ldc = b.ldc, ldv = b.ldv, K = p.K, V = p.V;
  const int64_t token = s.row * p.T + s.first + begin, ldo = p.HV * V, ldi = p.sv.token;
  const float* v = p.v + s.row * p.sv.row + (s.first + begin) * ldi + head * p.sv.head;
  float* o = p.o + (token * p.HV + head) * V;
  float* errors = p.errors ? p.errors + (token * p.HV + head) * V : nullptr;
  const float scale = static_cast<float>(p.scale);
  transpose(b.k, ldk, rows, K, b.kT, ldc);
  gates.between(rows, b.gamma, ldc);
  decayed_products(b.q, ldk, b.kT, b.gamma, ldc, rows, K, b.P);
  if (DELTA) decayed_products(b.k, ldk, b.kT, b.gamma, ldc, rows, K, b.A);
  for_panels(V, [=, &gates](auto size, int64_t j) {
    for (int64_t i = 0; i < rows; i += MR) {
      Tile<size> tile;
      if (DELTA) {
        tile.template add<false>(b.k + i * ldk, ldk, b.S + j, ldv, K);
        tile.scale(gates.since_start + i);
        tile.template add<false>(b.A + i * ldc, ldc, b.V_new + j, ldv, i);
      }
      tile.map_with(v + i * ldi + j, ldi, n - i, V - j,
                    [](int, vec value, vec held) INLINE_LAMBDA { return value - held; });
      if (DELTA) {
        substitute(tile, b.A + i * ldc + i, ldc, gates.beta + i);
        if (errors) tile.write(errors + i * ldo + j, ldo, n - i, V - j);
        tile.scale(gates.beta + i);
      }
      tile.put(b.V_new + i * ldv + j, ldv);
      tile.scale(gates.to_end + i);
      tile.put(b.V_end + i * ldv + j, ldv);
    }
    for (int64_t i = 0; i < rows; i += MR) {
      Tile<size> tile;
      tile.template add<false>(b.q + i * ldk, ldk, b.S + j, ldv, K);
      tile.scale(gates.since_start + i);
      tile.template add<false>(b.P + i * ldc, ldc, b.V_new + j, ldv, i + MR);
      tile.map([=](int, int, vec x) INLINE_LAMBDA { return scale * x; });
      tile.write(o + i * ldo + j, ldo, n - i, V - j);
    }
    for (int64_t c = 0; c < K; c += MR) {
      Tile<size> tile;
      tile.template add<true>(b.k + c, ldk, b.V_end + j, ldv, rows);
      float* S = b.S + c * ldv + j;
      const float whole = gates.whole;
      tile.map([=](int r, int m, vec x) INLINE_LAMBDA {
        return whole * load(S + r * ldv + m * W) + x;
      });
      tile.put(S, ldv);
    }
  });
}

void forward_sequence(const Problem& p, int64_t n, int64_t head) {
  const Sequence s(p, n);
  const Forward b(p);
  const int64_t entries = p.K * p.V, place = (n * p.HV + head) * entries;
  const float* initial = p.initial_state ? p.initial_state + place : nullptr;
  States S{b.S, b.ldv, b.S, b.ldv};
  if (s.length == 1 && initial) {  // in decoding the state is most of the work
    S = States{initial, p.V, p.state + place, p.V};
  } else {
    load_state(initial, b, p.K, p.V, b.S);
  }
  Gates gates;
  for (int64_t begin = 0; begin < s.length; begin += C) {
    const int64_t chunk = ((s.slot + begin / C) * p.HV + head) * entries;
    if (p.chunk_states) keep_state(S.before, S.ldb, p.K, p.V, p.chunk_states + chunk);
    if (p.states) keep_state(S.before, S.ldb, p.K, p.V, p.states + chunk);
    const int64_t count = std::min(C, s.length - begin);
    const int64_t rows = count == 1 ? 1 : round_up(count, R), h = head / (p.HV / p.H);
    gates.load(p, s, begin, count, head);
    gates.accumulate(round_up(count, R));
    load_heads(p, p.q, p.sq, s, begin, count, rows, h, b.q, b.ldk, nullptr);
    load_heads(p, p.k, p.sk, s, begin, count, rows, h, b.k, b.ldk, nullptr);
    if (count == 1) {
      step(p, s, begin, head, gates, b, S);
    } else if (p.beta) {
      forward_chunk<true>(p, s, begin, count, rows, head, gates, b);
    } else {
      forward_chunk<false>(p, s, begin, count, rows, head, gates, b);
    }
  }
  if (S.after == b.S) keep_state(b.S, b.ldv, p.K, p.V, p.state + place);
}

}  // namespace
