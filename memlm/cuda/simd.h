// Vectors of floats, products of small matrices in registers, and threads: what native.cpp files
// are written with. GCC's and clang's vector extensions, so that one source serves every CPU.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>
#ifdef __SSE__
#include <immintrin.h>
#endif

// Loops over the registers of a product must be unrolled, or the registers go to memory.
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define INLINE_LAMBDA __attribute__((always_inline))
#define INLINE inline __attribute__((always_inline))

namespace simd {

// W floats in a vector; a product works on MR rows and at most NV vectors of columns at once, as
// many as leave the sums, the operands and a broadcast number in the registers there are.
#if defined(__AVX512F__)
constexpr int W = 16, MR = 8, NV = 2;
#elif defined(__AVX__)
constexpr int W = 8, MR = 4, NV = 2;
#elif defined(__aarch64__)
constexpr int W = 4, MR = 8, NV = 2;
#else
constexpr int W = 4, MR = 4, NV = 2;
#endif
constexpr int R = W > MR ? W : MR;  // rows and columns are padded to a multiple of it

typedef float vec __attribute__((vector_size(4 * W)));
typedef float unaligned_vec __attribute__((vector_size(4 * W), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef float half_vec __attribute__((vector_size(2 * W)));
typedef float unaligned_half __attribute__((vector_size(2 * W), aligned(4)));
typedef double dvec __attribute__((vector_size(4 * W)));  // as many as a half_vec has

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Floats between the rows of a buffer: rows a multiple of 256 bytes apart would share cache sets.
inline int64_t row_length(int64_t width) {
  const int64_t padded = round_up(width, R);
  return padded % 64 ? padded : padded + W;
}

inline vec load(const float* p) { return *reinterpret_cast<const unaligned_vec*>(p); }
inline void store(float* p, vec x) { *reinterpret_cast<unaligned_vec*>(p) = x; }
inline vec all(float x) { return vec{} + x; }

// 0, 1, 2, ...
inline vec lanes() {
  vec x = {};
  for (int i = 0; i < W; ++i) x[i] = i;
  return x;
}

// The first `count` numbers (all W if there are more), and zeros.
inline vec load_part(const float* p, int64_t count) {
  if (count >= W) return load(p);
  vec x = {};
  for (int64_t i = 0; i < count; ++i) x[i] = p[i];
  return x;
}

inline void store_part(float* p, vec x, int64_t count) {
  if (count >= W) return store(p, x);
  for (int64_t i = 0; i < count; ++i) p[i] = x[i];
}

inline dvec widen(const float* p) {
  return __builtin_convertvector(half_vec(*reinterpret_cast<const unaligned_half*>(p)), dvec);
}

inline float sum(vec x) {
  float total = 0;
  for (int i = 0; i < W; ++i) total += x[i];
  return total;
}

inline vec choose(ivec condition, vec yes, vec no) { return condition ? yes : no; }

constexpr float LOG_ZERO = -60;  // exp of less is zero here

// Within 2 units in the last place up to 88; NaN stays NaN.
inline vec exp(vec x) {
  const vec y = choose(x > 88, all(88), choose(x < LOG_ZERO, all(LOG_ZERO), x));
  const vec magic = all(12582912.0f);  // adding it rounds to whole numbers
  const vec shifted = y * 1.44269504f + magic;
  const vec n = shifted - magic;
  const vec r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  vec p = r * (1.0f / 5040) + (1.0f / 720);
  p = p * r + (1.0f / 120);
  p = p * r + (1.0f / 24);
  p = p * r + (1.0f / 6);
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const ivec bits = (__builtin_convertvector(choose(y == y, n, vec{}), ivec) + 127) << 23;
  vec power;
  std::memcpy(&power, &bits, sizeof power);
  return choose(x < LOG_ZERO, vec{}, p * power);
}

inline vec sigmoid(vec x) {
  const vec e = exp(choose(x < 0, x, -x));
  return choose(x < 0, e, all(1)) / (e + 1);
}

// log(1 + exp(x)) = max(x, 0) + log(1 + y) with y = exp(-|x|); log(1 + y) = 2 artanh(y / (2 + y)).
inline vec softplus(vec x) {
  const vec y = exp(choose(x < 0, x, -x));
  const vec s = y / (y + 2), s2 = s * s;
  vec p = s2 * (1.0f / 15) + (1.0f / 13);
  p = p * s2 + (1.0f / 11);
  p = p * s2 + (1.0f / 9);
  p = p * s2 + (1.0f / 7);
  p = p * s2 + (1.0f / 5);
  p = p * s2 + (1.0f / 3);
  p = p * s2 + 1.0f;
  return choose(x > 0, x, vec{}) + 2 * s * p;
}

// MR rows of N vectors.
template <int N>
struct Tile {
  vec x[MR][N] = {};

  // this += a b with a [MR, depth] and b [depth, N vectors]; with TA, a is stored transposed.
  template <bool TA>
  INLINE void add(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth) {
    for (int64_t d = 0; d < depth; ++d, b += ldb) {
      vec columns[N];
      UNROLL for (int n = 0; n < N; ++n) columns[n] = load(b + n * W);
      UNROLL for (int r = 0; r < MR; ++r) {
        const float y = TA ? a[d * lda + r] : a[r * lda + d];
        UNROLL for (int n = 0; n < N; ++n) x[r][n] += y * columns[n];
      }
    }
  }

  // x[r][n] = f(r, n, x[r][n])
  template <class F>
  INLINE void map(F f) {
    UNROLL for (int r = 0; r < MR; ++r) {
      UNROLL for (int n = 0; n < N; ++n) x[r][n] = f(r, n, x[r][n]);
    }
  }

  INLINE void scale(const float* factors) {
    map([=](int r, int, vec y) INLINE_LAMBDA { return factors[r] * y; });
  }

  // x[r][n] = f(r, y[r, n], x[r][n]) with zeros for what lies behind y's rows and columns.
  template <class F>
  INLINE void map_with(const float* y, int64_t ld, int64_t rows, int64_t columns, F f) {
    if (rows >= MR && columns >= N * W) {
      map([=](int r, int n, vec z) INLINE_LAMBDA { return f(r, load(y + r * ld + n * W), z); });
    } else {
      Tile read;
      read.get_part(y, ld, rows, columns);
      map([=](int r, int n, vec z) INLINE_LAMBDA { return f(r, read.x[r][n], z); });
    }
  }

  // out[r, n] = x[r][n] for as many rows and columns as there are
  INLINE void write(float* out, int64_t ld, int64_t rows, int64_t columns) const {
    if (rows >= MR && columns >= N * W) {
      put(out, ld);
    } else {
      Tile(*this).put_part(out, ld, rows, columns);  // a copy: this one stays in registers
    }
  }

  __attribute__((noinline)) void get_part(const float* y, int64_t ld, int64_t rows,
                                          int64_t columns) {
    for (int64_t r = 0; r < std::min<int64_t>(rows, MR); ++r) {
      for (int n = 0; n < N; ++n) x[r][n] = load_part(y + r * ld + n * W, columns - n * W);
    }
  }

  __attribute__((noinline)) void put_part(float* out, int64_t ld, int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < std::min<int64_t>(rows, MR); ++r) {
      for (int n = 0; n < N; ++n) store_part(out + r * ld + n * W, x[r][n], columns - n * W);
    }
  }

  // out[r, n] = x[r][n]
  INLINE void put(float* out, int64_t ld) const {
    UNROLL for (int r = 0; r < MR; ++r) {
      UNROLL for (int n = 0; n < N; ++n) store(out + r * ld + n * W, x[r][n]);
    }
  }
};

template <int N>
using constant = std::integral_constant<int, N>;

// f(N, first column) for panels of N vectors that cover `width` columns.
template <class F>
inline void for_panels(int64_t width, F f) {
  int64_t vectors = (width + W - 1) / W, column = 0;
  for (; vectors >= NV; vectors -= NV, column += NV * W) f(constant<NV>(), column);
  for (; vectors > 0; --vectors, column += W) f(constant<1>(), column);
}

#ifdef __clang__
template <int S, int... L>
inline vec exchange_low(vec a, vec b, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(a, b, ((L & S) ? W + L - S : L)...);
}
template <int S, int... L>
inline vec exchange_high(vec a, vec b, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(a, b, ((L & S) ? W + L : L + S)...);
}
#else
template <int S, int... L>
inline vec exchange_low(vec a, vec b, std::integer_sequence<int, L...>) {
  return __builtin_shuffle(a, b, ivec{((L & S) ? W + L - S : L)...});
}
template <int S, int... L>
inline vec exchange_high(vec a, vec b, std::integer_sequence<int, L...>) {
  return __builtin_shuffle(a, b, ivec{((L & S) ? W + L : L + S)...});
}
#endif

template <int S>
INLINE void exchange(vec (&x)[W]) {
  constexpr auto lanes = std::make_integer_sequence<int, W>();
  for (int r = 0; r < W; ++r) {
    if (r & S) continue;
    const vec a = x[r], b = x[r + S];
    x[r] = exchange_low<S>(a, b, lanes);
    x[r + S] = exchange_high<S>(a, b, lanes);
  }
}

// W rows of W numbers become columns.
INLINE void transpose(vec (&x)[W]) {
  exchange<1>(x);
  exchange<2>(x);
  if constexpr (W > 4) exchange<4>(x);
  if constexpr (W > 8) exchange<8>(x);
}

// out[c, r] = in[r, c]; rows and columns that `in` has not become zeros up to a multiple of R.
inline void transpose(const float* in, int64_t ldi, int64_t rows, int64_t columns, float* out,
                      int64_t ldo) {
  for (int64_t r = 0; r < round_up(rows, R); r += W) {
    for (int64_t c = 0; c < round_up(columns, R); c += W) {
      vec x[W];
      for (int i = 0; i < W; ++i) {
        x[i] = r + i < rows ? load_part(in + (r + i) * ldi + c, columns - c) : vec{};
      }
      transpose(x);
      for (int i = 0; i < W; ++i) store(out + (c + i) * ldo + r, x[i]);
    }
  }
}

// out[i] = the sum of the numbers of x[i]; count is a multiple of W.
inline void sums(const vec* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += W) {
    vec block[W];
    for (int r = 0; r < W; ++r) block[r] = x[i + r];
    transpose(block);
    for (int r = 1; r < W; ++r) block[0] += block[r];
    store(out + i, block[0]);
  }
}

// Numbers too small for a float's full precision count as zero while this lives: a decayed state
// is full of them, and they take a CPU many times as long.
class FlushDenormals {
#ifdef __SSE__
 public:
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
 public:
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif
};

// Memory of this thread, at least `floats` long and kept for the next call; not initialised.
inline float* workspace(int64_t floats) {
  struct Memory {
    void* p = nullptr;
    int64_t floats = 0;
    ~Memory() { std::free(p); }
  };
  thread_local Memory memory;
  if (memory.floats < floats) {
    std::free(memory.p);
    memory.floats = 0;
    memory.p = std::aligned_alloc(64, round_up(4 * floats, 64));
    if (memory.p == nullptr) throw std::bad_alloc();
    memory.floats = floats;
  }
  return static_cast<float*>(memory.p);
}

// f(i) for all i < count on up to `threads` threads; false where memory ran out.
template <class F>
bool parallel(int64_t count, int64_t threads, F f) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> good{true};
  auto work = [&] {
    FlushDenormals flush;
    try {
      for (int64_t i; (i = next++) < count;) f(i);
    } catch (const std::bad_alloc&) {
      good = false;
    }
  };
  std::vector<std::thread> others;
  try {
    others.reserve(threads);
    while (static_cast<int64_t>(others.size()) + 1 < std::min(threads, count)) {
      others.emplace_back(work);
    }
  } catch (const std::exception&) {  // no more threads to be had: these do it
  }
  work();
  for (auto& thread : others) thread.join();
  return good;
}

}  // namespace simd
