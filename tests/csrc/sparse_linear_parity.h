// sparse_int8_linear: the bits of int8_linear with the zeros in it. sparse_linear: within rounding. Included by
// parity.cpp, which has the activations.
#pragma once
#include <omp.h>

#include <algorithm>
#include <list>

#include "../../csrc/kernels/sparse_layout.h"

namespace {

// The parts of a packed weight while they grow.
template <class Value>
struct SparseParts {
  std::vector<int64_t> first{0};
  std::vector<int32_t> sums;
  std::vector<uint8_t> steps, outputs, index;
  std::vector<Value> values;

  std::vector<char> joined(bool few, int64_t n, int64_t k) const {
    std::vector<char> packed;
    auto add = [&](const void* data, size_t bytes) {
      size_t at = packed.size();
      packed.resize(at + (bytes + 63) / 64 * 64);
      if (bytes > 0) memcpy(packed.data() + at, data, bytes);
    };
    int64_t head[8] = {kSparseMagic, few, n, k, static_cast<int64_t>(index.size()), sizeof(Value), 0, 0};
    add(head, sizeof(head));
    add(first.data(), first.size() * 8);
    add(sums.data(), sizeof(Value) == 1 ? sums.size() * 4 : 0);
    add(steps.data(), steps.size());
    add(outputs.data(), outputs.size());
    add(index.data(), index.size());
    add(values.data(), values.size() * sizeof(Value));
    return packed;
  }
};

template <class Value>
struct SparseBlock {
  int64_t index;
  Value values[4];
};

template <class Value>
using SparseLists = std::vector<std::vector<SparseBlock<Value>>>;  // of each output

// Appends the lanes of one group in step; zeros stand where an output has no block.
template <class Value>
void add_group(SparseParts<Value>& parts, const SparseLists<Value>& lists, const size_t* order, size_t lanes,
               bool apart) {
  size_t most = 0;
  for (size_t i = 0; i < lanes; ++i) most = std::max(most, lists[order[i]].size());
  parts.steps.push_back(static_cast<uint8_t>(most));
  for (size_t step = 0; step < most; ++step) {
    std::vector<SparseBlock<Value>> row;
    for (size_t i = 0; i < lanes; ++i) {
      const auto& own = lists[order[i]];
      row.push_back(step < own.size() ? own[step] : SparseBlock<Value>{});
      parts.index.push_back(static_cast<uint8_t>(row.back().index));
    }
    for (size_t a = 0; a < (apart ? 4 : lanes); ++a) {  // apart: all first values, all second ones, ..
      for (size_t b = 0; b < (apart ? lanes : 4); ++b) {
        parts.values.push_back(apart ? row[b].values[a] : row[a].values[b]);
      }
    }
  }
}

// A weight in the layout of sparse_layout.h, packed slowly: Value is int8_t or float.
template <class Value>
std::vector<char> pack_sparse(const std::vector<Value>& w, int64_t n, int64_t k, bool few) {
  int64_t blocks = std::max<int64_t>(packed_groups(k), 1), width = few ? kPanel : kStrip;
  int64_t span = few ? kWindow : chunk_blocks(sizeof(Value)), spans = parts_of(blocks, span);
  auto lanes = static_cast<size_t>(few ? kPanel : kGroup);
  SparseParts<Value> parts;
  parts.sums.resize(static_cast<size_t>(parts_of(n, width) * width));
  for (int64_t start = 0; start < n; start += width) {
    for (int64_t s = 0; s < spans; ++s) {
      SparseLists<Value> lists(static_cast<size_t>(width));
      std::vector<size_t> order;
      for (int64_t o = 0; o < width; ++o) {
        order.push_back(static_cast<size_t>(o));
        for (int64_t b = s * span; b < std::min(blocks, (s + 1) * span) && start + o < n; ++b) {
          SparseBlock<Value> block{b - s * span, {}};
          bool zero = true;
          for (int64_t i = 0; i < 4 && b * 4 + i < k; ++i) {
            block.values[i] = w[static_cast<size_t>((start + o) * k + b * 4 + i)];
            zero = zero && block.values[i] == 0;
            parts.sums[static_cast<size_t>(start + o)] += static_cast<int32_t>(block.values[i]);
          }
          if (!zero) lists[static_cast<size_t>(o)].push_back(block);
        }
      }
      if (!few) {
        std::stable_sort(order.begin(), order.end(),
                         [&](size_t a, size_t b) { return lists[a].size() > lists[b].size(); });
        for (size_t o : order) parts.outputs.push_back(static_cast<uint8_t>(o));
      }
      for (size_t at = 0; at < order.size(); at += lanes) {
        add_group(parts, lists, order.data() + at, lanes, few && sizeof(Value) == 4);
      }
      if (!few || s + 1 == spans) parts.first.push_back(static_cast<int64_t>(parts.index.size()));
    }
  }
  return parts.joined(few, n, k);
}

// What both ops share; of 10 blocks `zeros` are zero, and `damage` bytes are overwritten at random: of those that
// nobody checks after the weight is read, or before it is, of all.
struct SparseCase {
  int64_t m, n, k;
  int zeros;
  bool few;
  Type type;
  bool has_bias, has_residual, has_factor;
  Activation activation;
  Data data;
  int damage;
  bool damaged_before;
};

template <class Value>
std::vector<Value> with_zeros(const SparseCase& c) {
  std::vector<Value> w(static_cast<size_t>(c.n * c.k));
  for (int64_t o = 0; o < c.n; ++o) {
    for (int64_t b = 0; b < c.k; b += 4) {
      if (integer(0, 9) < c.zeros) continue;
      for (int64_t i = b; i < std::min(b + 4, c.k); ++i) {
        w[static_cast<size_t>(o * c.k + i)] =
            static_cast<Value>(integer(-127, 127)) / Value{sizeof(Value) == 1 ? 1 : 64};
      }
    }
  }
  return w;
}

// A packed weight at the end of a page, and what bias and residual the case has.
template <class Value>
struct SparseInputs {
  std::vector<Value> weight;
  std::vector<char> packed;
  Guarded memory;
  Floats bias, residual;

  explicit SparseInputs(const SparseCase& c)
      : weight(with_zeros<Value>(c)),
        packed(pack_sparse(weight, c.n, c.k, c.few)),
        memory(packed.size(), 64, 0),
        bias(static_cast<size_t>(c.n), c.type),
        residual(static_cast<size_t>(c.m * c.n), c.type) {
    for (size_t i = 0; i < bias.size; ++i) bias.set(i, normal());
    for (size_t i = 0; i < residual.size; ++i) residual.set(i, normal());
  }

  // False if the damage was seen.
  bool read(const SparseCase& c, SparseWeight& w) {
    memcpy(memory.as<char>(), packed.data(), packed.size());
    auto bytes = static_cast<int64_t>(packed.size());
    if (c.damaged_before) spoil(c.damage, 0);
    const char* wrong = read_sparse(memory.as<void>(), bytes, c.n, c.k, sizeof(Value), w);
    check(wrong == nullptr || c.damaged_before, wrong == nullptr ? "" : wrong);
    if (wrong != nullptr) return false;
    if (!c.damaged_before) spoil(c.damage, reinterpret_cast<const char*>(w.steps) - memory.as<char>());
    return true;
  }

  void spoil(int count, int64_t from) {
    for (int i = 0; i < count; ++i) {
      int at = integer(static_cast<int>(from), static_cast<int>(packed.size()) - 1);
      memory.as<char>()[at] = static_cast<char>(integer(-128, 127));
    }
  }
};

void begin_sparse(const char* op, const SparseCase& c) {
  begin("%s %s m=%d n=%d k=%d zeros=%d few=%d %s bias=%d residual=%d factor=%d activation=%d data=%d damage=%d %d",
        tested.name, op, static_cast<int>(c.m), static_cast<int>(c.n), static_cast<int>(c.k), c.zeros, c.few,
        name(c.type), c.has_bias, c.has_residual, c.has_factor, static_cast<int>(c.activation),
        static_cast<int>(c.data), c.damage, c.damaged_before);
}

void sparse_int8_linear(const SparseCase& c) {
  begin_sparse("sparse_int8_linear", c);
  SparseInputs<int8_t> in(c);
  Floats x(activations(c.m, c.k, c.data), c.type), scale(static_cast<size_t>(c.n), Type::f32);
  for (size_t i = 0; i < scale.size; ++i) scale.set(i, uniform(1e-4f, 1e-2f));
  Floats expected(static_cast<size_t>(c.m * c.n), c.type, 0x5a), got(static_cast<size_t>(c.m * c.n), c.type, 0xc5);
  Floats factor(static_cast<size_t>(c.k), Type::f32);
  for (size_t i = 0; i < factor.size; ++i) factor.set(i, uniform(0.1f, 4));
  SparseInt8Linear a{};
  if (!in.read(c, a.weight)) return;
  if (c.has_factor) a.dense.factor = factor.memory.as<float>();
  a.dense.x = x.pointer(), a.dense.y = got.pointer(), a.dense.scale = scale.memory.as<float>();
  a.dense.m = c.m, a.dense.n = c.n, a.dense.k = c.k, a.dense.activation = c.activation;
  if (c.has_bias) a.dense.bias = in.bias.pointer();
  if (c.has_residual) a.dense.residual = in.residual.pointer();
  Guarded scratch(tested.sparse_int8_linear_scratch(a), 64, 0x77);
  a.dense.scratch = scratch.as<void>();
  tested.sparse_int8_linear(a);
  if (c.damage > 0) return;  // it only has to stay inside
  Guarded dense(static_cast<size_t>(packed_panels(c.n) * panel_bytes(c.k)), 1, 0);
  Guarded room(kernels_scalar.int8_linear_scratch(c.m, c.n, c.k), 64, 0x11);
  pack(in.weight, c.n, c.k, dense.as<int8_t>());
  Int8Linear d = a.dense;
  d.weight = dense.as<int8_t>(), d.y = expected.pointer(), d.scratch = room.as<void>();
  kernels_scalar.int8_linear(d);
  float tolerance = c.type == Type::bf16 ? 0x1p-7f : 1e-6f;
  check_same(got, expected, c.n, c.activation == Activation::none ? 0.0f : tolerance);
}

double activated(double x, Activation activation) {
  switch (activation) {
    case Activation::none:
      return x;
    case Activation::relu:
      return x < 0 ? 0 : x;
    case Activation::gelu:
      return 0.5 * x * std::erfc(-x * M_SQRT1_2);
    case Activation::gelu_tanh:
      return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
    case Activation::silu:
      return x / (1 + std::exp(-x));
  }
  return NAN;
}

// y = activation(x w^T + bias) + residual in float64, no activation's slope being above 1.2; a row with a NaN or an
// infinity is all NaN.
std::string wrong_sum(const SparseCase& c, const SparseInputs<float>& in, const Floats& x, const Floats& got) {
  for (int64_t r = 0; r < c.m; ++r) {
    bool finite = true;
    for (int64_t j = 0; j < c.k; ++j) finite = finite && std::isfinite(x[static_cast<size_t>(r * c.k + j)]);
    for (int64_t o = 0; o < c.n; ++o) {
      auto i = static_cast<size_t>(r * c.n + o);
      double sum = c.has_bias ? static_cast<double>(in.bias[static_cast<size_t>(o)]) : 0.0;
      double residual = c.has_residual ? static_cast<double>(in.residual[i]) : 0.0;
      double size = std::fabs(sum) + std::fabs(residual) + (c.activation == Activation::none ? 0x1p-100 : 1.0);
      for (int64_t j = 0; j < c.k; ++j) {
        double term = static_cast<double>(x[static_cast<size_t>(r * c.k + j)]) *
                      static_cast<double>(in.weight[static_cast<size_t>(o * c.k + j)]);
        sum += term, size += std::fabs(term);
      }
      sum = activated(sum, c.activation) + residual;
      double tolerance = (c.type == Type::bf16 ? 0x1p-8 : 0x1p-20) * size;
      bool right = finite ? std::fabs(static_cast<double>(got[i]) - sum) <= tolerance : std::isnan(got[i]);
      if (!right) return at(i, c.n, got[i], static_cast<float>(sum));
    }
  }
  return "";
}

void sparse_linear(const SparseCase& c) {
  begin_sparse("sparse_linear", c);
  SparseInputs<float> in(c);
  std::vector<float> numbers(static_cast<size_t>(c.m * c.k));
  for (float& v : numbers) v = normal();
  for (int64_t r = 0; r < c.m && c.k > 0 && c.data == Data::special; r += 2) {
    numbers[static_cast<size_t>(r * c.k + integer(0, static_cast<int>(c.k) - 1))] = pick<float>({NAN, kInf, -kInf});
  }
  Floats x(numbers, c.type), got(static_cast<size_t>(c.m * c.n), c.type, 0xc5);
  SparseLinear a{};
  if (!in.read(c, a.weight)) return;
  a.x = x.pointer(), a.y = got.pointer(), a.m = c.m, a.n = c.n, a.k = c.k, a.activation = c.activation;
  if (c.has_bias) a.bias = in.bias.pointer();
  if (c.has_residual) a.residual = in.residual.pointer();
  Guarded scratch(tested.sparse_linear_scratch(a), 64, 0x77);
  a.scratch = scratch.as<void>();
  tested.sparse_linear(a);
  if (c.damage > 0) return;
  std::string difference = wrong_sum(c, in, x, got);
  check(difference.empty(), difference);
}

SparseCase any_sparse(int64_t m, int64_t n, int64_t k, bool few) {
  SparseCase c{};
  c.m = m, c.n = n, c.k = k, c.few = few;
  c.zeros = pick<int>({0, 5, 9, 10});
  c.type = pick<Type>({Type::f32, Type::bf16});
  c.has_bias = integer(0, 1) == 1;
  c.has_residual = integer(0, 2) == 0;
  c.has_factor = integer(0, 3) == 0;
  c.activation = static_cast<Activation>(integer(0, 3) == 0 ? integer(1, 4) : 0);
  c.data = pick<Data>({Data::random, Data::special, Data::extreme, Data::ties});
  return c;
}

// In a parallel region of someone else, where kernels run serially, each thread with scratch memory of its own.
void sparse_in_parallel() {
  SparseCase c{};
  c.m = 40, c.n = 300, c.k = 420, c.zeros = 5, c.type = Type::f32, c.data = Data::random;
  begin_sparse("sparse_int8_linear in a parallel region", c);
  SparseInputs<int8_t> in(c);
  Floats x(activations(c.m, c.k, c.data), c.type), scale(static_cast<size_t>(c.n), Type::f32);
  for (size_t i = 0; i < scale.size; ++i) scale.set(i, uniform(1e-4f, 1e-2f));
  SparseInt8Linear a{};
  check(in.read(c, a.weight), "is refused");
  a.dense.x = x.pointer(), a.dense.scale = scale.memory.as<float>();
  a.dense.m = c.m, a.dense.n = c.n, a.dense.k = c.k;
  auto run = [&](Floats& y, void* scratch) {
    SparseInt8Linear own = a;
    own.dense.y = y.pointer(), own.dense.scratch = scratch;
    tested.sparse_int8_linear(own);
  };
  auto count = static_cast<size_t>(c.m * c.n);
  Floats expected(count, c.type, 0x5a);
  Guarded room(tested.sparse_int8_linear_scratch(a), 64, 0x11);
  run(expected, room.as<void>());
  std::list<Floats> got;
  for (int t = 0; t < 3; ++t) got.emplace_back(count, c.type, 0xc5);
#pragma omp parallel num_threads(3)
  {
    Guarded scratch(tested.sparse_int8_linear_scratch(a), 64, 0x77);
    run(*std::next(got.begin(), omp_get_thread_num()), scratch.as<void>());
  }
  for (const Floats& y : got) check_same(y, expected, c.n, 0.0f);
}

void sparse_cases() {
  sparse_in_parallel();
  std::vector<int64_t> rows = {0, 1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 48, 67};
  auto both = [](const SparseCase& c) {
    sparse_int8_linear(c);
    sparse_linear(c);
  };
  for (bool few : {false, true}) {
    for (int64_t k : {0, 1, 3, 4, 5, 127, 128, 129, 770}) {
      for (int64_t n : {0, 1, 15, 16, 17, 127, 128, 129}) both(any_sparse(pick(rows), n, k, few));
    }
    for (int64_t m : rows) both(any_sparse(m, 140, 260, few));
    both(any_sparse(3, 300, 3100, few));
    both(any_sparse(40, 130, 1600, few));
    both(any_sparse(1030, 17, 40, few));  // more rows than one pass takes
    for (int i = 0; i < 60; ++i) {
      SparseCase c = any_sparse(pick<int64_t>({1, 3, 17, 40}), pick<int64_t>({5, 130}), pick<int64_t>({30, 820}), few);
      c.zeros = 5, c.damage = integer(1, 200), c.damaged_before = i % 4 == 0;
      if (c.damaged_before) c.damage = integer(1, 4);  // more are nearly always seen
      both(c);
    }
  }
}

}  // namespace
