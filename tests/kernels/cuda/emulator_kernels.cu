// Small kernels for test_emulator.py: what the emulator gives, and mistakes that it must find.
#include "device.h"

struct Call {
  const void* a;
  const void* b;
  void* out;
  int32_t count;
  int32_t kind;
};

namespace {

constexpr int THREADS = 128;

struct alignas(16) Floats {
  float element[4];
};

__device__ int global_thread() { return int(blockIdx.x * blockDim.x + threadIdx.x); }

template <class T>
__global__ void to_float_kernel(const Call c) {
  const int i = global_thread();
  if (i < c.count) static_cast<float*>(c.out)[i] = to_float(static_cast<const T*>(c.a)[i]);
}

template <class T>
__global__ void from_float_kernel(const Call c) {
  const int i = global_thread();
  if (i < c.count) static_cast<T*>(c.out)[i] = from_float<T>(static_cast<const float*>(c.a)[i]);
}

__global__ void round_kernel(const Call c) {
  const int i = global_thread();
  if (i < c.count) static_cast<int*>(c.out)[i] = round_to_int(static_cast<const float*>(c.a)[i]);
}

// a: (32, 4) and b: (32, 2) registers of the lanes, out: (32, 4) sums that are added to
template <class Sum>
__global__ void product_kernel(const Call c) {
  uint32_t a[4], b[2];
  Sum sums[4];
  Sum* out = static_cast<Sum*>(c.out) + 4 * threadIdx.x;
  for (int i = 0; i < 4; i++) {
    a[i] = static_cast<const uint32_t*>(c.a)[4 * threadIdx.x + i];
    sums[i] = out[i];
  }
  for (int i = 0; i < 2; i++) b[i] = static_cast<const uint32_t*>(c.b)[2 * threadIdx.x + i];
  if constexpr (sizeof(Sum) == 4 && Sum(0.5) == Sum(0))
    multiply_int8(sums, a, b);
  else if (c.kind == 1)
    multiply_16bit<Half>(sums, a, b);
  else
    multiply_16bit<BFloat16>(sums, a, b);
  for (int i = 0; i < 4; i++) out[i] = sums[i];
}

// a: count bytes that go to shared memory; b: 32 offsets in it; out: (32, 4)
__global__ void matrices_kernel(const Call c) {
  for (int n = threadIdx.x * 16; n < c.count; n += WARP * 16)
    store_vector(shared_memory() + n, load_vector<Bytes16>(static_cast<const char*>(c.a) + n));
  synchronize_block();
  uint32_t found[4];
  const char* row = shared_memory() + static_cast<const int*>(c.b)[threadIdx.x];
  if (c.kind)
    load_matrices_transposed(found, row);
  else
    load_matrices(found, row);
  for (int i = 0; i < 4; i++) static_cast<uint32_t*>(c.out)[4 * threadIdx.x + i] = found[i];
}

// kind 0: shuffle with the lanes of b, else shuffle_xor with it
__global__ void shuffle_kernel(const Call c) {
  const float value = static_cast<const float*>(c.a)[threadIdx.x];
  static_cast<float*>(c.out)[threadIdx.x] =
      c.kind ? shuffle_xor(value, c.kind) : shuffle(value, static_cast<const int*>(c.b)[threadIdx.x]);
}

__global__ void reduce_kernel(const Call c) {
  const float value = static_cast<const float*>(c.a)[threadIdx.x];
  static_cast<float*>(c.out)[threadIdx.x] = c.kind ? warp_max(value) : warp_sum(value);
}

// every thread gives a number to another one through memory of the GPU; kind 1: with a barrier between
__global__ void exchange_kernel(const Call c) {
  int* given = static_cast<int*>(c.out);
  given[threadIdx.x] = threadIdx.x;
  if (c.kind) synchronize_block();
  const int found = given[(threadIdx.x + 37) % THREADS];
  synchronize_block();
  given[threadIdx.x] = found;
}

// shared memory as a block finds it; then it leaves something there
__global__ void first_sight_kernel(const Call c) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  static_cast<float*>(c.out)[global_thread()] = shared[threadIdx.x];
  shared[threadIdx.x] = 1;
}

// two groups of copies, one waited for at a time; kind 1: what is not valid is zeros
__global__ void copies_kernel(const Call c) {
  const float* from = static_cast<const float*>(c.a);
  float* out = static_cast<float*>(c.out);
  for (int group = 0; group < 2; group++) {
    copy_async16(shared_memory() + (group * WARP + threadIdx.x) * 16, from + (group * WARP + threadIdx.x) * 4,
                 !c.kind || threadIdx.x % 2 == 0);
    copy_async_commit();
  }
  copy_async_wait<1>();
  for (int group = 0; group < 2; group++) {
    synchronize_block();
    const int other = WARP - 1 - threadIdx.x;
    const Floats found = load_vector<Floats>(shared_memory() + (group * WARP + other) * 16);
    for (int i = 0; i < 4; i++) out[(group * WARP + other) * 4 + i] = found.element[i];
    copy_async_wait<0>();
  }
}

enum Mistake {
  NONE,
  BARRIER_MISSED,
  BARRIER_LEFT,
  LANES_APART,
  MISALIGNED_LOAD,
  MISALIGNED_STORE,
  BEYOND_SHARED,
  BEFORE_SHARED,
  PLAIN_BEYOND,
  COPY_READ_TOO_SOON,
  COPY_FORGOTTEN,
  COPY_OVER_READ,
  WRITE_READ,
  READ_WRITE,
  WRITE_WRITE,
  WARP_WRITE_READ,
  PLAIN_RACE
};

__global__ void mistake_kernel(const Call c) {
  const int thread = threadIdx.x;
  char* own = shared_memory() + 16 * thread;
  char* other = shared_memory() + 16 * (THREADS - 1 - thread);
  char* neighbour = shared_memory() + 16 * (thread ^ 1);
  store_vector(own, Bytes16{});
  // what is right: neighbours in a warp after synchronize_warp, all after synchronize_block, several readers
  synchronize_warp();
  load_vector<Bytes16>(neighbour);
  synchronize_block();
  load_vector<Bytes16>(other);
  load_vector<Bytes16>(shared_memory());
  synchronize_block();
  // two threads may have different bytes of one word
  store_vector(shared_memory() + 2 * thread, uint16_t(thread));
  synchronize_block();
  switch (c.kind) {
    case NONE:
      break;
    case BARRIER_MISSED:
      if (thread == 5) synchronize_warp();
      synchronize_block();
      break;
    case BARRIER_LEFT:
      if (thread != 5) synchronize_block();
      break;
    case LANES_APART:
      if (thread == 5)
        synchronize_warp();
      else
        warp_sum(1.0f);
      break;
    case MISALIGNED_LOAD:
      load_vector<Bytes16>(own + 8);
      break;
    case MISALIGNED_STORE:
      store_vector(own + 2, 1.0f);
      break;
    case BEYOND_SHARED:
      copy_async16(shared_memory() + c.count + 16 * thread, c.a, true);
      break;
    case BEFORE_SHARED: {
      uint32_t out[4];
      load_matrices(out, shared_memory() - 16);
      break;
    }
    case PLAIN_BEYOND:
      if (thread == 5) shared_memory()[c.count + 4] = 1;
      break;
    case COPY_READ_TOO_SOON:
      copy_async16(own, c.a, true);
      copy_async_commit();
      load_vector<Bytes16>(own);
      copy_async_wait<0>();
      break;
    case COPY_FORGOTTEN:
      copy_async16(own, c.a, true);
      copy_async_commit();
      break;
    case COPY_OVER_READ:
      load_vector<Bytes16>(other);
      copy_async16(own, c.a, true);
      copy_async_commit();
      copy_async_wait<0>();
      break;
    case WRITE_READ:
      store_vector(own, Bytes16{});
      load_vector<Bytes16>(other);
      break;
    case READ_WRITE:
      load_vector<Bytes16>(other);
      store_vector(own, Bytes16{});
      break;
    case WRITE_WRITE:
      store_vector(shared_memory(), Bytes16{});
      break;
    case WARP_WRITE_READ:
      store_vector(own, Bytes16{});
      load_vector<Bytes16>(neighbour);
      break;
    case PLAIN_RACE:
      own[3] = 1;
      static_cast<char*>(c.out)[thread] = other[3];
      break;
  }
}

int run(void (*kernel)(Call), const Call& c, int threads, size_t shared) {
  return launch(kernel, dim3{unsigned(blocks_of(c.count, threads)), 1, 1}, threads, shared, nullptr, c);
}
int run_one(void (*kernel)(Call), const Call& c, int threads, size_t shared) {
  return launch(kernel, dim3{1, 1, 1}, threads, shared, nullptr, c);
}

}  // namespace

#define TEST(NAME) extern "C" SANA_EDGE_API int NAME(const Call* c)

TEST(half_to_float) { return run(to_float_kernel<Half>, *c, THREADS, 0); }
TEST(bfloat16_to_float) { return run(to_float_kernel<BFloat16>, *c, THREADS, 0); }
TEST(float_to_half) { return run(from_float_kernel<Half>, *c, THREADS, 0); }
TEST(float_to_bfloat16) { return run(from_float_kernel<BFloat16>, *c, THREADS, 0); }
TEST(rounded) { return run(round_kernel, *c, THREADS, 0); }
TEST(int8_product) { return run_one(product_kernel<int32_t>, *c, WARP, 0); }
TEST(product_of_16_bits) { return run_one(product_kernel<float>, *c, WARP, 0); }
TEST(matrices) { return run_one(matrices_kernel, *c, WARP, c->count); }
TEST(shuffled) { return run_one(shuffle_kernel, *c, WARP, 0); }
TEST(reduced) { return run_one(reduce_kernel, *c, WARP, 0); }
TEST(exchange) { return run_one(exchange_kernel, *c, THREADS, 0); }
TEST(first_sight) { return run(first_sight_kernel, *c, THREADS, 4 * THREADS); }
TEST(copies) { return run_one(copies_kernel, *c, WARP, 2 * WARP * 16); }
TEST(mistake) { return run_one(mistake_kernel, *c, THREADS, c->count); }
