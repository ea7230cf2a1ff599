// int8_24.h on GPUs: what a thread does in PTX, the kernel, and its launch.
#include "int8_24.h"

namespace int8_24 {
namespace {

struct Thread {
  __device__ Thread() : index(static_cast<int>(threadIdx.x)), registers() {
    extern __shared__ __align__(128) uint8_t memory[];
    shared = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
  }

  // `bytes` of 16, and zeros for the others; past L1, since x and w of a tile are read once.
  POTSTILL_THREAD void copy(int to, const void* from, int bytes) const {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared + to), "l"(from), "r"(bytes) : "memory");
  }
  POTSTILL_THREAD void commit() const { asm volatile("cp.async.commit_group;" ::: "memory"); }

  POTSTILL_THREAD void read(int from, uint32_t (&to)[4]) const {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared + from)
                 : "memory");
  }
  template <class Place>
  POTSTILL_THREAD void read_matrices(Place place, uint32_t (&to)[4]) const {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared + place(index % kLanes))
                 : "memory");
  }

  template <Float type>
  POTSTILL_THREAD void write(int to, float number) const {
    if constexpr (type == Float::f32) {
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(shared + to), "f"(number) : "memory");
    } else {
      uint16_t bits;
      if constexpr (type == Float::bf16) asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(number));
      if constexpr (type == Float::f16) asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(number));
      asm volatile("st.shared.u16 [%0], %1;" ::"r"(shared + to), "h"(bits) : "memory");
    }
  }
  POTSTILL_THREAD void store(const uint32_t (&line)[4], void* to) const {
    *static_cast<uint4*>(to) = make_uint4(line[0], line[1], line[2], line[3]);
  }
  POTSTILL_THREAD float number(const void* array, Float type, int i) const {
    if (type == Float::f32) return static_cast<const float*>(array)[i];
    uint16_t bits = static_cast<const uint16_t*>(array)[i];
    if (type == Float::bf16) return __uint_as_float(static_cast<uint32_t>(bits) << 16);
    float number;
    asm("cvt.f32.f16 %0, %1;" : "=f"(number) : "h"(bits));
    return number;
  }

  int index;
  uint32_t shared;
  Registers registers;
};

struct Block {
  template <class Function>
  POTSTILL_THREAD void each(Function function) {
    function(thread);
  }
  template <int pending>
  POTSTILL_THREAD void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
    __syncthreads();
  }
  POTSTILL_THREAD void multiply(int which) {
    const Fragments& f = thread.registers.fragments[which];
    POTSTILL_UNROLL for (int i = 0; i < kTiles; ++i) {
      POTSTILL_UNROLL for (int j = 0; j < kWarpTiles; ++j) {
        int32_t (&c)[4] = thread.registers.sums[i][j];
        asm volatile(
            "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0;"
            : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
            : "r"(f.a[i][0]), "r"(f.a[i][1]), "r"(f.a[i][2]), "r"(f.a[i][3]), "r"(f.b[j][0]), "r"(f.b[j][1]),
              "r"(f.b[j][2]), "r"(f.b[j][3]), "r"(f.metadata[i]));
      }
    }
  }

  Thread thread;
};

__global__ void __launch_bounds__(kThreads, 1) int8_24_linear(const __grid_constant__ Linear p) {
  Block block;
  compute(block, p, tile_at(static_cast<int>(blockIdx.x), p.m, p.n));
}

}  // namespace

const char* launch(const Linear& p, void* stream) {
  int64_t tiles = static_cast<int64_t>(tiles_of(p.m, kRows)) * tiles_of(p.n, kOutputs);
  if (tiles == 0) return nullptr;
  if (tiles > INT32_MAX) return "y has too many tiles for one launch";
  cudaError_t error = cudaFuncSetAttribute(int8_24_linear, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error == cudaSuccess) {
    auto blocks = static_cast<unsigned>(tiles);
    int8_24_linear<<<blocks, kThreads, kSharedBytes, static_cast<cudaStream_t>(stream)>>>(p);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace int8_24
