// csrc/cuda/int8_24.h on the CPU: the threads of a block one after the other, mma.sp, ldmatrix and cp.async by what PTX
// says of them, against a plain product. Needs no CUDA. .ci/parity builds and runs it; with the argument "layout" it
// prints where the bytes of a step of a packed weight come from, for tests/test_int8_24.py.
#include <algorithm>
#include <deque>
#include <limits>
#include <memory>

#include "../../csrc/cuda/int8_24.h"
#include "harness.h"

namespace {

using namespace int8_24;

// A check whose text is made only when it fails: millions pass.
void expect(bool good, const char* what, int where) {
  if (!good) check(false, std::string(what) + " at " + std::to_string(where));
}

// ---- shared memory that knows when threads may touch it ----

// A phase ends where all threads meet. What a phase writes may be read in a later one, and what it reads overwritten.
class Shared {
 public:
  static constexpr int kInFlight = std::numeric_limits<int>::max();

  void next_phase() { ++phase_; }
  void overwrite(int at) {
    expect(at % 16 == 0 && at + 16 <= kSharedBytes, "copies outside", at);
    expect(last_read_[at / 16] < phase_, "overwrites what may still be read", at);
    written_[at / 16] = kInFlight;
  }
  void arrive(int at, const void* from, int bytes) {
    memset(bytes_ + at, 0, 16);
    memcpy(bytes_ + at, from, static_cast<size_t>(bytes));
    written_[at / 16] = phase_;
  }
  void write(int at, const void* from, int bytes) {
    expect(last_read_[at / 16] < phase_, "writes over what may still be read", at);
    memcpy(bytes_ + at, from, static_cast<size_t>(bytes));
    written_[at / 16] = phase_;
  }
  void read(int at, void* to, int bytes) {
    expect(at % bytes == 0 && at + bytes <= kSharedBytes, "reads outside", at);
    expect(written_[at / 16] < phase_, "reads what may not be there yet", at);
    memcpy(to, bytes_ + at, static_cast<size_t>(bytes));
    last_read_[at / 16] = phase_;
  }

 private:
  int phase_ = 1;
  uint8_t bytes_[kSharedBytes] = {};
  int written_[kSharedBytes / 16] = {}, last_read_[kSharedBytes / 16] = {};
};

uint16_t bf16_bits(float number) {
  uint32_t bits;
  memcpy(&bits, &number, 4);
  if (std::isnan(number)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t f16_bits(float number) {
  float size = std::fabs(number);
  int sign = std::signbit(number) ? 0x8000 : 0, magnitude = 0x7c00;
  if (std::isnan(number)) magnitude = 0x7e00;
  if (size < 65520.0f) {  // what would round to less than infinity
    int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
    int units = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
    magnitude = (exponent + 14) * 1024 + units;  // the implicit bit carries into the exponent
  }
  return static_cast<uint16_t>(sign | magnitude);
}

// ---- threads ----

struct Thread {
  struct Copy {
    int to;
    const void* from;
    int bytes;
  };

  void copy(int to, const void* from, int bytes) {
    shared->overwrite(to);
    open.push_back({to, from, bytes});
  }
  void commit() {
    committed.push_back(open);
    open.clear();
  }
  // As late as the hardware may: a wait that counts too few commits leaves the data out.
  void arrive(size_t pending) {
    while (committed.size() > pending) {
      for (const Copy& c : committed.front()) shared->arrive(c.to, c.from, c.bytes);
      committed.pop_front();
    }
  }

  void read(int from, uint32_t (&to)[4]) { shared->read(from, to, 16); }
  // Matrix r is the 8 rows of 16 bytes to which lanes 8r to 8r + 7 point; lane 4i + j takes word j of row i.
  template <class Place>
  void read_matrices(Place place, uint32_t (&to)[4]) {
    int lane = index % 32;
    for (int r = 0; r < 4; ++r) shared->read(place(8 * r + lane / 4) + 4 * (lane % 4), &to[r], 4);
  }

  template <Float type>
  void write(int to, float number) {
    uint16_t half = type == Float::bf16 ? bf16_bits(number) : f16_bits(number);
    if (type == Float::f32) shared->write(to, &number, 4);
    if (type != Float::f32) shared->write(to, &half, 2);
  }
  void store(const uint32_t (&line)[4], void* to) {
    expect(reinterpret_cast<uintptr_t>(to) % 16 == 0, "stores unaligned", index);
    memcpy(to, line, 16);
  }
  float number(const void* array, Float type, int i) {
    expect(type == Float::f32, "has a bias of another type", i);
    return static_cast<const float*>(array)[i];
  }

  int index;
  Shared* shared;
  Registers registers{};
  std::vector<Copy> open{};
  std::deque<std::vector<Copy>> committed{};
};

// ---- mma.sp::ordered_metadata.m16n8k64, written from PTX ISA's section on its fragments, not from fragments.h ----

int8_t byte_of(const uint32_t* registers, int i) { return static_cast<int8_t>(registers[i / 4] >> 8 * (i % 4)); }

void multiply_add(Thread* warp, int which, int tile, int column_tile) {
  int a[16][64] = {}, b[64][8];
  for (int lane = 0; lane < 32; ++lane) {
    int group = lane >> 2, in_group = lane % 4;
    const Fragments& f = warp[lane].registers.fragments[which];
    for (int i = 0; i < 16; ++i) {
      int row = i < 4 || (i >= 8 && i < 12) ? group : group + 8;
      int first_column = in_group * 8 + (i < 8 ? 0 : 32);  // of 8, in which four numbers are kept
      int chunk = first_column / 4 + i % 4 / 2;
      // The figures: T0 has row 0, columns 0 to 31, T1 row 8, T2 and T3 the same rows, columns 32 to 63.
      int owner = 4 * (row % 8) + (row >= 8 ? 1 : 0) + (chunk >= 8 ? 2 : 0);
      uint32_t nibble = warp[owner].registers.fragments[which].metadata[tile] >> 4 * (chunk % 8) & 15;
      expect((nibble & 3) < nibble >> 2, "metadata is not ordered", row);
      int place = static_cast<int>(i % 2 == 0 ? nibble & 3 : nibble >> 2);
      a[row][4 * chunk + place] = byte_of(f.a[tile], i);
    }
    for (int i = 0; i < 16; ++i) b[16 * (i / 4) + in_group * 4 + i % 4][group] = byte_of(f.b[column_tile], i);
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      int row = (lane >> 2) + (i < 2 ? 0 : 8), column = lane % 4 * 2 + (i & 1), sum = 0;
      for (int k = 0; k < 64; ++k) sum += a[row][k] * b[k][column];
      warp[lane].registers.sums[tile][column_tile][i] += sum;
    }
  }
}

struct Block {
  Block() {
    for (int i = 0; i < kThreads; ++i) threads.push_back({i, &shared});
  }
  template <class Function>
  void each(Function function) {
    for (Thread& t : threads) function(t);
  }
  template <int pending>
  void wait() {
    for (Thread& t : threads) t.arrive(pending);
    shared.next_phase();
  }
  void multiply(int which) {
    for (int warp = 0; warp < kThreads; warp += 32) {
      for (int i = 0; i < kTiles; ++i) {
        for (int j = 0; j < kWarpTiles; ++j) multiply_add(&threads[static_cast<size_t>(warp)], which, i, j);
      }
    }
  }

  Shared shared;
  std::vector<Thread> threads{};
};

// ---- weights ----

struct Weight {
  int n, k;
  std::vector<int8_t> kept;      // [n, k / 2]
  std::vector<uint8_t> indices;  // [n, k / 8]: the nibble of group j is half j % 2 of byte j / 2
};

Weight random_weight(int n, int k) {
  Weight w{n, k, {}, {}};
  auto nibble = [] {
    int first = integer(0, 2);
    return first | integer(first + 1, 3) << 2;
  };
  for (int i = 0; i < n * k / 2; ++i) w.kept.push_back(static_cast<int8_t>(integer(-128, 127)));
  for (int i = 0; i < n * k / 8; ++i) w.indices.push_back(static_cast<uint8_t>(nibble() | nibble() << 4));
  return w;
}

// As potstill.ops.cuda.int8_24.lay_out does; outputs and inputs that are missing are zeros in places 0 and 1.
void pack(const Weight& w, uint8_t* packed) {
  int steps = tiles_of(w.k, kInputs) * kSteps, blocks = tiles_of(w.n, kOutputs) * kBlocks;
  for (int i = 0; i < blocks * steps * kStepBytes; ++i) {
    int block = i / kStepBytes / steps, step = i / kStepBytes % steps, byte = i % kStepBytes;
    bool value = byte < kValueBytes;
    Place place = value ? kept_at(byte) : indices_at(byte - kValueBytes);
    int width = value ? w.k / 2 : w.k / 8;
    int row = block * kBlock + place.row, column = step * (value ? kKept : kStep / 8) + place.column;
    packed[i] = value ? 0 : 0x44;
    if (row >= w.n || column >= width) continue;
    auto at = static_cast<size_t>(row * width + column);
    packed[i] = value ? static_cast<uint8_t>(w.kept[at]) : w.indices[at];
  }
}

std::vector<int> dense_row(const Weight& w, int row) {
  std::vector<int> dense(static_cast<size_t>(w.k));
  for (int i = 0; i < w.k / 2; ++i) {
    int group = i / 2, nibble = w.indices[static_cast<size_t>(row * (w.k / 8) + group / 2)] >> 4 * (group % 2) & 15;
    int place = i % 2 == 0 ? nibble & 3 : nibble >> 2;
    dense[static_cast<size_t>(4 * group + place)] = w.kept[static_cast<size_t>(row * (w.k / 2) + i)];
  }
  return dense;
}

// ---- the checks ----

void layer(int m, int n, int k, Float type, bool bias, int more) {
  begin("int8_24 m=%d n=%d k=%d type=%d bias=%d stride=k+%d", m, n, k, static_cast<int>(type), bias, more);
  Weight w = random_weight(n, k);
  auto bytes = [](int64_t rows, int64_t columns) { return static_cast<size_t>(rows * columns); };
  Guarded packed(bytes(tiles_of(n, kOutputs) * kBlocks, tiles_of(k, kInputs) * kSteps * kStepBytes), 16, 0x77);
  pack(w, packed.as<uint8_t>());
  Guarded x(bytes(m, k + more) - static_cast<size_t>(more), 16, 0x5a);
  int size = type == Float::f32 ? 4 : 2;
  Guarded y(bytes(m, n * size), n * size % 16 == 0 ? 16 : static_cast<size_t>(size), 0xc5);
  auto numbers = [](int count) {
    std::vector<float> f(static_cast<size_t>(count));
    for (float& number : f) number = uniform(0.001f, 0.01f);
    return f;
  };
  Floats x_scale(numbers(m), Type::f32), scale(numbers(n), Type::f32), biases(numbers(n), Type::f32);
  for (int row = 0; row < m; ++row) {
    for (int i = 0; i < k; ++i) x.as<int8_t>()[row * (k + more) + i] = static_cast<int8_t>(integer(-128, 127));
  }
  Linear p{x.as<int8_t>(),
           x_scale.memory.as<float>(),
           packed.as<uint8_t>(),
           scale.memory.as<float>(),
           bias ? biases.memory.as<void>() : nullptr,
           y.as<void>(),
           k + more,
           m,
           n,
           k,
           Float::f32,
           type};
  for (int i = 0; i < tiles_of(m, kRows) * tiles_of(n, kOutputs); ++i) {
    auto block = std::make_unique<Block>();
    compute(*block, p, tile_at(i, m, n));
  }
  int wrong = 0;
  for (int output = 0; output < n; ++output) {
    std::vector<int> dense = dense_row(w, output);
    for (int row = 0; row < m; ++row) {
      int32_t sum = 0;
      for (int i = 0; i < k; ++i) sum += dense[static_cast<size_t>(i)] * x.as<int8_t>()[row * (k + more) + i];
      float expected =
          static_cast<float>(sum) * (x_scale[static_cast<size_t>(row)] * scale[static_cast<size_t>(output)]);
      if (bias) expected += biases[static_cast<size_t>(output)];
      uint32_t bits;
      memcpy(&bits, &expected, 4);
      int at = row * n + output;
      if (type == Float::f32) wrong += y.as<uint32_t>()[at] != bits;
      if (type == Float::bf16) wrong += y.as<uint16_t>()[at] != bf16_bits(expected);
      if (type == Float::f16) wrong += y.as<uint16_t>()[at] != f16_bits(expected);
    }
  }
  check(wrong == 0, std::to_string(wrong) + " of " + std::to_string(m * n) + " outputs differ");
}

void layers() {
  for (int k : {16, 64, 128, 192, 256, 272, 640}) layer(integer(1, 40), integer(1, 140), k, Float::f32, true, 0);
  std::pair<int, int> sizes[] = {{1, 1}, {128, 128}, {129, 127}, {3, 136}, {257, 130}, {130, 264}};
  for (auto [m, n] : sizes) {
    for (Float type : {Float::f32, Float::bf16, Float::f16}) {
      layer(m, n, 16 * integer(1, 24), type, integer(0, 1) == 1, 16 * integer(0, 2));
    }
  }
}

// Every byte of a step comes from one place, and every place is in one byte; the registers are those of PTX.
void layouts() {
  begin("layout of a step");
  int kept[kBlock][kKept] = {}, indices[kBlock][kStep / 8] = {};
  for (int byte = 0; byte < kValueBytes; ++byte) ++kept[kept_at(byte).row][kept_at(byte).column];
  for (int byte = 0; byte < kBlock * kStep / 8; ++byte) ++indices[indices_at(byte).row][indices_at(byte).column];
  for (auto& row : kept) check(std::all_of(std::begin(row), std::end(row), [](int n) { return n == 1; }), "values");
  for (auto& row : indices) check(std::all_of(std::begin(row), std::end(row), [](int n) { return n == 1; }), "indices");
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 16; ++i) {
      Place row = place_of_matrix_row(8 * (i / 4) + lane / 4), b = place_in_b(lane, i / 4, i % 4);
      check(b.column == row.row && b.row == 16 * row.column + 4 * (lane % 4) + i % 4, "ldmatrix does not load B");
    }
  }
}

// The words to which the lanes of one access point lie in different banks of 4 bytes.
void banks() {
  begin("banks of shared memory");
  auto distinct = [](auto address) {  // eight addresses of 16 bytes
    int seen = 0;
    for (int i = 0; i < 8; ++i) seen |= 1 << address(i) / 16 % 8;
    return seen == 255;
  };
  for (int row = 0; row < kRows; ++row) {
    check(distinct([=](int i) { return swizzled(row, i); }), "a row is written with conflicts");
    for (int chunk = 0; chunk < 8; ++chunk) {
      check(distinct([=](int i) { return swizzled(row / 8 * 8 + i, chunk); }), "a matrix is read with conflicts");
    }
  }
  for (int width : {2, 4}) {
    int word_in[32] = {};
    for (int lane = 0; lane < 32; ++lane) {
      int word = (place_in_c(lane, 0).column * row_bytes(width) + place_in_c(lane, 0).row * width) / 4;
      int& known = word_in[word % 32];
      check(known == 0 || known == word + 1, "a result is written with conflicts");
      known = word + 1;
    }
  }
}

void tile_order() {
  for (auto [m, n] : {std::pair{1, 1}, {1000, 1}, {1, 1000}, {128 * 17, 128 * 3}, {2000, 1500}}) {
    begin("order of tiles m=%d n=%d", m, n);
    int below = tiles_of(m, kRows), across = tiles_of(n, kOutputs);
    std::vector<int> seen(static_cast<size_t>(below * across));
    for (int i = 0; i < below * across; ++i) {
      Tile tile = tile_at(i, m, n);
      bool inside = tile.row % kRows == 0 && tile.output % kOutputs == 0 && tile.row < m && tile.output < n;
      check(inside, "a tile outside");
      if (inside) ++seen[static_cast<size_t>(tile.row / kRows * across + tile.output / kOutputs)];
    }
    check(std::all_of(seen.begin(), seen.end(), [](int n) { return n == 1; }), "a tile is not computed once");
  }
}

void print_layout() {
  for (int byte = 0; byte < kStepBytes; ++byte) {
    Place place = byte < kValueBytes ? kept_at(byte) : indices_at(byte - kValueBytes);
    printf("%d %d\n", place.row, place.column);
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && strcmp(arguments[1], "layout") == 0) {
    print_layout();
    return 0;
  }
  unsigned seed = count > 1 ? static_cast<unsigned>(strtoul(arguments[1], nullptr, 10)) : 1;
  generator.seed(seed);
  explain_faults();
  layouts();
  banks();
  tile_order();
  layers();
  if (failures > 0) {
    fprintf(stderr, "int8_24: %ld of %ld checks failed (seed %u)\n", failures, checks, seed);
    return 1;
  }
  printf("int8_24: %ld checks passed (seed %u)\n", checks, seed);
}
