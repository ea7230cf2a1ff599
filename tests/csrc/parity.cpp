// Compares every entry of one ISA's kernel table with the scalar table on seeded random data.
//
//   parity [seed]        built with -DPOTSTILL_ISA=<isa> and linked with the objects kernels_scalar and kernels_<isa>
//
// It needs no Python, so it also runs under qemu and with emulated intrinsics: that is how the kernels of instruction
// sets that the machine lacks are checked. Every buffer ends at an unmapped page, so that reading or writing one byte
// too many stops the program, and results are written over different fillings, so that a value left out shows.
#include <algorithm>
#include <limits>

#include "../../csrc/kernels/table.h"
#include "harness.h"

#define POTSTILL_JOIN(a, b) a##b
#define POTSTILL_SYMBOL(isa) POTSTILL_JOIN(kernels_, isa)
extern const Kernels kernels_scalar, POTSTILL_SYMBOL(POTSTILL_ISA);

namespace {

const Kernels& tested = POTSTILL_SYMBOL(POTSTILL_ISA);
constexpr float kInf = std::numeric_limits<float>::infinity();

std::string at(size_t i, int64_t columns, float got, float expected) {
  char text[120];
  snprintf(text, sizeof(text), "[%d, %d] is %.9g, scalar %.9g", static_cast<int>(static_cast<int64_t>(i) / columns),
           static_cast<int>(static_cast<int64_t>(i) % columns), static_cast<double>(got),
           static_cast<double>(expected));
  return text;
}

// `tolerance` is relative to values above 1; without one the bits must agree.
void check_same(const Floats& got, const Floats& expected, int64_t columns, float tolerance = 0.0f) {
  std::string difference;
  for (size_t i = 0; i < got.size && difference.empty(); ++i) {
    // Which of two NaNs an addition keeps is the machine's choice.
    bool same = got.bits(i) == expected.bits(i) || (std::isnan(got[i]) && std::isnan(expected[i]));
    if (tolerance > 0.0f && !same) {
      same = std::fabs(got[i] - expected[i]) <= tolerance * std::max(1.0f, std::fabs(expected[i]));
    }
    if (!same) difference = at(i, columns, got[i], expected[i]);
  }
  check(difference.empty(), difference);
}

}  // namespace

#include "kd_loss_parity.h"

namespace {

// ---- int8_linear: bit-identical ----

enum class Data { random, special, extreme, ties };

std::vector<float> activations(int64_t m, int64_t k, Data data) {
  const std::vector<float> odd = {NAN,    kInf,    -kInf,     3.4e38f,          -3.4e38f,
                                  1e-45f, -1e-39f, 0x1p-100f, 0x1.fffffep-101f, -0.0f};
  std::vector<float> x(static_cast<size_t>(m * k));
  for (int64_t r = 0; r < m; ++r) {
    float* row = x.data() + r * k;
    bool sparse = integer(0, 1) == 1;
    float magnitude = std::exp2(uniform(-20, 20));
    for (int64_t i = 0; i < k; ++i) {
      if (data == Data::random) row[i] = normal() * magnitude;
      if (data == Data::special) row[i] = sparse ? 0.0f : normal();
      if (data == Data::extreme) row[i] = integer(0, 3) == 0 ? -1.0f : 1.0f;  // quantised to +-127
      if (data == Data::ties) row[i] = static_cast<float>(integer(-127, 126)) + 0.5f;
    }
    if (k > 0 && data == Data::special) row[integer(0, static_cast<int>(k) - 1)] = pick(odd);
    if (k > 0 && data == Data::ties) row[integer(0, static_cast<int>(k) - 1)] = 127.0f;  // the scale is then exactly 1
  }
  return x;
}

// The layout of table.h.
void pack(const std::vector<int8_t>& w, int64_t n, int64_t k, int8_t* packed) {
  memset(packed, 0, static_cast<size_t>(packed_panels(n) * panel_bytes(k)));
  for (int64_t column = 0; column < n; ++column) {
    int8_t* panel = packed + column / kPanel * panel_bytes(k);
    int64_t lane = column % kPanel;
    int32_t sum = 0;
    for (int64_t i = 0; i < k; ++i) {
      int8_t value = w[static_cast<size_t>(column * k + i)];
      panel[(i / 4 * kPanel + lane) * 4 + i % 4] = value;
      sum += value;
    }
    memcpy(panel + (packed_groups(k) * kPanel + lane) * 4, &sum, 4);
  }
}

void int8_linear(int64_t m, int64_t n, int64_t k, Data data, Type type, bool has_bias, Type bias_type,
                 Activation activation = Activation::none, bool has_residual = false) {
  begin("%s int8_linear m=%d n=%d k=%d data=%d %s bias=%s activation=%d residual=%d", tested.name, static_cast<int>(m),
        static_cast<int>(n), static_cast<int>(k), static_cast<int>(data), name(type),
        has_bias ? name(bias_type) : "none", static_cast<int>(activation), has_residual);
  Floats x(activations(m, k, data), type);
  std::vector<int8_t> w(static_cast<size_t>(n * k));
  for (int8_t& value : w) {
    value = static_cast<int8_t>(data == Data::extreme ? (integer(0, 3) == 0 ? -127 : 127) : integer(-127, 127));
  }
  Guarded packed(static_cast<size_t>(packed_panels(n) * panel_bytes(k)), 1, 0);
  pack(w, n, k, packed.as<int8_t>());
  Floats scale(static_cast<size_t>(n), Type::f32), bias(static_cast<size_t>(n), bias_type);
  for (size_t i = 0; i < scale.size; ++i) {
    scale.set(i, uniform(1e-4f, 1e-2f));
    bias.set(i, normal());
  }
  Floats residual(static_cast<size_t>(m * n), type);
  for (size_t i = 0; i < residual.size; ++i) residual.set(i, normal());
  Floats factor(static_cast<size_t>(k), Type::f32);  // goes with the residual
  for (size_t i = 0; i < factor.size; ++i) factor.set(i, uniform(0.1f, 4));
  auto run = [&](const Kernels& table, int filling, const Floats& y) {
    Guarded scratch(table.int8_linear_scratch(m, n, k), 64, filling);
    FloatPtr none{nullptr, Type::f32};
    const float* factors = has_residual ? factor.memory.as<float>() : nullptr;
    table.int8_linear({x.pointer(), factors, y.pointer(), packed.as<int8_t>(), scale.memory.as<float>(),
                       has_bias ? bias.pointer() : none, has_residual ? residual.pointer() : none, activation, m, n, k,
                       scratch.as<void>()});
  };
  Floats expected(static_cast<size_t>(m * n), type, 0x5a), got(static_cast<size_t>(m * n), type, 0xc5);
  run(kernels_scalar, 0x11, expected);
  run(tested, 0x77, got);
  // With an activation multiply-adds are fused or not; a bf16 may then round the other way.
  float tolerance = type == Type::bf16 ? 0x1p-7f : 1e-6f;
  check_same(got, expected, n, activation == Activation::none ? 0.0f : tolerance);
}

void int8_linear_shapes() {
  std::vector<int64_t> rows = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 67};
  for (int64_t k : {0, 1, 3, 4, 5, 63, 64, 65, 770}) {
    for (int64_t n : {0, 1, 15, 16, 17, 48, 49, 64, 65, 130}) {
      for (int64_t m : rows) {
        int8_linear(m, n, k, pick<Data>({Data::random, Data::special, Data::extreme, Data::ties}),
                    pick<Type>({Type::f32, Type::bf16}), integer(0, 2) > 0, pick<Type>({Type::f32, Type::bf16}));
      }
    }
  }
  // Every combination of data and types, on a shape with tails in all directions; more rows than one pass takes; sums
  // above 2^24, which float32 must round.
  for (Data data : {Data::random, Data::special, Data::extreme, Data::ties}) {
    for (Type type : {Type::f32, Type::bf16}) {
      int8_linear(11, 83, 75, data, type, false, Type::f32);
      int8_linear(11, 83, 75, data, type, true, Type::f32);
      int8_linear(11, 83, 75, data, type, true, Type::bf16);
      int8_linear(1030, 17, 65, data, type, true, type);
      int8_linear(7, 33, 3001, data, type, true, type);
      for (int activation = 0; activation < 5; ++activation) {
        int8_linear(11, 83, 75, data, type, true, type, static_cast<Activation>(activation), activation % 2 == 0);
      }
    }
  }
}

}  // namespace

#include "sparse_linear_parity.h"

namespace {

// ---- int4_linear: bit-identical ----

void int4_linear(int64_t m, int64_t n, int64_t k, int64_t group, Data data, Type type, bool has_zero, bool has_bias) {
  begin("%s int4_linear m=%d n=%d k=%d group=%d data=%d %s zero=%d bias=%d", tested.name, static_cast<int>(m),
        static_cast<int>(n), static_cast<int>(k), static_cast<int>(group), static_cast<int>(data), name(type), has_zero,
        has_bias);
  Floats x(activations(m, k, data), type);
  // Any bytes are good weights: those beyond k and n meet zeros of x, or outputs that are not stored.
  Guarded weight(static_cast<size_t>(packed_panels(n) * packed_blocks(k) * kInt4BlockBytes), 1, 0xff);
  auto scales = static_cast<size_t>(packed_panels(n) * packed_scales(k, group) * kPanel);
  Guarded zero(scales, 1, 0);
  Floats scale(scales, Type::bf16), bias(static_cast<size_t>(n), type);
  if (data != Data::extreme) {
    for (int64_t i = 0; i < packed_panels(n) * packed_blocks(k) * kInt4BlockBytes; ++i) {
      weight.as<uint8_t>()[i] = static_cast<uint8_t>(integer(0, 255));
    }
    for (size_t i = 0; i < scales; ++i) zero.as<uint8_t>()[i] = static_cast<uint8_t>(integer(0, 15));
  }
  for (size_t i = 0; i < scales; ++i) scale.set(i, uniform(-1e-2f, 1e-1f));
  for (size_t i = 0; i < bias.size; ++i) bias.set(i, normal());
  auto run = [&](const Kernels& table, int filling, const Floats& y) {
    Guarded scratch(table.int4_linear_scratch(m, n, k, group), 64, filling);
    Int4Linear a{};
    a.x = x.pointer();
    a.y = y.pointer();
    a.weight = weight.as<uint8_t>();
    a.scale = scale.memory.as<bf16>();
    a.zero = has_zero ? zero.as<uint8_t>() : nullptr;
    a.bias = has_bias ? bias.pointer() : FloatPtr{nullptr, Type::f32};
    a.m = m, a.n = n, a.k = k, a.group = group;
    a.scratch = scratch.as<void>();
    table.int4_linear(a);
  };
  Floats expected(static_cast<size_t>(m * n), type, 0x5a), got(static_cast<size_t>(m * n), type, 0xc5);
  run(kernels_scalar, 0x11, expected);
  run(tested, 0x77, got);
  check_same(got, expected, n);
}

void int4_linear_shapes() {
  for (int64_t k : {0, 1, 3, 31, 32, 33, 64, 127, 130, 770}) {
    for (int64_t n : {0, 1, 15, 16, 17, 33, 65}) {
      for (int64_t m : {0, 1, 2, 3, 4, 5, 6, 7, 8, 13}) {
        int4_linear(m, n, k, pick<int64_t>({32, 64, 128}),
                    pick<Data>({Data::random, Data::special, Data::extreme, Data::ties}),
                    pick<Type>({Type::f32, Type::bf16}), integer(0, 1) == 1, integer(0, 1) == 1);
      }
    }
  }
  for (Data data : {Data::random, Data::special, Data::extreme, Data::ties}) {
    for (int64_t group : {32, 64, 128}) {
      for (bool zero : {false, true}) {
        int4_linear(11, 83, 300, group, data, Type::f32, zero, true);
        int4_linear(1, 83, 300, group, data, Type::bf16, zero, false);
      }
    }
  }
  int4_linear(1030, 17, 65, 32, Data::random, Type::f32, true, true);  // more rows than one pass takes
}

// ---- attention: sums in another order ----

struct AttentionCase {
  int64_t batch, heads, kv_heads, queries, keys, d, dv;
  Type type;
  int mask;  // 0: none, 1: floats, 2: bool
  bool causal, special;
};
void attention(const AttentionCase& c) {
  begin("%s attention [%d %d/%d %d x %d] d=%d dv=%d %s mask=%d causal=%d special=%d", tested.name,
        static_cast<int>(c.batch), static_cast<int>(c.heads), static_cast<int>(c.kv_heads), static_cast<int>(c.queries),
        static_cast<int>(c.keys), static_cast<int>(c.d), static_cast<int>(c.dv), name(c.type), c.mask, c.causal,
        c.special);
  auto count = [&](int64_t heads, int64_t length, int64_t width) {
    return static_cast<size_t>(c.batch * heads * length * width);
  };
  Floats q(count(c.heads, c.queries, c.d), c.type), k(count(c.kv_heads, c.keys, c.d), c.type),
      v(count(c.kv_heads, c.keys, c.dv), c.type);
  for (Floats* x : {&q, &k, &v}) {
    for (size_t i = 0; i < x->size; ++i) x->set(i, normal());
  }
  if (c.special && q.size > 0) q.set(static_cast<size_t>(integer(0, static_cast<int>(q.size) - 1)), NAN);
  Floats added(static_cast<size_t>(c.queries * c.keys), Type::f32);
  Guarded allowed(static_cast<size_t>(c.queries * c.keys), 1, 0);
  for (size_t i = 0; i < added.size; ++i) {
    added.set(i, integer(0, 4) == 0 ? -kInf : normal());
    allowed.as<uint8_t>()[i] = integer(0, 2) != 0;
  }
  auto strides = [](int64_t heads, int64_t length, int64_t width) {  // heads side by side
    return Strides{length * heads * width, width, heads * width};
  };
  size_t outputs = count(c.heads, c.queries, c.dv);
  auto run = [&](const Kernels& table, int filling, const Floats& y) {
    Attention a{};
    a.q = q.pointer(), a.k = k.pointer(), a.v = v.pointer(), a.y = y.pointer();
    a.q_strides = strides(c.heads, c.queries, c.d), a.k_strides = strides(c.kv_heads, c.keys, c.d);
    a.v_strides = strides(c.kv_heads, c.keys, c.dv), a.y_strides = strides(c.heads, c.queries, c.dv);
    if (c.mask == 1) a.mask = static_cast<const float*>(added.pointer().data);
    if (c.mask == 2) a.allowed = allowed.as<uint8_t>();
    a.mask_strides = {0, 0, c.keys};
    a.batch = c.batch, a.heads = c.heads, a.kv_heads = c.kv_heads, a.queries = c.queries, a.keys = c.keys;
    a.d = c.d, a.dv = c.dv, a.scale = 0.3f, a.causal = c.causal;
    Guarded scratch(table.attention_scratch(a), 64, filling);
    a.scratch = scratch.as<void>();
    table.attention(a);
  };
  Floats expected(outputs, c.type, 0x5a), got(outputs, c.type, 0xc5);
  run(kernels_scalar, 0x11, expected);
  run(tested, 0x77, got);
  float unit = c.type == Type::f32 ? 1e-5f : 1e-2f;
  std::string difference;
  for (size_t i = 0; i < outputs && difference.empty(); ++i) {
    if (!close(got[i], expected[i], unit * (1.0f + std::fabs(expected[i]))))
      difference = at(i, c.dv, got[i], expected[i]);
  }
  check(difference.empty(), difference);
}
void attention_cases() {
  for (int repeat = 0; repeat < 200; ++repeat) {
    int64_t kv_heads = integer(1, 2), widths[] = {integer(1, 40), pick<int64_t>({16, 32, 64, 128})};
    attention({integer(0, 2), kv_heads * integer(1, 3), kv_heads, integer(0, 20), integer(0, 90), widths[integer(0, 1)],
               widths[integer(0, 1)], pick<Type>({Type::f32, Type::bf16}), static_cast<int>(integer(0, 2)),
               integer(0, 1) == 1, repeat % 8 == 0});
  }
}

// ---- add_layer_norm: sums in another order ----

struct NormCase {
  int64_t rows, n;
  Type type, parameter_type;
  bool residual, weight, bias, special;
};

// A sum of n terms in another order differs by less than n ulp; normalised values are multiplied by weights below 4.
void add_layer_norm(const NormCase& c) {
  begin("%s add_layer_norm rows=%d n=%d %s residual=%d weight=%d bias=%d special=%d", tested.name,
        static_cast<int>(c.rows), static_cast<int>(c.n), name(c.type), c.residual, c.weight, c.bias, c.special);
  size_t values = static_cast<size_t>(c.rows * c.n), features = static_cast<size_t>(c.n);
  Floats x(values, c.type), residual(values, c.type), weight(features, c.parameter_type),
      bias(features, c.parameter_type);
  for (size_t i = 0; i < values; ++i) {
    x.set(i, normal() + 2.0f);
    residual.set(i, normal());
    if (c.special && integer(0, static_cast<int>(features)) == 0) x.set(i, pick<float>({NAN, kInf, -kInf}));
  }
  for (size_t i = 0; i < features; ++i) {
    weight.set(i, uniform(-4, 4));
    bias.set(i, normal());
  }
  constexpr FloatPtr kNone{nullptr, Type::f32};
  auto run = [&](const Kernels& table, int filling, const Floats& y) {
    Guarded scratch(table.add_layer_norm_scratch(c.n), 64, filling);
    table.add_layer_norm({x.pointer(), c.residual ? residual.pointer() : kNone, c.weight ? weight.pointer() : kNone,
                          c.bias ? bias.pointer() : kNone, y.pointer(), c.rows, c.n, 1e-5f, scratch.as<void>()});
  };
  Floats expected(values, c.type, 0x5a), got(values, c.type, 0xc5);
  run(kernels_scalar, 0x11, expected);
  run(tested, 0x77, got);
  float unit = c.type == Type::f32 ? 1e-6f * (8.0f + static_cast<float>(std::sqrt(c.n))) : 1e-2f;
  std::string difference;
  for (size_t i = 0; i < values && difference.empty(); ++i) {
    if (!close(got[i], expected[i], unit * (4.0f + std::fabs(expected[i]))))
      difference = at(i, c.n, got[i], expected[i]);
  }
  check(difference.empty(), difference);
}

void add_layer_norm_cases() {
  for (int64_t n : {0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 63, 64, 65, 100, 770, 4099}) {
    for (int repeat = 0; repeat < 12; ++repeat) {
      auto any = [] { return integer(0, 1) == 1; };
      add_layer_norm({integer(0, 9), n, pick<Type>({Type::f32, Type::bf16}), pick<Type>({Type::f32, Type::bf16}), any(),
                      any(), any(), repeat % 4 == 0});
    }
  }
}

// ---- int8_embedding: bit-identical ----

void int8_embedding(int64_t table_rows, int64_t rows, int64_t n, Type type) {
  begin("%s int8_embedding table=%d rows=%d n=%d %s", tested.name, static_cast<int>(table_rows), static_cast<int>(rows),
        static_cast<int>(n), name(type));
  Guarded weight(static_cast<size_t>(table_rows * n), 1, 0), indices(static_cast<size_t>(rows) * 8, 8, 0);
  Floats scale(static_cast<size_t>(table_rows), Type::f32);
  for (int64_t i = 0; i < table_rows * n; ++i) weight.as<int8_t>()[i] = static_cast<int8_t>(integer(-127, 127));
  for (size_t i = 0; i < scale.size; ++i) scale.set(i, uniform(1e-4f, 1e-2f));
  for (int64_t i = 0; i < rows; ++i) indices.as<int64_t>()[i] = integer(0, static_cast<int>(table_rows) - 1);
  Floats expected(static_cast<size_t>(rows * n), type, 0x5a), got(static_cast<size_t>(rows * n), type, 0xc5);
  for (auto [table, y] : {std::pair{&kernels_scalar, &expected}, std::pair{&tested, &got}}) {
    table->int8_embedding(
        {weight.as<int8_t>(), scale.memory.as<float>(), indices.as<int64_t>(), y->pointer(), rows, n});
  }
  std::string difference;
  for (size_t i = 0; i < got.size && difference.empty(); ++i) {
    if (got.bits(i) != expected.bits(i)) difference = at(i, n, got[i], expected[i]);
  }
  check(difference.empty(), difference);
}

void int8_embedding_cases() {
  for (int64_t n : {0, 1, 3, 4, 7, 8, 15, 16, 17, 63, 64, 65, 770}) {
    for (int64_t rows : {0, 1, 2, 5, 67}) {
      for (Type type : {Type::f32, Type::bf16}) int8_embedding(integer(1, 40), rows, n, type);
    }
  }
}

// ---- the ceilings: nothing to compare but that they count what they did and read what they were given ----

void ceilings() {
  begin("%s ceilings", tested.name);
  check(tested.peak_int8(200) > 0 && tested.peak_int8(2000) == 10 * tested.peak_int8(200), "peak_int8 miscounts");
  check(tested.peak_f32(200) > 0 && tested.peak_f32(2000) == 10 * tested.peak_f32(200), "peak_f32 miscounts");
  Floats data(4096, Type::f32);
  for (size_t i = 0; i < data.size; ++i) data.set(i, 1.5f);
  int32_t largest = 0x3fc00000;  // the bits of 1.5f
  check(tested.read_memory(data.memory.as<void>(), 16384, 2) == largest, "read_memory misreads");
}

}  // namespace

int main(int count, char** arguments) {
  unsigned seed = count > 1 ? static_cast<unsigned>(strtoul(arguments[1], nullptr, 10)) : 1;
  generator.seed(seed);
  explain_faults();
  int8_linear_shapes();
  int4_linear_shapes();
  sparse_cases();
  kd_loss_cases();
  add_layer_norm_cases();
  attention_cases();
  int8_embedding_cases();
  ceilings();
  if (failures > 0) {
    fprintf(stderr, "%s: %ld of %ld checks failed (seed %u)\n", tested.name, failures, checks, seed);
    return 1;
  }
  printf("%s: %ld checks passed (seed %u)\n", tested.name, checks, seed);
}
