// Index arithmetic of cross_attention_quantize.cu: which elements a lane has.
//
// A product does not change when its sum takes channels or keys in another order, the same in both factors: here in
// the one that gives every lane 4 neighbours, so that fragments of m16n8k16 come from memory 8 bytes at a time,
// without shared memory.
#pragma once

#include "device.h"

namespace cross_attention {

constexpr int TOKENS = 16;  // of a block
constexpr int KEYS = 16;    // of a step, two tiles of scores

// rows of the fragments a and of sums that a lane has, half 0 or 1: of 16 tokens
HOST_DEVICE int token_of(int lane, int half) { return lane / 4 + 8 * half; }

// the first of the 4 channels that a lane has in step n of q k^T, in a and in b
HOST_DEVICE int channel_of(int lane, int step) { return 16 * step + lane % 4 * 4; }

// the key that a lane loads as its row of b for a tile of scores: column c of the tile is key 4 (c / 2) + c % 2
HOST_DEVICE int key_row_of(int lane, int tile) { return lane / 8 * 4 + 2 * tile + lane / 4 % 2; }

// the key that sums[.][2 * half + i] of a tile of scores belong to; the first of the 4 that a lane has of p and v
HOST_DEVICE int score_key_of(int lane, int tile, int i) { return lane % 4 * 4 + 2 * tile + i; }
HOST_DEVICE int value_key_of(int lane) { return lane % 4 * 4; }

// the row of V^T that a lane loads for a tile of 8 outputs, and the first of the 2 outputs that it gets of it
HOST_DEVICE int value_row_of(int lane, int tile) { return 8 * tile + lane / 4; }
HOST_DEVICE int output_of(int lane, int tile) { return 8 * tile + lane % 4 * 2; }

// bytes between rows of the staged INT8: an odd number of 16, so that 8 rows lie in different banks
HOST_DEVICE int stage_stride(int columns) { return columns / 16 % 2 ? columns : columns + 16; }

}  // namespace cross_attention
