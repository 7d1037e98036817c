// The linear recurrence on a CPU, forward and backward, in chunks of C tokens (Yang et al., "Gated
// Delta Networks", arXiv 2412.06464). One sequence and value head at a time, so that all of a chunk
// lies in the core's cache. Rows are tokens; the scale is part of the outputs:
//
//   G_i = sum_{j<=i} g_j        Gamma_ij = exp(G_i - G_j) for i >= j, else 0
//   P = Q K^T * Gamma           A = K K^T * Gamma, of which only what is below the diagonal is used
//   E_i = v_i - e^{G_i} S^T k_i - sum_{j<i} A_ij V~_j        V~ = beta E   (V~ = v: plain additive)
//   O = e^G (Q S) + P V~        S' = e^{G_C} S + K^T (e^{G_C - G} V~)
//
// The triangular system is solved by substitution, a few rows at a time in registers. Its gradient
// is the transposed system: with X the gradient of V~ through it and Y = beta X,
//
//   X_i = (P^T dO + e^{G_C - G} (K dS'))_i - sum_{j>i} A_ji Y_j     dv = Y     dbeta_i = <X_i, E_i>
//
// and -Y is to the keys what dO is to the queries: with D = [dO; -Y] over [Q; K],
//
//   d[Q; K] = e^G D S^T + (D V~^T * Gamma) K     dS = e^{G_C} dS' + [Q; K]^T (e^G D)
//   dK += (D V~^T * Gamma)^T [Q; K] + e^{G_C - G} (V~ dS'^T)
//
// The gradient of g_t has a term for all that passes from before t to t or later.
#include "native_backward.h"
#include "native_forward.h"

extern "C" {

// Both return 0 where memory ran out.
int memlm_forward(const Problem* p) {
  return parallel(p->N * p->HV, p->threads,
                  [p](int64_t task) { forward_sequence(*p, task / p->HV, task % p->HV); });
}

int memlm_backward(const Problem* p) {
  return parallel(p->N * p->HV, p->threads,
                  [p](int64_t task) { backward_sequence(*p, task / p->HV, task % p->HV); });
}

// out [rows, K] = the sum of x [rows, group, K] over the group, one after the other.
int memlm_sum_groups(const float* x, float* out, int64_t rows, int64_t group, int64_t K,
                     int64_t threads) {
  constexpr int64_t block = 256;
  return parallel((rows + block - 1) / block, threads, [=](int64_t task) {
    for (int64_t r = task * block; r < std::min(rows, (task + 1) * block); ++r) {
      const float* from = x + r * group * K;
      std::memcpy(out + r * K, from, K * sizeof(float));
      for (int64_t i = 1; i < group; ++i) {
        for (int64_t c = 0; c < K; ++c) out[r * K + c] += from[i * K + c];
      }
    }
  });
}
}
