// Compiled once per ISA (CMakeLists.txt) into an object that exports one symbol: kernels_<isa>.
// Everything else is in anonymous namespaces, so that no instruction of one ISA can leak into another's code.
#define POTSTILL_STRING(x) #x
// clang-format off: it would put spaces into the path
#define POTSTILL_HEADER(isa) POTSTILL_STRING(simd/isa.h)
// clang-format on
#define POTSTILL_NAME(isa) POTSTILL_STRING(isa)
#define POTSTILL_JOIN(a, b) a##b
#define POTSTILL_SYMBOL(isa) POTSTILL_JOIN(kernels_, isa)

#include POTSTILL_HEADER(POTSTILL_ISA)

#include "../parallel.h"
#include "table.h"

// linear.inl first: the linear kernels are written over it
#include "linear.inl"

#include "int4_linear.inl"
#include "int8_linear.inl"
#include "sparse_int8_linear.inl"
#include "sparse_linear.inl"
#include "kd_loss.inl"
#include "add_layer_norm.inl"
#include "int8_embedding.inl"
#include "attention.inl"
#include "peak.inl"

extern const Kernels POTSTILL_SYMBOL(POTSTILL_ISA);
const Kernels POTSTILL_SYMBOL(POTSTILL_ISA) = {
    POTSTILL_NAME(POTSTILL_ISA),
    int8_linear,
    int8_linear_scratch,
    int4_linear,
    int4_linear_scratch,
    sparse_int8_linear,
    sparse_int8_linear_scratch,
    sparse_linear,
    sparse_linear_scratch,
    kd_loss,
    kd_loss_scratch,
    add_layer_norm,
    add_layer_norm_scratch,
    int8_embedding,
    attention,
    attention_scratch,
    peak_int8,
    peak_f32,
    read_memory,
};
