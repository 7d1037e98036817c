// Weighted bags of a table's rows, the products of tokens with rows, and the sums of what reads leave
// for every row, handed to whoever wants them: a gradient, or the update of the row.
//
//   bag    out[t] = (sum over b of weights[t, b] values[indices[t, b]]) silu(gate[t])
//   dot    out[t, b] = values[indices[t, b]] . x[t]
//   rows   g[row] = sum over the reads (t, b) of the row of weights[t, b] grads[t]
//
// Tables are larger than caches, so rows are fetched ahead of their use. Sums of a row are in the
// order of its reads, whatever the number of threads.
#include "native_rows.h"

extern "C" {

// All return 1, 0 where memory ran out, or -1 for an index that is not a row of the table.
int memlm_bag(const Bag* p) { return p->for_tokens([p](int64_t t) { add_bag(*p, t); }); }

int memlm_dot(const Bag* p) { return p->for_tokens([p](int64_t t) { dot_rows(*p, t); }); }

// Rows and their gradients, one after another; found is how many there are.
int memlm_row_gradients(Rows* p) {
  return p->for_rows([p](int64_t u, int64_t row, const float* g) {
    p->rows[u] = row;
    std::memcpy(p->gradient + u * p->width, g, sizeof(float) * p->width);
  });
}

// The rows of a table of gradients that were read; the others are left as they are.
int memlm_put_rows(Rows* p) {
  return p->for_rows([p](int64_t, int64_t row, const float* g) {
    std::memcpy(p->gradient + row * p->width, g, sizeof(float) * p->width);
  });
}

int memlm_lazy_adam(Rows* p) {
  return p->for_rows([p](int64_t, int64_t row, const float* g) { lazy_adam(*p, row, g); });
}

int memlm_rowwise_adagrad(Rows* p) {
  return p->for_rows([p](int64_t, int64_t row, const float* g) { rowwise_adagrad(*p, row, g); });
}
}
