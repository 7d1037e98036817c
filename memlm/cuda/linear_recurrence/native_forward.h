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

// One token: the recurrence as it is written, in one pass that reads the state and one that writes.
void step(const Problem& p, const Sequence& s, int64_t begin, int64_t head, const Gates& gates,
          const Forward& b) {
  const int64_t token = s.row * p.T + s.first + begin, V = p.V;
  const float *q = b.q, *k = b.k, decay = gates.since_start[0];
  const float* v = p.v + s.row * p.sv.row + (s.first + begin) * p.sv.token + head * p.sv.head;
  vec qk = {};
  for (int64_t c = 0; c < b.K; c += W) qk += load(q + c) * load(k + c);
  const float own = sum(qk);
  for (int64_t j = 0; j < V; j += W) {
    vec held = {}, read = {};
    for (int64_t c = 0; c < p.K; ++c) {
      const vec S = load(b.S + c * b.ldv + j);
      held += k[c] * S;
      read += q[c] * S;
    }
    vec x = load_part(v + j, V - j);
    if (p.beta) {
      x -= decay * held;
      if (p.errors) store_part(p.errors + (token * p.HV + head) * V + j, x, V - j);
      x *= gates.beta[0];
    }
    const vec out = static_cast<float>(p.scale) * (decay * read + own * x);
    store_part(p.o + (token * p.HV + head) * V + j, out, V - j);
    for (int64_t c = 0; c < p.K; ++c) {
      float* place = b.S + c * b.ldv + j;
      store(place, decay * load(place) + k[c] * x);
    }
  }
}

template <bool DELTA>
void forward_chunk(const Problem& p, const Sequence& s, int64_t begin, int64_t n, int64_t rows,
                   int64_t head, const Gates& gates, const Forward& b) {
  const int64_t ldk = b.ldk, ldc = b.ldc, ldv = b.ldv, K = p.K, V = p.V;
  const int64_t token = s.row * p.T + s.first + begin;
  const float* v = p.v + s.row * p.sv.row + (s.first + begin) * p.sv.token + head * p.sv.head;
  float* o = p.o + (token * p.HV + head) * V;
  float* errors = p.errors ? p.errors + (token * p.HV + head) * V : nullptr;
  transpose(b.k, ldk, rows, K, b.kT, ldc);
  gates.between(rows, b.gamma, ldc);
  decayed_products(b.q, ldk, b.kT, b.gamma, ldc, rows, K, b.P);
  if (DELTA) decayed_products(b.k, ldk, b.kT, b.gamma, ldc, rows, K, b.A);
  const float scale = static_cast<float>(p.scale);
  for_panels(V, [&](auto size, int64_t j) {
    constexpr int N = size;
    for (int64_t i = 0; i < rows; i += MR) {
      vec acc[MR][N] = {};
      if (DELTA) {
        multiply<N, false>(acc, b.k + i * ldk, ldk, b.S + j, ldv, K);
        scale_rows<N>(acc, gates.since_start + i);
        multiply<N, false>(acc, b.A + i * ldc, ldc, b.V_new + j, ldv, i);
      }
      for (int r = 0; r < MR; ++r) {
        const int64_t t = i + r;
        for (int m = 0; m < N; ++m) {
          const int64_t c = j + m * W;
          vec x = t < n ? load_part(v + t * p.sv.token + c, V - c) : vec{};
          if (DELTA) {
            x -= acc[r][m];
            if (errors && t < n) store_part(errors + t * p.HV * V + c, x, V - c);
            x *= gates.beta[t];
            for (int u = r + 1; u < MR; ++u) acc[u][m] += b.A[(i + u) * ldc + t] * x;
          }
          store(b.V_new + t * ldv + c, x);
          store(b.V_end + t * ldv + c, gates.to_end[t] * x);
        }
      }
    }
    for (int64_t i = 0; i < rows; i += MR) {
      vec acc[MR][N] = {};
      multiply<N, false>(acc, b.q + i * ldk, ldk, b.S + j, ldv, K);
      scale_rows<N>(acc, gates.since_start + i);
      multiply<N, false>(acc, b.P + i * ldc, ldc, b.V_new + j, ldv, i + MR);
      for (int r = 0; r < MR && i + r < n; ++r) {
        float* out = o + (i + r) * p.HV * V + j;
        for (int m = 0; m < N; ++m) store_part(out + m * W, scale * acc[r][m], V - j - m * W);
      }
    }
    for (int64_t c = 0; c < K; c += MR) {
      vec acc[MR][N] = {};
      multiply<N, true>(acc, b.k + c, ldk, b.V_end + j, ldv, rows);
      for (int r = 0; r < MR; ++r) {
        float* S = b.S + (c + r) * ldv + j;
        for (int m = 0; m < N; ++m) store(S + m * W, gates.whole * load(S + m * W) + acc[r][m]);
      }
    }
  });
}

void forward_sequence(const Problem& p, int64_t n, int64_t head) {
  const Sequence s(p, n);
  Forward b(p);
  const int64_t entries = p.K * p.V, place = n * p.HV + head;
  Gates gates;
  load_state(p.initial_state ? p.initial_state + place * entries : nullptr, b, p.K, p.V, b.S);
  for (int64_t begin = 0; begin < s.length; begin += C) {
    const int64_t chunk = ((s.slot + begin / C) * p.HV + head) * entries;
    if (p.chunk_states) keep_state(b.S, b.ldv, p.K, p.V, p.chunk_states + chunk);
    if (p.states) keep_state(b.S, b.ldv, p.K, p.V, p.states + chunk);
    const int64_t count = std::min(C, s.length - begin);
    const int64_t rows = count == 1 ? 1 : round_up(count, R), h = head / (p.HV / p.H);
    gates.load(p, s, begin, count, head);
    gates.accumulate(round_up(count, R));
    load_heads(p, p.q, p.sq, s, begin, count, rows, h, b.q, b.ldk, nullptr);
    load_heads(p, p.k, p.sk, s, begin, count, rows, h, b.k, b.ldk, nullptr);
    if (count == 1) {
      step(p, s, begin, head, gates, b);
    } else if (p.beta) {
      forward_chunk<true>(p, s, begin, count, rows, head, gates, b);
    } else {
      forward_chunk<false>(p, s, begin, count, rows, head, gates, b);
    }
  }
  keep_state(b.S, b.ldv, p.K, p.V, p.state + place * entries);
}

}  // namespace
