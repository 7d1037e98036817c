// One layer of the neural memory over N chunks of C tokens where its weights change at the end of a
// chunk only, forward and backward: `Chunks` in chunks.py. Rows are sequences times heads; of one
// row, with x, a [N C, in], e [N C, out], W, S [in, out], and for the chunk c
//
//   S' = mu_c S + L_c^T R_c        W' = beta_c W + joins_c S'        -L^T R = (diag(n) a)^T e
//
// n is part of L or of R, whichever is narrower. A token reads the weights that all chunks complete
// by then left behind: those before chunk c are read by tokens c C - 1 to (c + 1) C - 2, the last
// ones by the last token. Backward, with D and Z the gradients of W' and S':
//
//   Z += joins_c D     dbeta_c = <D, W>     dmu_c = <Z, S>     dL = R Z^T     dR = L Z
//   dx = dy W^T        D = beta_c D + x^T dy                   Z = mu_c Z
//
// A state is cut into blocks that know nothing of each other, and a block goes through many chunks
// while it lies in the core's cache. Tokens are laid out for a segment of chunks at a time, some of
// them transposed, so that every product is of rows of numbers and rows of vectors.
#include "native_backward.h"
#include "native_forward.h"
#include "native_gelu.h"
#include "native_step.h"

constexpr int64_t GELU_PART = 1 << 14;  // numbers

extern "C" {

// All return 0 where memory ran out.
int memlm_forward(const Problem* p) {
  return parallel(p->rows, p->threads, [p](int64_t row) { Forward(*p, row).run(); });
}

int memlm_backward(const Problem* p) {
  return parallel(p->rows, p->threads, [p](int64_t row) { Backward(*p, row).run(); });
}

// 0 where memory ran out, 2 where the anchor of a sequence is to be taken anew, else 1.
int memlm_step(const Step* p) {
  bool renewed = false;
  for (int64_t n = 0; n < p->rows / p->heads; ++n) {
    p->new_offset[n] = p->cycle ? (p->offset[n] + 1) % p->cycle : p->offset[n];
    renewed = renewed || p->new_offset[n] == 0;
  }
  const auto work = [p](int64_t row) { step::Row(*p, row).run(); };
  return parallel(p->rows, p->threads, work) ? 1 + renewed : 0;
}

// gelu::forward and gelu::backward, in parts that threads share.
int memlm_gelu(const float* x, float* value, float* slope, int64_t n, int64_t threads) {
  return parallel((n + GELU_PART - 1) / GELU_PART, threads, [=](int64_t part) {
    const int64_t i = part * GELU_PART;
    gelu::forward(x + i, value + i, slope ? slope + i : nullptr, std::min(n - i, GELU_PART));
  });
}

int memlm_gelu_backward(const float* x, const float* dvalue, const float* dslope, float* dx,
                        int64_t n, int64_t threads) {
  return parallel((n + GELU_PART - 1) / GELU_PART, threads, [=](int64_t part) {
    const int64_t i = part * GELU_PART;
    gelu::backward(x + i, dvalue + i, dslope ? dslope + i : nullptr, dx + i,
                   std::min(n - i, GELU_PART));
  });
}
}
