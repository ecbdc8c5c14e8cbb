// The product inside every INT8 operation: a block's tile of sums, from operands that are anywhere.
//
// STAGES tiles of both operands are in shared memory, all but one of them on their way while one is multiplied.
// Fragments of the next 32 of depth are read before the present ones are multiplied, also across tiles, and one
// barrier per tile is enough: it tells both that the next tile is there and that the last one may be overwritten.
// Turing, which copies through registers, loads the next tile early and stores it when this one is multiplied.
#pragma once

#include "gemm_maps.h"

// Rows of a matrix (rows, depth) in global memory from a tile's first one on: what multiply_tiles takes. An
// operand says where 16 bytes of a row are; nullptr means zeros. Those beyond the depth are not asked for.
struct MatrixRows {
  const int8_t* first;
  int rows;  // that are there
  int depth;
  __device__ __forceinline__ const int8_t* chunk(int row, int k) const {
    // 32 bits within a tile: 256 rows of 131071
    return row < rows ? first + uint32_t(row * depth + k) : nullptr;
  }
};

// one tile's copies of a thread
template <class T, class Left, class Right>
struct TileCopies {
  static constexpr bool ASYNCHRONOUS = SANA_EDGE_ARCH >= 800;
  static constexpr int KEPT = ASYNCHRONOUS ? 1 : T::LEFT_COPIES + T::RIGHT_COPIES;

  const Left& left;
  const Right& right;
  int depth;
  const int8_t* anywhere;  // an address for copies that read nothing
  Bytes16 kept[KEPT];

  // where in a stage the n-th copy goes: those of the left operand come first
  static __device__ __forceinline__ int place(int n) {
    const int piece = copied_piece<T>(threadIdx.x);
    if (n < T::LEFT_COPIES) return piece_offset<T>(copied_row<T>(threadIdx.x, n), piece);
    return T::M * T::K + piece_offset<T>(copied_row<T>(threadIdx.x, n - T::LEFT_COPIES), piece);
  }
  // starts to copy, to a stage, what is at depth k and beyond
  __device__ __forceinline__ void start(char* stage, int k) {
    k += copied_piece<T>(threadIdx.x) * 16;
#pragma unroll
    for (int n = 0; n < T::LEFT_COPIES + T::RIGHT_COPIES; n++) {
      const int8_t* from = nullptr;
      if (k < depth)
        from = n < T::LEFT_COPIES ? left.chunk(copied_row<T>(threadIdx.x, n), k)
                                  : right.chunk(copied_row<T>(threadIdx.x, n - T::LEFT_COPIES), k);
      if constexpr (ASYNCHRONOUS)
        copy_async16(stage + place(n), from ? from : anywhere, from != nullptr);
      else
        kept[n] = from ? load_vector<Bytes16>(from) : Bytes16{};
    }
  }
  // stores what start() has loaded, where copies are not asynchronous
  __device__ __forceinline__ void finish(char* stage) {
    if constexpr (!ASYNCHRONOUS) {
#pragma unroll
      for (int n = 0; n < T::LEFT_COPIES + T::RIGHT_COPIES; n++) store_vector(stage + place(n), kept[n]);
    }
  }
};

// a warp's fragments, 32 deep
template <class T>
struct Fragments {
  uint32_t left[T::MT][4], right[T::NT / 2][4];

  __device__ __forceinline__ void load(const char* stage, int step) {
#pragma unroll
    for (int m = 0; m < T::MT; m++) load_matrices(left[m], stage + left_offset<T>(threadIdx.x, m, step));
#pragma unroll
    for (int n = 0; n < T::NT / 2; n++)
      load_matrices(right[n], stage + T::M * T::K + right_offset<T>(threadIdx.x, n, step));
  }
  __device__ __forceinline__ void multiply_add(int32_t (&sums)[T::MT][T::NT][4]) const {
#pragma unroll
    for (int n = 0; n < T::NT; n++) {
      const uint32_t column[2] = {right[n / 2][n % 2 * 2], right[n / 2][n % 2 * 2 + 1]};
#pragma unroll
      for (int m = 0; m < T::MT; m++) multiply_int8(sums[m][n], left[m], column);
    }
  }
};

// sums += left (M, depth) right (N, depth)^T, in the first T::SHARED bytes of shared memory, which are free again
// when it returns. Operands have chunk() as MatrixRows does, and right.chunk(0, 0) is not nullptr. All threads of
// the block call it.
template <class T, class Left, class Right>
__device__ __forceinline__ void multiply_tiles(int32_t (&sums)[T::MT][T::NT][4], const Left& left,
                                               const Right& right, int depth) {
  char* const memory = shared_memory();
  const int tiles = blocks_of(depth, T::K);
  TileCopies<T, Left, Right> copies{left, right, depth, right.chunk(0, 0), {}};
#pragma unroll
  for (int tile = 0; tile < T::STAGES - 1; tile++) {
    if (tile < tiles) {
      copies.start(memory + tile * T::STAGE, tile * T::K);
      copies.finish(memory + tile * T::STAGE);
    }
    copy_async_commit();
  }
  copy_async_wait<T::STAGES - 2>();
  synchronize_block();

  Fragments<T> fragments[2];
  fragments[0].load(memory, 0);
  int reading = 0, writing = (T::STAGES - 1) * T::STAGE;  // stages, in bytes
  for (int tile = 0; tile < tiles; tile++) {
    const bool more = tile + T::STAGES - 1 < tiles;
#pragma unroll
    for (int step = 0; step < T::STEPS; step++) {
      if (step == 0) {
        if (more) copies.start(memory + writing, (tile + T::STAGES - 1) * T::K);
        copy_async_commit();
      }
      if (step == T::STEPS - 1) {
        if (more) copies.finish(memory + writing);
        copy_async_wait<T::STAGES - 2>();
        synchronize_block();
        writing = reading;
        reading = reading + T::STAGE == T::SHARED ? 0 : reading + T::STAGE;
      }
      // behind the last tile this reads what nobody multiplies
      fragments[(step + 1) % 2].load(memory + reading, (step + 1) % T::STEPS);
      fragments[step % 2].multiply_add(sums);
    }
  }
  synchronize_block();
}
