// Host test of csrc/conv_maps.h: exits with 1 and says what is wrong.
#include "conv_maps.h"

#include <stdio.h>
#include <stdlib.h>

#include <set>
#include <vector>

static void expect(bool condition, const char* what, int64_t a, int64_t b) {
  if (condition) return;
  printf("%s: %lld %lld\n", what, (long long)a, (long long)b);
  exit(1);
}

static void divisions() {
  const int divisors[] = {1, 2, 3, 5, 7, 11, 16, 100, 127, 1152, 4096, 65535, 65537, 2147483646, 2147483647};
  for (int by : divisors) {
    const Divider found = divider(by);
    auto check = [&](int64_t n) {
      if (n >= 0 && n < INT64_C(1) << 31) expect(found.divide(int(n)) == n / by, "quotient", n, by);
    };
    for (int64_t n = 0; n < 5000; n++) check(n), check((INT64_C(1) << 31) - 1 - n);
    // on both sides of multiples
    const int64_t step = by * (1 + (INT64_C(1) << 31) / by / 5000);
    for (int64_t n = by; n < INT64_C(1) << 31; n += step) check(n - 1), check(n);
  }
}

// as the kernel finds it: offset of the 16 channels at k of a pixel's window, -1 outside of the map
static int64_t sample_offset(const Map& map, int pixel, int k, int top, int left) {
  const Sample sample = sample_at(map, k, top, left);
  if (!(window_mask(map, pixel, top, left) >> sample.tap & 1)) return -1;
  return int64_t(pixel + sample.shift) * map.depth + sample.channel;
}

// every tap of every pixel is the sample it should be, or outside
static void windows(int images, int height, int width, int depth, int kernel, int top, int left) {
  const Map map = conv_map(height, width, depth, kernel, 8);
  int pixel = 0;
  for (int image = 0; image < images; image++)
    for (int y = 0; y < height; y++)
      for (int x = 0; x < width; x++, pixel++) {
        int k = 0;
        for (int i = 0; i < kernel; i++)
          for (int j = 0; j < kernel; j++)
            for (int channel = 0; channel < depth; channel += 16, k += 16) {
              const int row = y + top + i, column = x + left + j;
              const bool inside = row >= 0 && row < height && column >= 0 && column < width;
              const int64_t expected =
                  inside ? ((int64_t(image) * height + row) * width + column) * depth + channel : -1;
              expect(sample_offset(map, pixel, k, top, left) == expected, "sample", pixel, k);
            }
      }
}

// the corners of all pixels are every pixel of the output once, in the right place
static void corners(int images, int height, int width) {
  const Map map = conv_map(height, width, 16, 3, 8);
  std::set<int64_t> seen;
  int pixel = 0;
  for (int image = 0; image < images; image++)
    for (int y = 0; y < height; y++)
      for (int x = 0; x < width; x++, pixel++)
        for (int corner = 0; corner < 4; corner++) {
          const int64_t row = int64_t(image) * 2 * height + 2 * y + corner / 2, column = 2 * x + corner % 2;
          const int64_t found = upsampled_pixel(map, pixel, corner);
          expect(found == row * 2 * width + column, "corner", pixel, corner);
          seen.insert(found);
        }
  expect(seen.size() == size_t(images) * height * width * 4 && *seen.begin() == 0, "all corners", height, width);
}

static void weights(int columns, int upsample) {
  const Map map = conv_map(4, 4, 16, 3, columns);
  std::set<int> seen;
  for (int corner = 0; corner < 4; corner++)
    for (int column = 0; column < columns; column++)
      seen.insert(weight_row(map, upsample, corner, column));
  expect(int(seen.size()) == 4 * columns && *seen.rbegin() == 4 * columns - 1, "weights", columns, upsample);
}

// a tile of results has a place for each element, and no two lanes of an access meet in a bank
static void results(int columns, int element) {
  std::set<int> seen;
  for (int row = 0; row < 128; row++)
    for (int column = 0; column < columns; column++)
      seen.insert(result_offset(row, column, columns, element));
  expect(int(seen.size()) == 128 * columns && *seen.rbegin() == (128 * columns - 1) * element, "places", columns,
         element);
  for (int first = 0; first < 128; first += 8)
    for (int n = 0; n < columns; n += 8) {
      // 32 lanes write two columns each of 8 rows: no bank has two words
      std::vector<std::set<int>> words(32);
      for (int lane = 0; lane < 32; lane++) {
        const int word = result_offset(first + lane / 4, n + lane % 4 * 2, columns, element) / 4;
        words[word % 32].insert(word);
      }
      for (int bank = 0; bank < 32; bank++) expect(words[bank].size() <= 1, "write", columns, element);
    }
  const int each = 16 / element, groups = columns / each;
  for (int first = 0; first < 128 * groups; first += 8) {
    std::set<int> pieces;
    for (int item = first; item < first + 8; item++) {
      const int offset = result_offset(item / groups, item % groups * each, columns, element);
      expect(offset % 16 == 0, "aligned", columns, element);
      pieces.insert(offset / 16 % 8);
    }
    expect(pieces.size() == 8, "read", columns, element);
  }
}

int main() {
  divisions();
  for (int kernel = 1; kernel <= 3; kernel++)
    for (int depth : {16, 48, 128})
      for (int top = -1; top <= 0; top++)
        for (int left = -1; left <= 0; left++) {
          windows(2, 5, 7, depth, kernel, top, left);
          windows(1, 1, 1, 16, kernel, top, left);
        }
  const Map large = conv_map(4096, 4096, 2048, 3, 8);
  expect(sample_offset(large, 4096 * 4096 - 1, 0, -1, -1) == (INT64_C(4095) * 4096 - 2) * 2048, "large", 0, 0);
  const Map larger_still = conv_map(32768, 32768, 16, 3, 8);
  expect(upsampled_pixel(larger_still, 32768 * 32768 - 1, 3) == INT64_C(65536) * 65536 - 1, "large", 1, 1);
  corners(2, 5, 7);
  corners(1, 1, 1);
  for (int columns : {1, 3, 16, 72}) {
    weights(columns, SANA_EDGE_UPSAMPLE_PHASES);
    weights(columns, SANA_EDGE_UPSAMPLE_SHUFFLE);
  }
  const Map map = conv_map(4, 4, 16, 3, 8);
  expect(window_start(map, SANA_EDGE_UPSAMPLE_PHASES, 0) == -1, "even phase", 0, 0);
  expect(window_start(map, SANA_EDGE_UPSAMPLE_PHASES, 1) == 0, "odd phase", 0, 0);
  expect(window_start(map, SANA_EDGE_UPSAMPLE_NONE, 0) == -1, "window", 3, 0);
  for (int columns : {32, 64, 128, 256}) {
    results(columns, 1);
    results(columns, 2);
  }
  return 0;
}
