// device.h on the emulator. The matrix instructions follow the fragment tables of the PTX manual, one element at
// a time, and share nothing with the kernels' own maps.
#pragma once

#include <math.h>
#include <string.h>

#include "../sana_edge.h"
#include "emulator.h"

// the architecture that is emulated, 750 or 890: chosen when the emulator is compiled
#define SANA_EDGE_ARCH SANA_EDGE_EMULATED

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

using dim3 = emulator::Index;
#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline uint32_t float_bits(float a) {
  uint32_t bits;
  memcpy(&bits, &a, 4);
  return bits;
}
inline float float_of_bits(uint32_t a) {
  float value;
  memcpy(&value, &a, 4);
  return value;
}
inline uint32_t opaque(uint32_t bits) { return bits; }
template <class T>
const T* opaque(const T* pointer) {
  return pointer;
}
inline float not_a_number() { return float_of_bits(0x7fc00000); }

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) { return float_of_bits(uint32_t(value.bits) << 16); }
inline float to_float(Half value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, exponent = value.bits >> 10 & 31;
  const uint32_t fraction = value.bits & 1023;
  if (exponent == 31) return float_of_bits(sign | 0x7f800000 | fraction << 13);
  if (exponent) return float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
  const float small = ldexpf(float(fraction), -24);
  return sign ? -small : small;
}

template <class T>
T from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = float_bits(value);
  if (value != value) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Half from_float<Half>(float value) {
  const uint32_t bits = float_bits(value), size = bits & 0x7fffffff;
  const uint16_t sign = bits >> 16 & 0x8000;
  if (size > 0x7f800000) return {0x7fff};
  // 65520 and above round to infinity
  if (size >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
  // below 2^-14 steps are 2^-24
  if (size < 0x38800000) return {uint16_t(sign | uint16_t(lrintf(ldexpf(float_of_bits(size), 24))))};
  return {uint16_t(sign | uint16_t((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13))};
}

template <class T>
uint32_t pack_floats(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}

template <class T>
uint32_t relu_pair(uint32_t word) {
  if (to_float(T{uint16_t(word)}) < 0) word &= 0xffff0000;
  if (to_float(T{uint16_t(word >> 16)}) < 0) word &= 0xffff;
  return word;
}

inline float multiply(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
inline float divide(float a, float b) { return a / b; }
inline float reciprocal_root(float a) { return 1.0f / sqrtf(a); }
inline float exponential(float a) { return expf(a); }
inline float quick_exponential(float a) { return expf(a); }
inline float quick_divide(float a, float b) { return a * (b > 8.5e37f ? 0.0f : 1.0f / b); }
inline float larger_size(float a, float b) {
  return a != a || b != b ? not_a_number() : fmaxf(fabsf(a), fabsf(b));
}
inline int round_to_int(float a) {
  // as on a GPU: NaN is 0, what is too large is the largest
  if (a != a) return 0;
  if (a >= 2147483648.0f) return 2147483647;
  if (a < -2147483648.0f) return -2147483647 - 1;
  return int(lrintf(a));
}

inline char* shared_memory() { return emulator::shared_memory(); }
inline void synchronize_block() { emulator::synchronize_block(); }
inline void fence_device() {}
inline void wait_for_kernels() {}
inline int load_volatile(const int* from) { return *from; }
inline int atomic_add(int* to, int value) {
  const int before = *to;
  *to += value;
  return before;
}

inline void synchronize_warp() {
  emulator::collective([](void* const*) { emulator::order_warp(); }, nullptr);
}

template <class T>
struct ShuffleLane {
  T value;
  int from;
  T result;
};
template <class T>
void shuffle_warp(void* const lanes[32]) {
  for (int lane = 0; lane < 32; lane++) {
    auto* self = static_cast<ShuffleLane<T>*>(lanes[lane]);
    self->result = static_cast<ShuffleLane<T>*>(lanes[self->from & 31])->value;
  }
}
template <class T>
T shuffle(T value, int lane) {
  ShuffleLane<T> data{value, lane, value};
  emulator::collective(shuffle_warp<T>, &data);
  return data.result;
}
template <class T>
T shuffle_xor(T value, int lanes) {
  return shuffle(value, int(threadIdx.x % 32) ^ lanes);
}

inline uint32_t warp_largest(uint32_t value) {
  for (int lanes = 16; lanes; lanes /= 2) {
    const uint32_t other = shuffle_xor(value, lanes);
    value = other > value ? other : value;
  }
  return value;
}

template <class T>
T load_vector(const void* from) {
  emulator::check_address(from, sizeof(T), false);
  emulator::touch(from, sizeof(T), false);
  T value;
  memcpy(&value, from, sizeof(T));
  return value;
}
template <class T>
T load_fresh(const void* from) {
  return load_vector<T>(from);
}
template <class T>
void store_vector(void* to, const T& value) {
  emulator::check_address(to, sizeof(T), false);
  emulator::touch(to, sizeof(T), true);
  memcpy(to, &value, sizeof(T));
}

inline void copy_async16(void* to, const void* from, bool valid) {
#if SANA_EDGE_ARCH >= 800
  emulator::copy_async16(to, from, valid);
#else
  emulator::check_address(to, 16, true);
  if (valid) emulator::check_address(from, 16, false);
  emulator::touch(to, 16, true);
  if (valid)
    memcpy(to, from, 16);
  else
    memset(to, 0, 16);
#endif
}
inline void copy_async_commit() {
#if SANA_EDGE_ARCH >= 800
  emulator::copy_async_commit();
#endif
}
template <int PENDING>
void copy_async_wait() {
#if SANA_EDGE_ARCH >= 800
  emulator::copy_async_wait(PENDING);
#endif
}

struct MatrixLane {
  const void* row;
  uint32_t* out;
};

template <bool TRANSPOSED>
void load_matrices_of_warp(void* const lanes[32]) {
  for (int matrix = 0; matrix < 4; matrix++) {
    const uint16_t* rows[8];
    int banks[8] = {}, worst = 1;
    for (int row = 0; row < 8; row++) {
      rows[row] = static_cast<const uint16_t*>(static_cast<MatrixLane*>(lanes[8 * matrix + row])->row);
      emulator::check_address(rows[row], 16, true);
      emulator::touch(rows[row], 16, false);
      // 128 bytes of banks are 8 pieces; a piece that two lanes ask for is read once
      bool repeated = false;
      for (int other = 0; other < row; other++) repeated |= rows[other] == rows[row];
      const int bank = int(reinterpret_cast<uintptr_t>(rows[row]) / 16 % 8);
      if (!repeated && ++banks[bank] > worst) worst = banks[bank];
    }
    emulator::counters.matrix_reads++;
    emulator::counters.bank_conflicts += worst - 1;
    for (int lane = 0; lane < 32; lane++) {
      const int i = lane / 4, j = lane % 4 * 2;
      const uint32_t first = TRANSPOSED ? rows[j][i] : rows[i][j];
      const uint32_t second = TRANSPOSED ? rows[j + 1][i] : rows[i][j + 1];
      static_cast<MatrixLane*>(lanes[lane])->out[matrix] = first | second << 16;
    }
  }
}
inline void load_matrices(uint32_t (&out)[4], const void* row) {
  MatrixLane data{row, out};
  emulator::collective(load_matrices_of_warp<false>, &data);
}
inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  MatrixLane data{row, out};
  emulator::collective(load_matrices_of_warp<true>, &data);
}

template <class Sum>
struct ProductLane {
  Sum* sums;
  const uint32_t *a, *b;
};

// element i of what a lane holds in registers, T of 8 or 16 bits
template <class T>
T element(const uint32_t* registers, int i) {
  T value;
  memcpy(&value, reinterpret_cast<const char*>(registers) + i * sizeof(T), sizeof(T));
  return value;
}

// PTX manual, "matrix fragments for mma.m16n8k32" of .s8, whose halves along k are those of m16n8k16 and whose
// quarters are those of m8n8k16
inline void multiply_int8_of_warp(void* const lanes[32]) {
  int a[16][32], b[8][32];
  for (int lane = 0; lane < 32; lane++) {
    auto* data = static_cast<ProductLane<int32_t>*>(lanes[lane]);
    const int group = lane >> 2, in_group = lane & 3;
    for (int i = 0; i < 16; i++) {
      const int row = i < 4 || (i >= 8 && i < 12) ? group : group + 8;
      a[row][in_group * 4 + (i & 3) + (i < 8 ? 0 : 16)] = element<int8_t>(data->a, i);
    }
    for (int i = 0; i < 8; i++)
      b[group][in_group * 4 + (i & 3) + (i < 4 ? 0 : 16)] = element<int8_t>(data->b, i);
  }
  for (int lane = 0; lane < 32; lane++) {
    auto* data = static_cast<ProductLane<int32_t>*>(lanes[lane]);
    for (int i = 0; i < 4; i++) {
      const int row = (lane >> 2) + (i < 2 ? 0 : 8), column = (lane & 3) * 2 + (i & 1);
      int sum = 0;
      for (int k = 0; k < 32; k++) sum += a[row][k] * b[column][k];
      data->sums[i] += sum;
    }
  }
  emulator::counters.int8_products++;
}
inline void multiply_int8(int32_t (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  ProductLane<int32_t> data{sums, a, b};
  emulator::collective(multiply_int8_of_warp, &data);
}

// PTX manual, "matrix fragments for mma.m16n8k16" of .f16 and .bf16
template <class T>
void multiply_16bit_of_warp(void* const lanes[32]) {
  float a[16][16], b[8][16];
  for (int lane = 0; lane < 32; lane++) {
    auto* data = static_cast<ProductLane<float>*>(lanes[lane]);
    const int group = lane >> 2, in_group = lane & 3;
    for (int i = 0; i < 8; i++) {
      const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
      a[row][in_group * 2 + (i & 1) + (i < 4 ? 0 : 8)] = to_float(element<T>(data->a, i));
    }
    for (int i = 0; i < 4; i++)
      b[group][in_group * 2 + (i & 1) + (i < 2 ? 0 : 8)] = to_float(element<T>(data->b, i));
  }
  for (int lane = 0; lane < 32; lane++) {
    auto* data = static_cast<ProductLane<float>*>(lanes[lane]);
    for (int i = 0; i < 4; i++) {
      const int row = (lane >> 2) + (i < 2 ? 0 : 8), column = (lane & 3) * 2 + (i & 1);
      float sum = data->sums[i];
      for (int k = 0; k < 16; k++) sum += a[row][k] * b[column][k];
      data->sums[i] = sum;
    }
  }
  emulator::counters.half_products++;
}
template <class T>
void multiply_16bit(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if SANA_EDGE_ARCH < 800
  if (sizeof(T) == sizeof(BFloat16) && T{0x3f80}.bits && to_float(T{0x3f80}) == 1.0f)
    emulator::fail("Turing multiplies no BFloat16");
#endif
  ProductLane<float> data{sums, a, b};
  emulator::collective(multiply_16bit_of_warp<T>, &data);
}

inline sana_edge_status current_device(sana_edge_device_info* out) { return sana_edge_device(0, out); }

template <class Arguments>
sana_edge_status launch(void (*kernel)(Arguments), dim3 grid, unsigned threads, size_t shared, void*,
                        const Arguments& arguments, bool = false) {
  struct Call {
    void (*kernel)(Arguments);
    const Arguments* arguments;
  } call{kernel, &arguments};
  if (shared > size_t(emulator::shared_limit())) return SANA_EDGE_UNSUPPORTED_DEVICE;
  emulator::run(
      grid, threads, shared,
      [](const void* p) {
        const Call* call = static_cast<const Call*>(p);
        call->kernel(*call->arguments);
      },
      &call);
  return SANA_EDGE_OK;
}
