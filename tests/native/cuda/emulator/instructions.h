// The warp-wide instructions: inputs of 32 lanes in, outputs of 32 lanes out.
#pragma once

namespace moso_fast::emulator {

struct WarpData {
  unsigned char input[32][64];
  unsigned char output[32][16];
};

// mma.sync m16n8k16 on device::MultiplyInput, m16n8k8 with zeros in the rest of it. `cut`: sums cut
// off to 24 digits, not rounded.
void multiply(WarpData& warp, bool cut);
// ldmatrix .x4 with or without .trans, on device::MatricesInput into `shared`.
void load_matrices(WarpData& warp, const unsigned char* shared);
// shfl.sync.bfly on device::ShuffleInput; false where the lanes' masks differ.
bool shuffle(WarpData& warp);

}  // namespace moso_fast::emulator
