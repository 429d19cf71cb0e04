// Launches of kernels whose blocks wait for each other: the driver starts all of them at once or none, in a
// stream's order, in a CUDA graph too, and the barrier (cooperative_groups' grid.sync) is the driver's own.
#pragma once

#include "launch.cuh"

namespace latentfast::cuda {

// The most blocks of a kernel that the card holds at once. Asked for once a device.
template <auto kKernel, int kThreads>
int64_t resident_blocks(const Target& target) {
  static std::array<std::atomic<int>, kMaxDevices> known;
  int blocks = known[target.index].load(std::memory_order_relaxed);
  if (blocks == 0) {
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kKernel, kThreads, 0), "occupancy");
    STD_TORCH_CHECK(blocks > 0, "a kernel does not fit on device ", target.index);
    blocks *= target.device.multiprocessors;
    known[target.index].store(blocks, std::memory_order_relaxed);
  }
  return blocks;
}

// `blocks`: at most resident_blocks.
template <auto kKernel, int kThreads, typename Params>
void launch_together(Params& params, int64_t blocks, const Target& target, const char* name) {
  void* arguments[] = {&params};
  check(cudaLaunchCooperativeKernel(kKernel, dim3(static_cast<uint32_t>(blocks)), dim3(kThreads), arguments,
                                    0, target.stream),
        name);
}

}  // namespace latentfast::cuda
