// The C++ list of ops: each ISA's object exports one such table.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "types.h"

// Packed int8 weights, the same for every ISA: panels of 16 outputs; a panel is ceil(k/4) groups [16][4] of bytes
// (the tail of k is zero), then 16 int32: the sums of its outputs' weights.
constexpr int kPanel = 16;
// 127 * 127 * k < 2^31: with more inputs a sum may not fit 32 bits.
constexpr int64_t kMaxFeatures = 133144;
constexpr int64_t packed_groups(int64_t k) { return (k + 3) / 4; }
constexpr int64_t packed_panels(int64_t n) { return (n + kPanel - 1) / kPanel; }
constexpr int64_t panel_bytes(int64_t k) { return (packed_groups(k) + 1) * 4 * kPanel; }

enum class Activation { none, relu, gelu, gelu_tanh, silu };

// Packed int4 weights, likewise: a panel is ceil(k/32) blocks of 4 x [16][4] bytes, for eight inputs each: byte i of an
// output holds input i of the eight in its low half and input i + 4 in its high half, as 0..15. Scales, and zero points
// where there are any, are [panels][groups][16].
constexpr int kInt4Block = 32;
constexpr int64_t kInt4BlockBytes = kInt4Block / 2 * kPanel;
constexpr int64_t packed_blocks(int64_t k) { return (k + kInt4Block - 1) / kInt4Block; }
constexpr int64_t packed_scales(int64_t k, int64_t group) { return (k + group - 1) / group; }

struct Int8Linear {
  FloatPtr x;            // [m, k] row-major
  const float* factor;   // [k], of each input, or null
  FloatPtr y;            // [m, n] row-major, of x's type
  const int8_t* weight;  // packed
  const float* scale;    // [n]
  FloatPtr bias;         // [n] or null
  FloatPtr residual;     // [m, n] of x's type, or null; added after the activation
  Activation activation;
  int64_t m, n, k;
  void* scratch;  // int8_linear_scratch(m, n, k) bytes, 64-byte aligned
};

struct Int4Linear {
  FloatPtr x;             // [m, k] row-major
  FloatPtr y;             // [m, n] row-major, of x's type
  const uint8_t* weight;  // packed
  const bf16* scale;      // packed
  const uint8_t* zero;    // packed, or null: all are 8
  FloatPtr bias;          // [n] or null
  int64_t m, n, k;
  int64_t group;  // inputs that share a scale: 32, 64 or 128
  void* scratch;  // int4_linear_scratch(m, n, k, group) bytes, 64-byte aligned
};

// Weights of which only the blocks of 4 inputs that are not all zero are stored: sparse_layout.h.
struct SparseWeight {
  bool few;
  int64_t n, k, slots;
  const int64_t* first;
  const int32_t* sums;
  const uint8_t *steps, *outputs, *index;
  const void* values;

  // At least one, so that there is a chunk and a window even without inputs.
  int64_t blocks() const { return k == 0 ? 1 : packed_groups(k); }
};

struct SparseInt8Linear {
  Int8Linear dense;  // all but the weight
  SparseWeight weight;
};

struct SparseLinear {
  FloatPtr x;         // [m, k] row-major
  FloatPtr y;         // [m, n] row-major, of x's type
  FloatPtr bias;      // [n] or null
  FloatPtr residual;  // [m, n] of x's type, or null; added after the activation
  Activation activation;
  int64_t m, n, k;
  void* scratch;  // sparse_linear_scratch(*this) bytes, 64-byte aligned
  SparseWeight weight;
};

enum class Divergence { forward_kl, reverse_kl, jsd, tv, dkd, soft_ce, mse, top_k };
enum class Rest { tail, renormalize, partial };

struct KdLoss {
  FloatPtr student;         // [rows, student_classes], rows `student_stride` apart
  FloatPtr teacher;         // [rows, teacher_classes] likewise; of top_k float log-probabilities
  const int64_t* indices;   // [rows, teacher_classes], of top_k: the student's classes they are for
  FloatPtr grad;            // [rows, student_classes] of the student's type, or null; may be the student itself
  const int64_t* target;    // [rows], or null: no hard labels (alpha is 1)
  const float* row_weight;  // [rows], or null: all are 1
  float* loss;              // [rows]
  int64_t rows, student_classes, teacher_classes;
  int64_t student_stride, teacher_stride, grad_stride;
  Divergence divergence;
  Rest rest;     // of top_k
  bool entropy;  // of top_k: a KL divergence, or without the teacher's entropy
  float beta, temperature, alpha, label_smoothing;
  int64_t ignore_index;
  float scale;    // factor of every row's gradient
  void* scratch;  // kd_loss_scratch(student_classes, teacher_classes) bytes, 64-byte aligned
};

struct AddLayerNorm {
  FloatPtr x, residual;   // [rows, n] row-major, of one type; residual may be null
  FloatPtr weight, bias;  // [n] or null
  FloatPtr y;             // [rows, n] row-major, of x's type
  int64_t rows, n;
  float eps;
  void* scratch;  // add_layer_norm_scratch(n) bytes
};

struct Int8Embedding {
  const int8_t* weight;    // [table rows, n] row-major
  const float* scale;      // [table rows]
  const int64_t* indices;  // [rows], each a row of the table
  FloatPtr y;              // [rows, n] row-major
  int64_t rows, n;
};

struct Strides {
  int64_t batch, head, row;  // in elements; the last dimension is contiguous
};

struct Attention {
  FloatPtr q, k, v, y;  // [batch, heads, queries, d], [batch, kv_heads, keys, d], .. dv], [batch, heads, queries, dv]
  Strides q_strides, k_strides, v_strides, y_strides;
  const float* mask;       // [batch, heads, queries, keys], added to the scores, or null
  const uint8_t* allowed;  // likewise: 0 where a query does not see a key, or null
  Strides mask_strides;    // 0 where it is broadcast
  int64_t batch, heads, kv_heads, queries, keys, d, dv;
  float scale;
  bool causal;    // query i sees the keys up to the i-th
  void* scratch;  // attention_scratch(*this) bytes
};

struct Kernels {
  const char* name;
  void (*int8_linear)(const Int8Linear&);
  size_t (*int8_linear_scratch)(int64_t m, int64_t n, int64_t k);
  void (*int4_linear)(const Int4Linear&);
  size_t (*int4_linear_scratch)(int64_t m, int64_t n, int64_t k, int64_t group);
  void (*sparse_int8_linear)(const SparseInt8Linear&);
  size_t (*sparse_int8_linear_scratch)(const SparseInt8Linear&);
  void (*sparse_linear)(const SparseLinear&);
  size_t (*sparse_linear_scratch)(const SparseLinear&);
  void (*kd_loss)(const KdLoss&);
  size_t (*kd_loss_scratch)(int64_t student_classes, int64_t teacher_classes);
  void (*add_layer_norm)(const AddLayerNorm&);
  size_t (*add_layer_norm_scratch)(int64_t n);
  void (*int8_embedding)(const Int8Embedding&);
  void (*attention)(const Attention&);
  size_t (*attention_scratch)(const Attention&);
  // What the benches call the ceiling, register to register. Both return the operations done.
  double (*peak_int8)(int64_t iterations);
  double (*peak_f32)(int64_t iterations);
  // Reads `bytes` (a multiple of 512) `repeats` times; returns something that depends on all of them.
  int32_t (*read_memory)(const void* data, size_t bytes, int64_t repeats);
};
