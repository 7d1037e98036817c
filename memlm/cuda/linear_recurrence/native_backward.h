// The backward pass: see native.cpp for the formulas.
#pragma once

#include "native_chunks.h"

namespace {

struct Backward : Buffers {
  float *qk, *kT, *gamma, *A, *V_new, *V_newT, *ST, *dS, *dST, *D, *D_start, *dqk, *B, *M;

  // Pairs of matrices, of queries and of keys, lie C rows apart.
  Backward(const Problem& p) : Buffers(p) {
    place({{&qk, 2 * C * ldk}, {&kT, K * ldc}, {&gamma, C * ldc}, {&A, 2 * C * ldc},
           {&V_new, C * ldv}, {&V_newT, V * ldc}, {&ST, V * ldk}, {&dS, K * ldv},
           {&dST, V * ldk}, {&D, 2 * C * ldv}, {&D_start, 2 * C * ldv}, {&dqk, 2 * C * ldk},
           {&B, 2 * C * ldc}, {&M, C * ldc}});
  }
};

// Per token: terms of the gradients of its gates, as sums of vectors.
struct GateTerms {
  vec from_start[C], to_end[C], strength[C];
  double inside[C + 1], whole;
};

// The transposed system: of MR rows, the gradient of what the tokens write through the system.
template <int N>
INLINE void substitute_back(Tile<N>& tile, const float* A, int64_t lda, const float* beta) {
  UNROLL for (int r = MR - 1; r >= 0; --r) {
    UNROLL for (int m = 0; m < N; ++m) {
      const vec y = beta[r] * tile.x[r][m];
      UNROLL for (int u = 0; u < r; ++u) tile.x[u][m] -= A[r * lda + u] * y;
    }
  }
}

// D, e^G D, the gradients of the values, and dS; panel by panel of value channels.
template <bool DELTA>
void value_gradients(const Problem& p, const Sequence& s, int64_t begin, int64_t n, int64_t rows,
                     int64_t head, const Gates& gates, const Backward& buffers, GateTerms& terms) {
  const Backward b = buffers;
  const int64_t ldk = b.ldk, ldc = b.ldc, ldv = b.ldv, K = p.K, V = p.V;
  const int64_t token = s.row * p.T + s.first + begin, ldo = p.HV * V, ldi = p.so.token;
  const float* dO = p.dO + s.row * p.so.row + (s.first + begin) * ldi + head * p.so.head;
  const float* errors = DELTA ? p.errors + (token * p.HV + head) * V : nullptr;
  float* dv = p.dv + (token * p.HV + head) * V;
  const float *k = b.qk + C * ldk, *A = b.A + C * ldc, scale = static_cast<float>(p.scale);
  float *Dk = b.D + C * ldv, *Dk_start = b.D_start + C * ldv;
  for_panels(V, [=, &gates, &terms](auto size, int64_t j) {
    constexpr int N = size;
    for (int64_t t = 0; t < rows; ++t) {
      for (int m = 0; m < N; ++m) {
        const int64_t c = j + m * W;
        const vec x = t < n ? scale * load_part(dO + t * ldi + c, V - c) : vec{};
        store(b.D + t * ldv + c, x);
        store(b.D_start + t * ldv + c, gates.since_start[t] * x);
      }
    }
    for (int64_t i = rows - MR; i >= 0; i -= MR) {
      Tile<N> tile;
      tile.template add<false>(k + i * ldk, ldk, b.dS + j, ldv, K);
      tile.scale(gates.to_end + i);
      tile.template add<true>(b.A + i * ldc + i, ldc, b.D + i * ldv + j, ldv, rows - i);
      if (DELTA) {
        const int64_t later = i + MR;
        const float *beta = gates.beta + i, *A_later = A + later * ldc + i;
        tile.template add<true>(A_later, ldc, Dk + later * ldv + j, ldv, rows - later);
        substitute_back(tile, A + i * ldc + i, ldc, beta);
        vec* strength = terms.strength + i;
        tile.map_with(errors + i * ldo + j, ldo, n - i, V - j,
                      [=](int r, vec error, vec x) INLINE_LAMBDA {
                        strength[r] += x * error;
                        return x;
                      });
        tile.scale(beta);
      }
      tile.write(dv + i * ldo + j, ldo, n - i, V - j);
      if (DELTA) {
        tile.map([](int, int, vec y) INLINE_LAMBDA { return -y; });
        tile.put(Dk + i * ldv + j, ldv);
        tile.scale(gates.since_start + i);
        tile.put(Dk_start + i * ldv + j, ldv);
      }
    }
    for (int64_t c = 0; c < K; c += MR) {
      Tile<N> tile;
      tile.template add<true>(b.qk + c, ldk, b.D_start + j, ldv, rows);
      if (DELTA) tile.template add<true>(k + c, ldk, Dk_start + j, ldv, rows);
      float* dS = b.dS + c * ldv + j;
      const float whole = gates.whole;
      tile.map([=](int r, int m, vec x) INLINE_LAMBDA {
        return whole * load(dS + r * ldv + m * W) + x;
      });
      tile.put(dS, ldv);
    }
  });
}

// B = D V~^T * Gamma, and for each token the sum of what passes it within the chunk.
template <bool DELTA>
void inside_gradients(int64_t rows, int64_t V, const Backward& buffers, GateTerms& terms) {
  const Backward b = buffers;
  const int64_t ld = b.ldc, half = C * ld;
  lower_products(b.D, b.ldv, b.V_newT, ld, rows, V, [=](int64_t place, vec x) INLINE_LAMBDA {
    store(b.B + place, x * load(b.gamma + place));
    store(b.M + place, x * load(b.A + place));
  });
  if (DELTA) {
    const float* Dk = b.D + C * b.ldv;
    lower_products(Dk, b.ldv, b.V_newT, ld, rows, V, [=](int64_t place, vec x) INLINE_LAMBDA {
      store(b.B + half + place, x * load(b.gamma + place));
      store(b.M + place, load(b.M + place) + x * load(b.A + half + place));
    });
    for (int64_t t = 0; t < rows; ++t) b.B[half + t * ld + t] = 0;
  }
  // From token t to t + 1, what begins at t is added and what ends at t falls away. In doubles the
  // difference is exact: the same products stand in rows and columns.
  constexpr int HALF = W / 2;
  dvec columns[C / HALF] = {}, ends[C];
  for (int64_t i = 0; i < rows; ++i) {
    ends[i] = dvec{};
    for (int64_t j = 0; j < round_up(i + 1, R); j += HALF) {
      const dvec x = widen(b.M + i * ld + j);
      columns[j / HALF] += x;
      ends[i] += x;
    }
  }
  terms.inside[0] = 0;
  for (int64_t t = 0; t < rows; ++t) {
    double end = 0;
    for (int m = 0; m < HALF; ++m) end += ends[t][m];
    terms.inside[t + 1] = terms.inside[t] + (columns[t / HALF][t % HALF] - end);
  }
}

// Gradients of (normed) queries and keys, panel by panel of key channels.
template <bool DELTA>
void key_gradients(const Problem& p, int64_t rows, const Gates& gates, const Backward& buffers,
                   GateTerms& terms) {
  const Backward b = buffers;
  const int64_t ldk = b.ldk, ldc = b.ldc, ldv = b.ldv, V = p.V;
  const float *k = b.qk + C * ldk, *Bk = b.B + C * ldc, *Dk_start = b.D_start + C * ldv;
  float* dk = b.dqk + C * ldk;
  // sums[r] += the product of row r and what lies at x
  const auto products = [=](auto& tile, const float* x, vec* sums) INLINE_LAMBDA {
    tile.map([=](int r, int m, vec y) INLINE_LAMBDA {
      sums[r] += y * load(x + r * ldk + m * W);
      return y;
    });
  };
  for_panels(p.K, [=, &gates, &terms](auto size, int64_t j) {
    for (int64_t i = 0; i < rows; i += MR) {
      const int64_t place = i * ldk + j;
      Tile<size> tile;
      tile.template add<false>(b.D_start + i * ldv, ldv, b.ST + j, ldk, V);
      products(tile, b.qk + place, terms.from_start + i);
      tile.template add<false>(b.B + i * ldc, ldc, k + j, ldk, i + MR);
      tile.put(b.dqk + place, ldk);
    }
    for (int64_t i = 0; i < rows; i += MR) {
      const int64_t place = i * ldk + j;
      Tile<size> tile;
      tile.template add<false>(b.V_new + i * ldv, ldv, b.dST + j, ldk, V);
      tile.scale(gates.to_end + i);
      products(tile, k + place, terms.to_end + i);
      if (DELTA) {
        tile.put(dk + place, ldk);
        tile = {};
        tile.template add<false>(Dk_start + i * ldv, ldv, b.ST + j, ldk, V);
        products(tile, k + place, terms.from_start + i);
        tile.map([=](int r, int m, vec y) INLINE_LAMBDA {
          return y + load(dk + place + r * ldk + m * W);
        });
        tile.template add<false>(Bk + i * ldc, ldc, k + j, ldk, i + MR);
        tile.template add<true>(Bk + i * ldc + i, ldc, k + place, ldk, rows - i);
      }
      tile.template add<true>(b.B + i * ldc + i, ldc, b.qk + place, ldk, rows - i);
      tile.put(dk + place, ldk);
    }
  });
}

// Write the gradients of queries or keys x as given, from those dx of the normed ones.
void store_key_gradients(const Problem& p, int64_t token, int64_t n, int64_t head, const float* x,
                         const float* dx, int64_t ld, const float* factor, float* out) {
  out += (token * p.HV + head) * p.K;
  for (int64_t t = 0; t < n; ++t, x += ld, dx += ld, out += p.HV * p.K) {
    float f = 1, along = 0;
    if (p.l2norm) {
      vec products = {};
      for (int64_t c = 0; c < p.K; c += W) products += load(x + c) * load(dx + c);
      along = sum(products), f = factor[t];
    }
    for (int64_t c = 0; c < p.K; c += W) {
      store_part(out + c, f * (load(dx + c) - along * load(x + c)), p.K - c);
    }
  }
}

// Write the gradients of the gates as given, and add to the sums of those that all tokens share.
void store_gate_gradients(const Problem& p, int64_t token, int64_t n, int64_t rows, int64_t head,
                          const Gates& gates, const GateTerms& terms, double* shared) {
  alignas(64) float from_start[C], to_end[C], strength[C];
  sums(terms.from_start, rows, from_start);
  sums(terms.to_end, rows, to_end);
  sums(terms.strength, rows, strength);
  double after = 0, before = 0, dg[C];
  for (int64_t t = n - 1; t >= 0; --t) dg[t] = after += from_start[t];
  for (int64_t t = 0; t < n; ++t) {
    dg[t] += before + terms.inside[t] + terms.whole;
    before += to_end[t];
  }
  for (int64_t t = 0; t < n; ++t) {
    const int64_t place = (token + t) * p.HV + head;
    if (p.dbeta) p.dbeta[place] = strength[t] * gates.beta_slope[t];
    if (!p.dlog_decay) continue;
    shared[1] += dg[t] * gates.g[t];
    if (p.A_log) dg[t] *= gates.g_slope[t];
    shared[0] += dg[t];
    p.dlog_decay[place] = static_cast<float>(dg[t]);
  }
}

template <bool DELTA>
void backward_chunk(const Problem& p, const Sequence& s, int64_t begin, int64_t n, int64_t head,
                    const Backward& b, double* shared) {
  const int64_t rows = round_up(n, R), K = p.K, V = p.V, h = head / (p.HV / p.H);
  const int64_t token = s.row * p.T + s.first + begin;
  const float* S = p.states + ((s.slot + begin / C) * p.HV + head) * K * V;
  float *k = b.qk + C * b.ldk, factors[2][C];
  Gates gates;
  GateTerms terms = {};
  gates.load(p, s, begin, n, head);
  gates.accumulate(rows);
  gates.between(rows, b.gamma, b.ldc);
  load_heads(p, p.q, p.sq, s, begin, n, rows, h, b.qk, b.ldk, factors[0]);
  load_heads(p, p.k, p.sk, s, begin, n, rows, h, k, b.ldk, factors[1]);
  transpose(k, b.ldk, rows, K, b.kT, b.ldc);
  decayed_products(b.qk, b.ldk, b.kT, b.gamma, b.ldc, rows, K, b.A);
  if (DELTA) decayed_products(k, b.ldk, b.kT, b.gamma, b.ldc, rows, K, b.A + C * b.ldc);
  const float* written = p.v + s.row * p.sv.row + (s.first + begin) * p.sv.token + head * p.sv.head;
  int64_t stride = p.sv.token;
  if (DELTA) written = p.errors + (token * p.HV + head) * V, stride = p.HV * V;
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t j = 0; j < b.V; j += W) {
      vec x = t < n ? load_part(written + t * stride + j, V - j) : vec{};
      if (DELTA) x *= gates.beta[t];
      store(b.V_new + t * b.ldv + j, x);
    }
  }
  transpose(b.V_new, b.ldv, rows, V, b.V_newT, b.ldc);
  transpose(S, V, K, V, b.ST, b.ldk);
  transpose(b.dS, b.ldv, K, V, b.dST, b.ldk);
  vec whole[4] = {};  // several sums: none waits for the last addition, and they round less
  for (int64_t j = 0; j < V; ++j) {
    const float *ST = b.ST + j * b.ldk, *dST = b.dST + j * b.ldk;
    vec row = {};
    for (int64_t c = 0; c < K; c += W) row += load(ST + c) * load(dST + c);
    whole[j % 4] += row;
  }
  terms.whole = gates.whole * sum((whole[0] + whole[1]) + (whole[2] + whole[3]));
  value_gradients<DELTA>(p, s, begin, n, rows, head, gates, b, terms);
  inside_gradients<DELTA>(rows, V, b, terms);
  key_gradients<DELTA>(p, rows, gates, b, terms);
  store_key_gradients(p, token, n, head, b.qk, b.dqk, b.ldk, factors[0], p.dq);
  store_key_gradients(p, token, n, head, k, b.dqk + C * b.ldk, b.ldk, factors[1], p.dk);
  store_gate_gradients(p, token, n, rows, head, gates, terms, shared);
}

void backward_sequence(const Problem& p, int64_t n, int64_t head) {
  const Sequence s(p, n);
  Backward b(p);
  const int64_t place = n * p.HV + head;
  double* shared = p.dgate + 2 * place;
  shared[0] = shared[1] = 0;
  load_state(p.dstate + place * p.K * p.V, b, p.K, p.V, b.dS);
  for (int64_t begin = (s.length - 1) / C * C; begin >= 0 && s.length > 0; begin -= C) {
    const int64_t count = std::min(C, s.length - begin);
    if (p.beta) {
      backward_chunk<true>(p, s, begin, count, head, b, shared);
    } else {
      backward_chunk<false>(p, s, begin, count, head, b, shared);
    }
  }
  if (p.dinitial_state) {
    keep_state(b.dS, b.ldv, p.K, p.V, p.dinitial_state + place * p.K * p.V);
  }
}

}  // namespace
