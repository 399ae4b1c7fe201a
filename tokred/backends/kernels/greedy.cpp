// The CPU kernel of tokred::greedy_diverse for "sum" and "max", plain C for ctypes: see greedy.py.
//
// One sample: `count` of `rows` unit rows [rows, width], one after the other. A step reads all rows once, so each thread
// keeps to its own share of them, which stays in that core's cache from step to step.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <omp.h>

namespace {

// Vectors may lie anywhere in arrays of numbers.
template <class T>
struct Lanes {
  static constexpr int count = 32 / sizeof(T);
  typedef T type __attribute__((vector_size(32), aligned(alignof(T)), may_alias));
};

template <class T>
T dot(const T* a, const T* b, int64_t width) {
  using Vector = typename Lanes<T>::type;
  constexpr int lanes = Lanes<T>::count;
  Vector sums[4] = {};
  int64_t d = 0;
  for (; d + 4 * lanes <= width; d += 4 * lanes) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      sums[v] += *reinterpret_cast<const Vector*>(a + d + v * lanes) * *reinterpret_cast<const Vector*>(b + d + v * lanes);
    }
  }
  const Vector all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  T sum = 0;
  for (int lane = 0; lane < lanes; ++lane) sum += all[lane];
  for (; d < width; ++d) sum += a[d] * b[d];
  return sum;
}

template <class T>
void choose(const T* unit, const T* weight, const T* ceiling, int64_t rows, int64_t width, int64_t count, bool sum,
            int64_t first, T tie, int64_t* chosen, int threads) {
  std::vector<T> near(rows, sum ? 0 : -1), most(ceiling, ceiling + rows), value(rows), best(threads);
  std::vector<int64_t> lowest(threads);
#pragma omp parallel num_threads(threads)
  {
    const int team = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t from = rows * me / team, to = rows * (me + 1) / team;
    for (int64_t step = 0; step < count; ++step) {
      T mine = -std::numeric_limits<T>::infinity();
      for (int64_t v = from; v < to; ++v) {
        value[v] = std::min(sum ? -near[v] : weight[v] * (1 - near[v]), most[v]);
        mine = std::max(mine, value[v]);
      }
      best[me] = mine;
#pragma omp barrier
      const T top = *std::max_element(best.begin(), best.begin() + team);
      const T enough = top - tie * std::max(std::fabs(top), T(1));
      lowest[me] = std::find_if(value.begin() + from, value.begin() + to, [=](T x) { return x >= enough; }) - value.begin();
      if (lowest[me] == to) lowest[me] = rows;
#pragma omp barrier
      const bool given = step == 0 && first >= 0;
      const int64_t row = given ? first : *std::min_element(lowest.begin(), lowest.begin() + team);
      if (me == 0) chosen[step] = row;
      if (from <= row && row < to) most[row] = -std::numeric_limits<T>::infinity();
      for (int64_t v = from; v < to && step + 1 < count; ++v) {
        const T similar = dot(unit + v * width, unit + row * width, width);
        near[v] = sum ? near[v] + similar : std::max(near[v], similar);
      }
    }
  }
}

}  // namespace

extern "C" void greedy_float32(const float* unit, const float* weight, const float* ceiling, int64_t rows, int64_t width,
                               int64_t count, int32_t sum, int64_t first, double tie, int64_t* chosen, int32_t threads) {
  choose(unit, weight, ceiling, rows, width, count, sum, first, static_cast<float>(tie), chosen, threads);
}

extern "C" void greedy_float64(const double* unit, const double* weight, const double* ceiling, int64_t rows,
                               int64_t width, int64_t count, int32_t sum, int64_t first, double tie, int64_t* chosen,
                               int32_t threads) {
  choose(unit, weight, ceiling, rows, width, count, sum, first, tie, chosen, threads);
}
