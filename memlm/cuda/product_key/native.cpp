// The k best of n * n product keys for every token and head, in float32.
//
//   scores[i1 n + i2] = query[0] . sub_keys[0, i1] + query[1] . sub_keys[1, i2]
//
// Scores of a block of tokens lie in the core's cache. The k best of a row are found by a threshold
// that few more than k reach, started from the one of the token before; only those are ranked.
#include "native_backward.h"
#include "native_forward.h"

extern "C" {

// Both return 0 where memory ran out.
int memlm_forward(const Select* p) { return forward(*p); }
int memlm_backward(const Gradient* p) { return backward(*p); }
}
