// Checks of an operation's arguments: the first that fails decides the status.
#pragma once

#include <initializer_list>

#include "sana_edge.h"

// a row of a matrix, or an image of it, must be addressable with 32 bits
constexpr int64_t LARGEST = INT64_C(1) << 31;

#define SANA_EDGE_CHECK(condition, status) \
  do {                                     \
    if (!(condition)) return status;       \
  } while (0)

inline bool given(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers)
    if (!pointer) return false;
  return true;
}

// NULL counts as aligned: what may be missing is checked as well
inline bool aligned(std::initializer_list<const void*> pointers, uintptr_t bytes = 16) {
  for (const void* pointer : pointers)
    if (reinterpret_cast<uintptr_t>(pointer) % bytes) return false;
  return true;
}

inline bool is_16_bit(int32_t type) { return type == SANA_EDGE_FP16 || type == SANA_EDGE_BF16; }
inline bool is_float(int32_t type) { return type == SANA_EDGE_FP32 || is_16_bit(type); }
