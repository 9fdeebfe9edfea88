// What the warp-wide instructions and conversions do, number by number.
#include "instructions.h"

#include "device.cuh"

namespace moso_fast::emulator {
namespace {

float number(bool float16, uint32_t word, int half) {
  if (float16) return expand_float16(uint16_t(half ? word >> 16 : word));
  const uint32_t bits = half ? word & 0xffff0000u : word << 16;
  return device::bits_float(bits);
}

// Rounded to nearest, or cut off as tensor cores do.
float to_float(double sum, bool cut) {
  float x = float(sum);
  if (cut && std::isfinite(x) && std::fabs(double(x)) > std::fabs(sum)) x = std::nextafter(x, 0.0f);
  return x;
}

}  // namespace

void multiply(WarpData& warp, bool cut) {
  double a[16][16], b[16][8];
  float sums[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    device::MultiplyInput in;
    std::memcpy(&in, warp.input[lane], sizeof in);
    const int g = lane / 4, t = lane % 4;
    for (int w = 0; w < 4; ++w)
      for (int e = 0; e < 2; ++e)
        a[g + 8 * (w & 1)][2 * t + 8 * (w >> 1) + e] = number(in.float16, in.a[w], e);
    for (int w = 0; w < 2; ++w)
      for (int e = 0; e < 2; ++e) b[2 * t + 8 * w + e][g] = number(in.float16, in.b[w], e);
    for (int i = 0; i < 4; ++i) sums[g + 8 * (i >> 1)][2 * t + (i & 1)] = in.sums[i];
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    float out[4];
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i >> 1), column = 2 * (lane % 4) + (i & 1);
      double sum = 0.0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      out[i] = to_float(sum + double(sums[row][column]), cut);
    }
    std::memcpy(warp.output[lane], out, sizeof out);
  }
}

void load_matrices(WarpData& warp, const unsigned char* shared) {
  uint16_t matrix[4][8][8];
  bool transposed = false;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    device::MatricesInput in;
    std::memcpy(&in, warp.input[lane], sizeof in);
    transposed = in.transposed != 0;
    std::memcpy(matrix[lane / 8][lane % 8], shared + in.offset, 16);
  }
  for (int lane = 0; lane < kWarpSize; ++lane)
    for (int m = 0; m < 4; ++m) {
      const int g = lane / 4, t = lane % 4;
      const uint16_t low = transposed ? matrix[m][2 * t][g] : matrix[m][g][2 * t];
      const uint16_t high = transposed ? matrix[m][2 * t + 1][g] : matrix[m][g][2 * t + 1];
      const uint32_t word = low | uint32_t(high) << 16;
      std::memcpy(warp.output[lane] + 4 * m, &word, 4);
    }
}

bool shuffle(WarpData& warp) {
  device::ShuffleInput in[kWarpSize];
  for (int lane = 0; lane < kWarpSize; ++lane) std::memcpy(&in[lane], warp.input[lane], 8);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (in[lane].mask != in[0].mask) return false;
    std::memcpy(warp.output[lane], &in[lane ^ in[lane].mask].bits, 4);
  }
  return true;
}

uint16_t round_bfloat16(float x) {
  uint32_t bits = device::float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  bits += 0x7fffu + ((bits >> 16) & 1u);
  return uint16_t(bits >> 16);
}

float expand_float16(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000u) << 16, exponent = (x >> 10) & 31u;
  const uint32_t mantissa = x & 0x3ffu;
  if (exponent == 0) {
    const float tiny = std::ldexp(float(mantissa), -24);
    return sign ? -tiny : tiny;
  }
  if (exponent == 31) return device::bits_float(sign | 0x7f800000u | mantissa << 13);
  return device::bits_float(sign | (exponent + 112u) << 23 | mantissa << 13);
}

}  // namespace moso_fast::emulator
