// The CPU kernels of tokred::sparse_linear and tokred::gated_tail, plain C for ctypes: see neurons.py.
//
// A row of the neuron-major weight is read if its neuron is active for any token, once for all tokens. Weights are
// float32, bfloat16 or float16, everything else is float32. Threads take equal shares of the active neurons, sum into
// rows of their own, and add those up in order: the same result for the same number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <omp.h>

namespace {

constexpr int LANES = 8, AT_ONCE = 8, TOKENS = 8;  // of a vector; neurons in one pass over the sums; at most

// Vectors may lie anywhere in arrays of other types; a cast between two of one size keeps the bits.
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef short Shorts __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

struct Float32 { float value; };
struct Bfloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

inline Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }

inline Floats load(const Float32* from) { return *reinterpret_cast<const Floats*>(from); }

inline Floats load(const Bfloat16* from) {
  return (Floats)(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words) << 16);
}

inline Floats load(const Float16* from) {
#ifdef __F16C__
  return __builtin_ia32_vcvtph2ps256(*reinterpret_cast<const Shorts*>(from));
#else
  const Words bits = __builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words);
  const Words size = (bits & 0x7fff) << 13;
  const Words finite = (Words)((Floats)size * 0x1p112f);  // the exponent's bias is 15 there and 127 here
  const Words whole = finite | ((Words)(size >= 0x0f800000) & 0x7f800000);  // infinities and NaN
  return (Floats)(whole | (bits & 0x8000) << 16);
#endif
}

template <class T>
inline Floats load_some(const T* from, int64_t count) {  // fewer than a vector has; zeros behind them
  T padded[LANES] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return load(padded);
}

inline bool active(float value, float threshold) { return !(std::fabs(value) <= threshold); }  // NaN is

// sums[d] += sum_r share[r] * rows[r][d]; the rows are met once, so the sums are what goes in and out of registers
template <class T>
inline int64_t add_rows_once(float* sums, int64_t width, const T* const* rows, const float* share) {
  Floats by[AT_ONCE];
#pragma GCC unroll 8
  for (int r = 0; r < AT_ONCE; ++r) by[r] = share[r] - Floats{};
  int64_t d = 0;
  for (; d + 4 * LANES <= width; d += 4 * LANES) {
    Floats* const to = reinterpret_cast<Floats*>(sums + d);
    Floats sum[4] = {to[0], to[1], to[2], to[3]};
#pragma GCC unroll 8
    for (int r = 0; r < AT_ONCE; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) sum[v] += by[r] * load(rows[r] + d + v * LANES);
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) to[v] = sum[v];
  }
  return d;
}

// sums[m][d] += sum_r share[m][r] * rows[r][d]
template <class T>
inline void add_rows(float* sums, int64_t tokens, int64_t width, const T* const* rows, const float (*share)[AT_ONCE]) {
  int64_t d = tokens == 1 ? add_rows_once(sums, width, rows, share[0]) : 0;
  for (; d + LANES <= width; d += LANES) {
    Floats row[AT_ONCE];
#pragma GCC unroll 8
    for (int r = 0; r < AT_ONCE; ++r) row[r] = load(rows[r] + d);
    for (int64_t m = 0; m < tokens; ++m) {
      Floats* const to = reinterpret_cast<Floats*>(sums + m * width + d);
      Floats even = *to, odd = {};
#pragma GCC unroll 4
      for (int r = 0; r < AT_ONCE; r += 2) even += share[m][r] * row[r], odd += share[m][r + 1] * row[r + 1];
      *to = even + odd;
    }
  }
  for (int64_t m = 0; m < tokens && d < width; ++m) {
    Floats sum = load_some(sums + m * width + d, width - d);
    for (int r = 0; r < AT_ONCE; ++r) sum += share[m][r] * load_some(rows[r] + d, width - d);
    std::memcpy(sums + m * width + d, &sum, (width - d) * sizeof(float));
  }
}

// products[m AT_ONCE + r] = <rows[r], x[m]> for M tokens and R rows, the sums of which stay in registers
template <int M, int R, class T>
inline void multiply(float* products, int64_t width, const T* const* rows, const float* x) {
  Floats sums[M][R] = {};
  int64_t c = 0;
  for (; c + LANES <= width; c += LANES) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Floats row = load(rows[r] + c);
#pragma GCC unroll 2
      for (int m = 0; m < M; ++m) sums[m][r] += row * load(x + m * width + c);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int m = 0; m < M; ++m) {
      if (c < width) sums[m][r] += load_some(rows[r] + c, width - c) * load_some(x + m * width + c, width - c);
      products[m * AT_ONCE + r] = 0;
      for (int lane = 0; lane < LANES; ++lane) products[m * AT_ONCE + r] += sums[m][r][lane];
    }
  }
}

struct Problem {
  const float* act;  // [M F] which neurons are active, and by how much
  int64_t tokens, neurons;
  float threshold;
  const float* x;  // [M C], null without an up-projection
  const void* up;  // [F C]
  int64_t up_stride, channels;
  const float* up_bias;  // [F] or null
  const void* down;      // [F D]
  int64_t down_stride, width;
  const float* bias;  // [D] or null
  float* y;           // [M D]
};

// The neurons that are active for any token, in order; `mask` is scratch of as many bytes.
int64_t list_active(const Problem& p, uint8_t* mask, int32_t* list) {
  std::memset(mask, 0, p.neurons);
  for (int64_t m = 0; m < p.tokens; ++m)
    for (int64_t f = 0; f < p.neurons; ++f) mask[f] |= active(p.act[m * p.neurons + f], p.threshold);
  int64_t count = 0;
  for (int64_t f = 0; f < p.neurons; ++f) {
    list[count] = (int32_t)f;
    count += mask[f];
  }
  return count;
}

template <class T>
void run(const Problem& p, int threads) {
  thread_local std::vector<int32_t> indices;  // kept between calls: a fresh large block is paged in anew each time
  thread_local std::vector<uint8_t> mask, nothing;
  thread_local std::vector<float> partial;
  const int64_t cells = p.tokens * p.width, row = std::max(p.width, p.channels) * sizeof(T);
  if ((int64_t)indices.size() < p.neurons) indices.resize(p.neurons), mask.resize(p.neurons);
  if ((int64_t)partial.size() < threads * cells) partial.resize(threads * cells);
  if ((int64_t)nothing.size() < row) nothing.resize(row);
  int32_t* const list = indices.data();
  float* const sums = partial.data();
  const T* const zeros = (const T*)nothing.data();
  const int64_t total = list_active(p, mask.data(), list);
  int team = 1;

  // One region and no barrier within: where threads outnumber cores each costs a time slice.
#pragma omp parallel num_threads(threads)
  {
    const int own = omp_get_thread_num(), all = omp_get_num_threads();
    if (own == 0) team = all;
    float* const sum = sums + own * cells;
    std::memset(sum, 0, cells * sizeof(float));
    const int64_t end = total * (own + 1) / all;
    for (int64_t i = total * own / all; i < end; i += AT_ONCE) {
      const T *down[AT_ONCE], *up[AT_ONCE];
      float share[TOKENS][AT_ONCE], added[AT_ONCE];
      for (int r = 0; r < AT_ONCE; ++r) {
        const bool is_there = i + r < end;
        const int64_t f = list[is_there ? i + r : i];
        down[r] = is_there ? (const T*)p.down + f * p.down_stride : zeros;
        up[r] = is_there ? (const T*)p.up + f * p.up_stride : zeros;
        added[r] = p.up_bias ? p.up_bias[f] : 0;
        for (int64_t m = 0; m < p.tokens; ++m) {
          const float value = p.act[m * p.neurons + f];
          share[m][r] = is_there && active(value, p.threshold) ? value : 0;
        }
      }
      if (p.x) {
        float dot[TOKENS][AT_ONCE];
        int64_t m = 0;
        for (; m + 2 <= p.tokens; m += 2)
          for (int r = 0; r < AT_ONCE; r += 4)
            multiply<2, 4>(dot[m] + r, p.channels, up + r, p.x + m * p.channels);
        if (m < p.tokens) multiply<1, AT_ONCE>(dot[m], p.channels, up, p.x + m * p.channels);
        for (m = 0; m < p.tokens; ++m)
          for (int r = 0; r < AT_ONCE; ++r)
            if (share[m][r] != 0) share[m][r] *= dot[m][r] + added[r];
      }
      add_rows(sum, p.tokens, p.width, down, share);
    }
  }

  const int64_t block = 256, blocks = (p.width + block - 1) / block;
#pragma omp parallel for num_threads(threads) if (team * cells > 1 << 18)
  for (int64_t b = 0; b < p.tokens * blocks; ++b) {
    const int64_t first = b % blocks * block, count = std::min(block, p.width - first), at = b / blocks * p.width + first;
    for (int64_t d = 0; d < count; ++d) p.y[at + d] = p.bias ? p.bias[first + d] : 0;
    for (int t = 0; t < team; ++t)
      for (int64_t d = 0; d < count; ++d) p.y[at + d] += sums[t * cells + at + d];
  }
}

}  // namespace

extern "C" void tokred_neurons(
    const float* act, int64_t tokens, int64_t neurons, double threshold,
    const float* x, const void* up, int64_t up_stride, int64_t channels, const float* up_bias,
    const void* down, int64_t down_stride, int64_t width, const float* bias,
    float* y, int32_t type, int32_t threads) {
  const Problem p = {act, tokens, neurons, (float)threshold, x, up, up_stride, channels, up_bias,
                     down, down_stride, width, bias, y};
  if (type == 0) run<Float32>(p, threads);
  if (type == 1) run<Bfloat16>(p, threads);
  if (type == 2) run<Float16>(p, threads);
}
