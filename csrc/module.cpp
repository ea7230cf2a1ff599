// The Python module potstill._C: one m.def per op. Private; called from potstill.ops only (see tensor.h).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "dispatch.h"
#include "kernels/sparse_layout.h"
#include "memory.h"
#include "parallel.h"
#include "tensor.h"

namespace {

Activation activation_of(const std::string& name) {
  constexpr const char* kNames[] = {"none", "relu", "gelu", "gelu_tanh", "silu"};
  for (int i = 0; i < 5; ++i) {
    if (name == kNames[i]) return static_cast<Activation>(i);
  }
  throw py::value_error("activation is '" + name + "', expected none, relu, gelu, gelu_tanh or silu");
}

// What the linear ops have in common: m, n, k, x, y, bias, activation and residual.
template <class Args>
void set_linear(Args& a, const char* op, py::handle x, int64_t n, py::handle bias, const std::string& activation,
                py::handle residual, py::handle y) {
  TensorView xv(x, op, "x"), yv(y, op, "y");
  if (xv.rank() != 2) xv.fail("has rank " + std::to_string(xv.rank()), "expected [rows, in_features]");
  a.m = xv.size(0), a.n = n, a.k = xv.size(1);
  a.x = xv.contiguous().floats();
  a.y = yv.contiguous().shape({a.m, n}).floats();
  a.activation = activation_of(activation);
  if (a.y.type != a.x.type) yv.fail("has another dtype", "expected that of x");
  if (!bias.is_none()) a.bias = TensorView(bias, op, "bias").contiguous().shape({n}).floats();
  if (!residual.is_none()) {
    TensorView rv(residual, op, "residual");
    a.residual = rv.contiguous().shape({a.m, n}).floats();
    if (a.residual.type != a.x.type) rv.fail("has another dtype", "expected that of x");
  }
}

void set_int8(Int8Linear& a, const char* op, py::handle x, const TensorView& scale, py::handle factor) {
  if (a.k > kMaxFeatures) {
    TensorView(x, op, "x")
        .fail("has " + std::to_string(a.k) + " features",
              "sums of int8 products are exact up to " + std::to_string(kMaxFeatures) + "; split the layer");
  }
  a.scale = scale.shape({a.n}).f32();
  if (!factor.is_none()) a.factor = TensorView(factor, op, "factor").contiguous().shape({a.k}).f32();
}

void int8_linear(py::handle x, py::handle weight, py::handle scale, py::handle bias, const std::string& activation,
                 py::handle residual, py::handle factor, py::handle y) {
  constexpr const char* kOp = "int8_linear";
  TensorView wv(weight, kOp, "weight"), sv(scale, kOp, "scale");
  Int8Linear a{};
  set_linear(a, kOp, x, sv.contiguous().numel(), bias, activation, residual, y);
  set_int8(a, kOp, x, sv, factor);
  a.weight = wv.contiguous().shape({packed_panels(a.n), packed_groups(a.k) + 1, 4 * kPanel}).i8();
  py::gil_scoped_release nogil;
  const Kernels& table = kernels();
  a.scratch = scratch(table.int8_linear_scratch(a.m, a.n, a.k));
  table.int8_linear(a);
}

void set_sparse(SparseWeight& w, const char* op, py::handle weight, int64_t n, int64_t k, size_t value_bytes) {
  TensorView wv(weight, op, "weight");
  const char* wrong = read_sparse(wv.contiguous().u8(), wv.numel(), n, k, value_bytes, w);
  if (wrong != nullptr) wv.fail(wrong, "expected what potstill.ops.sparse.pack makes for these features");
}

void sparse_int8_linear(py::handle x, py::handle weight, py::handle scale, py::handle bias,
                        const std::string& activation, py::handle residual, py::handle factor, py::handle y) {
  constexpr const char* kOp = "sparse_int8_linear";
  TensorView sv(scale, kOp, "scale");
  SparseInt8Linear a{};
  set_linear(a.dense, kOp, x, sv.contiguous().numel(), bias, activation, residual, y);
  set_int8(a.dense, kOp, x, sv, factor);
  set_sparse(a.weight, kOp, weight, a.dense.n, a.dense.k, 1);
  py::gil_scoped_release nogil;
  const Kernels& table = kernels();
  a.dense.scratch = scratch(table.sparse_int8_linear_scratch(a));
  table.sparse_int8_linear(a);
}

void sparse_linear(py::handle x, py::handle weight, int64_t out_features, py::handle bias,
                   const std::string& activation, py::handle residual, py::handle y) {
  constexpr const char* kOp = "sparse_linear";
  SparseLinear a{};
  set_linear(a, kOp, x, out_features, bias, activation, residual, y);
  set_sparse(a.weight, kOp, weight, a.n, a.k, sizeof(float));
  py::gil_scoped_release nogil;
  const Kernels& table = kernels();
  a.scratch = scratch(table.sparse_linear_scratch(a));
  table.sparse_linear(a);
}

void int4_linear(py::handle x, py::handle weight, py::handle scale, py::handle zero, py::handle bias, py::handle y,
                 int64_t n, int64_t group) {
  constexpr const char* kOp = "int4_linear";
  TensorView xv(x, kOp, "x"), wv(weight, kOp, "weight"), sv(scale, kOp, "scale"), yv(y, kOp, "y");
  if (xv.rank() != 2) xv.fail("has rank " + std::to_string(xv.rank()), "expected [rows, in_features]");
  int64_t m = xv.size(0), k = xv.size(1);
  if (group != 32 && group != 64 && group != 128) {
    sv.fail("has groups of " + std::to_string(group) + " inputs", "expected 32, 64 or 128");
  }
  int64_t panels = packed_panels(n), groups = packed_scales(k, group);
  wv.contiguous().shape({panels, packed_blocks(k), kInt4BlockBytes});
  sv.contiguous().shape({panels, groups, kPanel});
  yv.contiguous().shape({m, n});
  Int4Linear a{};
  a.x = xv.contiguous().floats();
  a.y = yv.floats();
  if (a.y.type != a.x.type) yv.fail("has another dtype", "expected that of x");
  a.weight = wv.u8();
  a.scale = sv.b16();
  if (!zero.is_none()) a.zero = TensorView(zero, kOp, "zero").contiguous().shape({panels, groups, kPanel}).u8();
  if (!bias.is_none()) a.bias = TensorView(bias, kOp, "bias").contiguous().shape({n}).floats();
  a.m = m, a.n = n, a.k = k, a.group = group;
  py::gil_scoped_release nogil;
  const Kernels& table = kernels();
  a.scratch = scratch(table.int4_linear_scratch(m, n, k, group));
  table.int4_linear(a);
}

// The number of labels that are not ignore_index; every other label must name a class.
int64_t count_labels(const TensorView& target, int64_t rows, int64_t classes, int64_t ignore_index) {
  const int64_t* labels = target.i64();
  int64_t valid = 0;
  for (int64_t row = 0; row < rows; ++row) {
    if (labels[row] == ignore_index) continue;
    if (labels[row] < 0 || labels[row] >= classes) {
      target.fail("has the label " + std::to_string(labels[row]) + " in row " + std::to_string(row),
                  "expected labels from 0 to " + std::to_string(classes - 1) +
                      ", or ignore_index = " + std::to_string(ignore_index));
    }
    ++valid;
  }
  return valid;
}

Divergence divergence_of(const std::string& name) {
  constexpr const char* kNames[] = {"forward_kl", "reverse_kl", "jsd", "tv", "dkd", "soft_ce", "mse"};
  for (int i = 0; i < 7; ++i) {
    if (name == kNames[i]) return static_cast<Divergence>(i);
  }
  throw py::value_error("divergence is '" + name + "', expected a name of potstill.ops.divergence.DIVERGENCES");
}

Rest rest_of(const std::string& name) {
  constexpr const char* kNames[] = {"tail", "renormalize", "partial"};
  for (int i = 0; i < 3; ++i) {
    if (name == kNames[i]) return static_cast<Rest>(i);
  }
  throw py::value_error("rest is '" + name + "', expected tail, renormalize or partial");
}

// The likeliest classes of a teacher: each must be one of the student's.
void set_top_k(KdLoss& a, const TensorView& teacher, const TensorView& indices, const std::string& divergence) {
  a.indices = indices.contiguous().shape({a.rows, a.teacher_classes}).i64();
  for (int64_t i = 0; i < a.rows * a.teacher_classes; ++i) {
    if (a.indices[i] < 0 || a.indices[i] >= a.student_classes) {
      indices.fail("has the class " + std::to_string(a.indices[i]),
                   "expected 0 to " + std::to_string(a.student_classes - 1));
    }
  }
  teacher.f32();
  a.entropy = divergence != "soft_ce";
  a.divergence = Divergence::top_k;
}

// loss has rank 1 for one loss per row, or rank 0 for their sum or mean; the gradient is that of its sum, and may
// overwrite the student. A mean divides by the normalizer, or if that is 0 by the number of rows that count.
void kd_loss(py::handle student, py::handle teacher, py::handle indices, py::handle target, py::handle row_weight,
             py::handle loss, py::handle grad, const std::string& divergence, float beta, const std::string& rest,
             float temperature, float alpha, float label_smoothing, int64_t ignore_index, bool mean,
             double normalizer) {
  constexpr const char* kOp = "kd_loss";
  TensorView sv(student, kOp, "student"), tv(teacher, kOp, "teacher"), lv(loss, kOp, "loss");
  for (const TensorView* t : {&sv, &tv}) {
    if (t->rank() != 2) t->fail("has rank " + std::to_string(t->rank()), "expected [rows, classes]");
    if (t->size(1) > 1 && t->stride(1) != 1) t->fail("has strided rows", "call .contiguous() on it");
  }
  KdLoss a{};
  a.rows = sv.size(0);
  a.student_classes = sv.size(1), a.teacher_classes = tv.size(1);
  tv.shape({a.rows, a.teacher_classes});
  a.student = sv.floats(), a.teacher = tv.floats();
  a.student_stride = sv.stride(0), a.teacher_stride = tv.stride(0);
  a.divergence = divergence_of(divergence);
  a.rest = rest_of(rest);
  if (!indices.is_none()) set_top_k(a, tv, TensorView(indices, kOp, "teacher_indices"), divergence);
  int64_t valid = a.rows;
  if (!target.is_none()) {
    TensorView labels(target, kOp, "target");
    a.target = labels.contiguous().shape({a.rows}).i64();
    valid = count_labels(labels, a.rows, a.student_classes, ignore_index);
  } else if (alpha != 1.0f || (a.divergence == Divergence::dkd && alpha > 0.0f)) {
    throw py::value_error("kd_loss: target is None, expected labels");
  }
  if (!row_weight.is_none())
    a.row_weight = TensorView(row_weight, kOp, "row_weight").contiguous().shape({a.rows}).f32();
  float* result = lv.contiguous().f32();
  bool per_row = lv.rank() == 1;
  if (per_row) lv.shape({a.rows});
  if (!per_row) lv.shape({});
  if (!grad.is_none()) {
    TensorView gv(grad, kOp, "grad");
    gv.shape({a.rows, a.student_classes});
    if (a.student_classes > 1 && gv.stride(1) != 1) gv.fail("has strided rows", "expected dense ones");
    a.grad = gv.floats();
    a.grad_stride = gv.stride(0);
    if (a.grad.type != a.student.type) gv.fail("has another dtype", "expected that of student");
    if (a.grad.data != a.student.data) {
      int64_t numbers = a.rows == 0 ? 0 : (a.rows - 1) * a.grad_stride + a.student_classes;
      prefer_huge_pages(a.grad.data, static_cast<size_t>(numbers) * (a.grad.type == Type::f32 ? 4 : 2));
    }
  }
  a.beta = beta;
  a.temperature = temperature;
  a.alpha = alpha;
  a.label_smoothing = label_smoothing;
  a.ignore_index = ignore_index;
  double by = normalizer != 0.0 ? normalizer : valid > 0 ? static_cast<double>(valid) : 1.0;  // no valid row: all are 0
  a.scale = mean ? static_cast<float>(1.0 / by) : 1.0f;
  py::gil_scoped_release nogil;
  const Kernels& table = kernels();
  size_t row_losses = per_row ? 0 : (static_cast<size_t>(a.rows) * sizeof(float) + 63) / 64 * 64;
  char* memory = static_cast<char*>(scratch(row_losses + table.kd_loss_scratch(a.student_classes, a.teacher_classes)));
  a.loss = per_row ? result : reinterpret_cast<float*>(memory);
  a.scratch = memory + row_losses;
  table.kd_loss(a);
  if (per_row) return;
  double total = 0;
  for (int64_t row = 0; row < a.rows; ++row) total += a.loss[row];
  *result = static_cast<float>(mean ? total / by : total);
}

// A block this large is mapped afresh by glibc's malloc at every call, whatever was freed before.
constexpr int64_t kAlwaysFresh = int64_t{32} << 20;

// x and residual are [..., n]; residual, weight and bias may be None.
void add_layer_norm(py::handle x, py::handle residual, py::handle weight, py::handle bias, double eps, py::handle y) {
  constexpr const char* kOp = "add_layer_norm";
  TensorView xv(x, kOp, "x"), yv(y, kOp, "y");
  if (xv.rank() == 0) xv.fail("has no dimension", "expected [..., features]");
  AddLayerNorm a{};
  a.n = xv.size(xv.rank() - 1);
  a.rows = a.n == 0 ? 0 : xv.numel() / a.n;
  a.x = xv.contiguous().floats();
  a.y = yv.contiguous().same_shape(xv, "x").floats();
  a.eps = static_cast<float>(eps);
  if (!residual.is_none()) {
    TensorView rv(residual, kOp, "residual");
    a.residual = rv.same_shape(xv, "x").contiguous().floats();
    if (a.residual.type != a.x.type) rv.fail("has another dtype", "expected that of x");
  }
  if (!weight.is_none()) a.weight = TensorView(weight, kOp, "weight").contiguous().shape({a.n}).floats();
  if (!bias.is_none()) a.bias = TensorView(bias, kOp, "bias").contiguous().shape({a.n}).floats();
  if (a.y.type != a.x.type) yv.fail("has another dtype", "expected that of x");
  int64_t bytes = a.rows * a.n * (a.y.type == Type::f32 ? 4 : 2);
  if (bytes >= kAlwaysFresh) prefer_huge_pages(a.y.data, static_cast<size_t>(bytes));
  py::gil_scoped_release nogil;
  const Kernels& table = kernels();
  a.scratch = scratch(table.add_layer_norm_scratch(a.n));
  table.add_layer_norm(a);
}

// indices are [...], y is [..., n].
void int8_embedding(py::handle weight, py::handle scale, py::handle indices, py::handle y) {
  constexpr const char* kOp = "int8_embedding";
  TensorView wv(weight, kOp, "weight"), sv(scale, kOp, "scale"), iv(indices, kOp, "indices"), yv(y, kOp, "y");
  if (wv.rank() != 2) wv.fail("has rank " + std::to_string(wv.rank()), "expected [num_embeddings, embedding_dim]");
  int64_t table = wv.size(0), n = wv.size(1), rows = iv.numel();
  sv.contiguous().shape({table});
  if (yv.contiguous().numel() != rows * n) yv.fail("has another size", "expected a row for each of indices");
  Int8Embedding a{wv.contiguous().i8(), sv.f32(), iv.contiguous().i64(), yv.floats(), rows, n};
  for (int64_t i = 0; i < rows; ++i) {
    if (a.indices[i] < 0 || a.indices[i] >= table) {
      iv.fail("has the value " + std::to_string(a.indices[i]),
              "expected rows of the table, from 0 to " + std::to_string(table - 1));
    }
  }
  py::gil_scoped_release nogil;
  kernels().int8_embedding(a);
}

Strides strides_of(const TensorView& t) {
  if (t.size(3) > 1 && t.stride(3) != 1) t.fail("has a strided last dimension", "call .contiguous() on it");
  return {t.stride(0), t.stride(1), t.stride(2)};
}

// query, key, value and y are [batch, heads, length, features] with any strides but the last; mask is None, or float32
// or bool of the scores' shape, any of whose strides but the last may be 0.
void attention(py::handle query, py::handle key, py::handle value, py::handle mask, double scale, bool causal,
               py::handle y) {
  constexpr const char* kOp = "attention";
  TensorView qv(query, kOp, "query"), kv(key, kOp, "key"), vv(value, kOp, "value"), yv(y, kOp, "y");
  for (const TensorView* t : {&qv, &kv, &vv}) {
    if (t->rank() != 4) t->fail("has rank " + std::to_string(t->rank()), "expected [batch, heads, length, features]");
  }
  Attention a{};
  a.batch = qv.size(0), a.heads = qv.size(1), a.queries = qv.size(2), a.d = qv.size(3);
  a.kv_heads = kv.size(1), a.keys = kv.size(2), a.dv = vv.size(3);
  if (a.kv_heads == 0 ? a.heads != 0 : a.heads % a.kv_heads != 0) {
    kv.fail("has " + std::to_string(a.kv_heads) + " heads",
            "expected a divisor of the query's " + std::to_string(a.heads));
  }
  kv.shape({a.batch, a.kv_heads, a.keys, a.d});
  vv.shape({a.batch, a.kv_heads, a.keys, a.dv});
  yv.shape({a.batch, a.heads, a.queries, a.dv});
  a.q = qv.floats(), a.k = kv.floats(), a.v = vv.floats(), a.y = yv.floats();
  for (const TensorView* t : {&kv, &vv, &yv}) {
    if (t->floats().type != a.q.type) t->fail("has another dtype", "expected that of query");
  }
  a.q_strides = strides_of(qv), a.k_strides = strides_of(kv), a.v_strides = strides_of(vv);
  a.y_strides = strides_of(yv);
  if (!mask.is_none()) {
    TensorView mv(mask, kOp, "mask");
    mv.shape({a.batch, a.heads, a.queries, a.keys});
    a.mask_strides = strides_of(mv);
    if (mv.is_bool()) a.allowed = mv.boolean();
    if (!mv.is_bool()) a.mask = mv.f32();
  }
  a.scale = static_cast<float>(scale);
  a.causal = causal;
  py::gil_scoped_release nogil;
  const Kernels& table = kernels();
  a.scratch = scratch(table.attention_scratch(a));
  table.attention(a);
}

// Each of `threads` workers runs `f`; returns the operations of all.
template <class F>
double on_threads(int64_t threads, const F& f) {
  py::gil_scoped_release nogil;
  double one = 0;
  parallel_for(threads, true, [&](int64_t i) {
    double operations = f();
    if (i == 0) one = operations;
  });
  return one * static_cast<double>(threads);
}

double peak_int8(int64_t iterations, int64_t threads) {
  return on_threads(threads, [&] { return kernels().peak_int8(iterations); });
}

double peak_f32(int64_t iterations, int64_t threads) {
  return on_threads(threads, [&] { return kernels().peak_f32(iterations); });
}

double read_memory(py::handle data, int64_t repeats, int64_t threads) {
  TensorView v(data, "read_memory", "data");
  const int8_t* p = v.contiguous().i8();
  size_t bytes = static_cast<size_t>(v.numel() / threads / 512 * 512);
  return on_threads(threads, [&] {
    kernels().read_memory(p + static_cast<size_t>(thread_index()) * bytes, bytes, repeats);
    return static_cast<double>(bytes) * static_cast<double>(repeats);
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  kernels();  // an unknown POTSTILL_ISA fails the import, not the first call
  m.def("isas", &supported_isas);
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("use_isa", &use_isa, py::arg("name"));
  m.def("int8_linear", &int8_linear);
  m.def("int4_linear", &int4_linear);
  m.def("sparse_int8_linear", &sparse_int8_linear);
  m.def("sparse_linear", &sparse_linear);
  m.def("kd_loss", &kd_loss);
  m.def("add_layer_norm", &add_layer_norm);
  m.def("int8_embedding", &int8_embedding);
  m.def("attention", &attention);
  m.def("peak_int8", &peak_int8, py::arg("iterations"), py::arg("threads"));
  m.def("peak_f32", &peak_f32, py::arg("iterations"), py::arg("threads"));
  m.def("read_memory", &read_memory, py::arg("data"), py::arg("repeats"), py::arg("threads"));
}
