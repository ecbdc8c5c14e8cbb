// The read of linear attention for a head and tiles of 16 tokens, by one warp on tensor cores: q times the state, each
// of whose numbers is two of 16 bits, the second what the first leaves: 16 bits of it in BFloat16. In fp16 they are 22,
// of numbers that a power of two has made less than 2^15, and at least 2^-39 of the head's largest. 1 / rms and the
// norm's weight need no second form of q: weights lose their signs to q and multiply the state, roots multiply the two
// sums.
#pragma once

#include "linear_attention_parts.h"
#include "row_quantizer.h"

template <class T>
constexpr bool IS_HALF = false;
template <>
constexpr bool IS_HALF<Half> = true;

__device__ __forceinline__ float size_of(float weight) { return weight < 0 ? -weight : weight; }

// a lane's part of 16 rows of a head's state, of their sums of keys and of the norm's weights
template <bool NORM>
struct StateRows {
  Float4 rows[4];
  Float2 keys[2], weights[2];

  // from a head's state and weights on, each at the lane's place in its first row
  __device__ __forceinline__ void load(const float* from_rows, const float* from_keys, const float* from_weights) {
#pragma unroll
    for (int i = 0; i < 4; i++) rows[i] = load_vector<Float4>(from_rows + state_row(0, i) * HEAD);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      keys[i] = load_vector<Float2>(from_keys + state_row(0, 2 * i));
      if (NORM) weights[i] = load_vector<Float2>(from_weights + state_row(0, 2 * i));
    }
  }
  // of the weights of a pair of rows, as words of two q have them
  __device__ __forceinline__ uint32_t signs(int pair) const {
    return (weights[pair].at[0] < 0 ? 0x8000u : 0u) | (weights[pair].at[1] < 0 ? 0x80000000u : 0u);
  }
  __device__ __forceinline__ void multiply_by_weights() {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float size = size_of(weights[i / 2].at[i % 2]);
      for (int c = 0; c < 4; c++) rows[i].at[c] = multiply(rows[i].at[c], size);
      keys[i / 2].at[i % 2] = multiply(keys[i / 2].at[i % 2], size);
    }
  }
  __device__ __forceinline__ float largest(float most) const {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      for (int c = 0; c < 4; c++) most = larger_or_nan(most, rows[i].at[c]);
      most = larger_or_nan(most, keys[i / 2].at[i % 2]);
    }
    return most;
  }
};

// 2^n by which a head's largest number is 2^14 to 2^15, and 2^-n; BFloat16 has fp32's exponents
struct Power {
  float up, down;
};
template <class T, bool NORM>
__device__ __forceinline__ Power power_of(const StateRows<NORM> (&steps)[2]) {
  if constexpr (IS_HALF<T>) {
    const float most = steps[1].largest(steps[0].largest(0));
    const uint32_t exponent = larger(warp_largest(float_bits(most)) >> 23, 15u);
    return {float_of_bits((268 - exponent) << 23), float_of_bits((exponent - 14) << 23)};
  } else {
    return {1, 1};
  }
}

// two numbers in 16 bits each, and what that leaves of them
struct Halves {
  uint32_t high, low;
};
template <class T>
__device__ __forceinline__ Halves halves(float a, float b, float up) {
  if constexpr (IS_HALF<T>) a = multiply(a, up), b = multiply(b, up);
  const uint32_t high = pack_floats<T>(a, b);
  const float first = to_float(T{uint16_t(high)});
  const float second = IS_HALF<T> ? to_float(T{uint16_t(high >> 16)}) : float_of_bits(high & 0xffff0000);
  return {high, pack_floats<T>(add(a, -first), add(b, -second))};
}

// multiply_16bit; where tensor cores do not multiply BFloat16, in fp32 what the lanes of a row and a column hold
template <class T>
__device__ __forceinline__ void multiply_halves(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (SANA_EDGE_ARCH >= 800 || IS_HALF<T>) {
    multiply_16bit<T>(sums, a, b);
  } else {
    const int lane = threadIdx.x % WARP;
    for (int k = 0; k < 4; k++)
      for (int depth = 0; depth < 2; depth++) {
        uint32_t left[2], right[2];
        for (int i = 0; i < 2; i++) {
          left[i] = shuffle(a[i + 2 * depth], lane / 4 * 4 + k);
          right[i] = shuffle(b[depth], lane % 4 * 8 + i * 4 + k);
        }
        for (int i = 0; i < 4; i++)
          for (int n = 0; n < 32; n += 16)
            sums[i] = fused_multiply_add(to_float(T{uint16_t(left[i / 2] >> n)}),
                                         to_float(T{uint16_t(right[i % 2] >> n)}), sums[i]);
      }
  }
}

// what tensor cores take of 16 channels: q, halves of four times 8 channels of the state, and of the sums of keys
template <int TILES>
struct Operands {
  uint32_t queries[TILES][4], rows[4][2][2], keys[2];
};
// q: the lane's row of the first tile; ``tile``: elements from there to the next
template <class T, bool NORM, int TILES>
__device__ __forceinline__ void prepare(Operands<TILES>& out, const StateRows<NORM>& step, float up, const T* q,
                                        int tile) {
#pragma unroll
  for (int m = 0; m < TILES; m++) {
    load_matrices(out.queries[m], q + m * tile);
    for (int i = 0; i < 4; i++)
      out.queries[m][i] = relu_pair<T>(NORM ? out.queries[m][i] ^ step.signs(i / 2) : out.queries[m][i]);
  }
#pragma unroll
  for (int pair = 0; pair < 2; pair++) {
    for (int c = 0; c < 4; c++) {
      const Halves found = halves<T>(step.rows[2 * pair].at[c], step.rows[2 * pair + 1].at[c], up);
      out.rows[c][0][pair] = found.high, out.rows[c][1][pair] = found.low;
    }
    const Halves found = halves<T>(step.keys[pair].at[0], step.keys[pair].at[1], up);
    out.keys[pair] = threadIdx.x / 4 % 2 ? found.low : found.high;
  }
}

// A head's sums for tiles of 16 tokens. Of the divisors even columns have what the first halves make, odd ones what
// the second do.
template <int TILES>
struct Sums {
  float read[TILES][4][4], divisors[TILES][4];
};
template <class T, int TILES>
__device__ __forceinline__ void multiply_operands(Sums<TILES>& sums, const Operands<TILES>& o) {
#pragma unroll
  for (int m = 0; m < TILES; m++) {
    for (int c = 0; c < 4; c++)
      for (int half = 0; half < 2; half++) multiply_halves<T>(sums.read[m][c], o.queries[m], o.rows[c][half]);
    multiply_halves<T>(sums.divisors[m], o.queries[m], o.keys);
  }
}
