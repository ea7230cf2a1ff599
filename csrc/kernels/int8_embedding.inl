// y[i] = weight[indices[i]] scale[indices[i]]: rows of int8 are gathered and widened, one product per value.
//
// Bounds: a read of a byte and a write of a value each; where the table is out of the caches, the latency of a row's
// first lines, which is hidden by fetching the rows that come next. The products of int8 and float32 are rounded once
// (bf16: twice), so every ISA gives the same bits as the reference.

namespace {

constexpr int64_t kRowsAhead = 4;  // fetched while one is written: some 300 ns of rows of 768
constexpr int64_t kCacheLine = 64;
constexpr int64_t kGatheredPerTask = 1 << 13;        // some microseconds
constexpr int64_t kMinGatheredForThreads = 1 << 15;  // about 5 us of one core; a fork and join take about 2

template <class T>
void gather_row(const Int8Embedding& a, int64_t position) {
  const int8_t* w = a.weight + a.indices[position] * a.n;
  T* y = static_cast<T*>(a.y.data) + position * a.n;
  F scale = set1(a.scale[a.indices[position]]);
  int64_t i = 0;
  for (; i + kLanes <= a.n; i += kLanes) store(y + i, mul(load(w + i), scale));
  int tail = static_cast<int>(a.n - i);
  if (tail > 0) store_n(y + i, mul(load_n(w + i, tail, 0.0f), scale), tail);
}

template <class T>
void int8_embedding_of(const Int8Embedding& a) {
  int64_t grain = a.n < kGatheredPerTask ? kGatheredPerTask / a.n : 1;
  parallel_for((a.rows + grain - 1) / grain, a.rows * a.n >= kMinGatheredForThreads, [&](int64_t task) {
    int64_t last = smaller(a.rows, (task + 1) * grain);
    for (int64_t row = task * grain; row < last; ++row) {
      if (row + kRowsAhead < last) {
        const int8_t* next = a.weight + a.indices[row + kRowsAhead] * a.n;
        for (int64_t i = 0; i < a.n; i += kCacheLine) __builtin_prefetch(next + i);
      }
      gather_row<T>(a, row);
    }
  });
}

void int8_embedding(const Int8Embedding& a) {
  if (a.rows == 0 || a.n == 0) return;
  a.y.type == Type::f32 ? int8_embedding_of<float>(a) : int8_embedding_of<bf16>(a);
}

}  // namespace
