// What the linear kernels share: rows of activations quantised on the fly, and a loop over tiles of the result.
//
// A row's scale is max|x| / 127, and xq = round_even(x * (127 / max|x|)). A row with a NaN or an infinity has scale
// NaN; one whose values are all below 2^-100 counts as zero. Either is stored as zeros.

namespace {

constexpr int kVectorsPerPanel = kPanel / kLanes;
constexpr int64_t kRowsPerPass = 1024;               // bounds the scratch memory
constexpr int64_t kMinMacsForThreads = 1 << 18;      // about 10 us of one core; a fork and join take about 2
constexpr int64_t kMinQuantiseForThreads = 1 << 16;  // also about 10 us
constexpr float kSmallestRow = 0x1p-100f;

inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

struct RowRange {
  float scale;
  float inverse;  // 0 if the row is stored as zeros
};

// A row of activations as it is.
template <class T>
struct Plain {
  const T* x;
  F at(int64_t i) const { return load(x + i); }
  F first_at(int64_t i, int n) const { return load_n(x + i, n, 0.0f); }
};

// A row with a factor for each input.
template <class T>
struct Smoothed {
  const T* x;
  const float* factor;
  F at(int64_t i) const { return mul(load(x + i), load(factor + i)); }
  F first_at(int64_t i, int n) const { return mul(load_n(x + i, n, 0.0f), load_n(factor + i, n, 0.0f)); }
};

template <class Row>
RowRange row_range(const Row& row, int64_t k) {
  I bits = izero();
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) bits = magnitude_max(bits, row.at(i));
  if (i < k) bits = magnitude_max(bits, row.first_at(i, static_cast<int>(k - i)));
  int32_t top_bits = itop(bits);
  float largest;
  memcpy(&largest, &top_bits, 4);
  if (top_bits >= 0x7f800000) return {__builtin_nanf(""), 0.0f};
  if (largest < kSmallestRow) return {0.0f, 0.0f};
  return {largest / 127.0f, 127.0f / largest};
}

// Calls write(i, row[i] .. row[i + kLanes) * inverse), with zeros for inputs from k up to a multiple of 4.
template <class Row, class Write>
void for_scaled(const Row& row, int64_t k, float inverse, const Write& write) {
  F factor = set1(inverse);
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) {
    __builtin_prefetch(row.x + i + k);  // the next row: 2 % of 512 rows of 768 inputs
    write(i, mul(row.at(i), factor));
  }
  for (; i < round_up(k, 4); i += kLanes) write(i, mul(row.first_at(i, static_cast<int>(k - i)), factor));
}

// Rows are cut into blocks of at most `most` rows that differ by one row: 8 rows are 4 + 4, not 6 + 2. In memory the
// quads of a block are interleaved, [k/4][rows of the block], so that a tile reads one stream.
struct RowBlocks {
  int64_t rows, count;
  RowBlocks(int64_t total, int64_t most) : rows(total), count((total + most - 1) / most) {}
  int64_t start(int64_t block) const { return block * rows / count; }
  int64_t size(int64_t block) const { return start(block + 1) - start(block); }
};

// What of the weights a tile prefetches: `start` bytes from its own, `step` bytes per cache line of its own.
struct Ahead {
  int64_t start, step;
};

// A strip of `panels` panels is used by `blocks` tiles in turn. Each fetches its share of the next strip, so that the
// strip's bytes are spread over all the time that the multiplications take (cold weights, 8 rows: 1.2 times the speed).
// A strip that is used once is fetched just ahead, past the page where the hardware prefetcher stops: a single panel,
// which is one stream, a page ahead, several panels less, or their streams would crowd each other out.
inline Ahead ahead(int64_t block, int64_t blocks, int64_t panels, int64_t bytes_per_panel) {
  constexpr int64_t kLine = 64;
  if (blocks == 1) return {panels == 1 ? 4096 : 1024, kLine};
  return {panels * bytes_per_panel + block * bytes_per_panel / blocks, kLine / blocks};
}

// Calls tile<rows, panels>(), both at most R and P.
template <int R, int P, class Tile>
void with_sizes(int64_t rows, int64_t panels, const Tile& tile) {
  if constexpr (R > 1) {
    if (rows < R) return with_sizes<R - 1, P>(rows, panels, tile);
  }
  if constexpr (P > 1) {
    if (panels < P) return with_sizes<R, P - 1>(rows, panels, tile);
  }
  tile.template operator()<R, P>();
}

// Calls tile<rows, panels>(first row, first panel, ahead) for tiles of at most R rows by P panels that cover the
// result. A task owns a run of strips and walks each down the rows, so that its weights stay in L2 while the rows
// stream by.
template <int R, int P, class Tile>
void for_tiles(int64_t m, int64_t panels, int64_t bytes_per_panel, bool threads, const Tile& tile) {
  RowBlocks blocks(m, R);
  int64_t strips = (panels + P - 1) / P;
  int64_t wanted = 4 * max_threads();  // enough tasks for threads of uneven speed
  int64_t runs = smaller(strips, 4 * wanted);
  int64_t cuts = smaller(blocks.count, runs >= wanted ? 1 : (wanted + runs - 1) / runs);
  parallel_for(runs * cuts, threads, [&](int64_t task) {
    int64_t run = task / cuts, cut = task % cuts;
    int64_t first = cut * blocks.count / cuts, last = (cut + 1) * blocks.count / cuts;
    for (int64_t strip = run * strips / runs; strip < (run + 1) * strips / runs; ++strip) {
      for (int64_t b = first; b < last; ++b) {
        Ahead fetch = ahead(b - first, last - first, P, bytes_per_panel);
        with_sizes<R, P>(blocks.size(b), panels - strip * P, [&]<int Rows, int Panels>() {
          tile.template operator()<Rows, Panels>(blocks.start(b), strip * P, fetch);
        });
      }
    }
  });
}

// One vector of outputs: y + bias, from `column` on, the first n lanes.
inline F add_bias(F y, FloatPtr bias, int64_t column, int n) {
  if (bias.data == nullptr) return y;
  return add(y, bias.type == Type::f32 ? load_n(static_cast<const float*>(bias.data) + column, n, 0.0f)
                                       : load_n(static_cast<const bf16*>(bias.data) + column, n, 0.0f));
}

}  // namespace
