// Numbers from the host, more of them than a kernel takes by value.
#pragma once

#include <algorithm>
#include <span>

#include "launch.cuh"

namespace latentfast::cuda {

template <typename C>
struct Handful {
  C value[256];
};

template <typename C>
__global__ void write_handful(const __grid_constant__ Handful<C> handful, C* out, int count) {
  if (static_cast<int>(threadIdx.x) < count) out[threadIdx.x] = handful.value[threadIdx.x];
}

// Writes them to device memory by a few launches, which a CUDA graph can record.
template <typename V, typename C>
void upload(std::span<const V> values, C* out, cudaStream_t stream) {
  for (size_t begin = 0; begin < values.size(); begin += 256) {
    const int count = static_cast<int>(std::min<size_t>(256, values.size() - begin));
    Handful<C> handful;
    for (int i = 0; i < count; ++i) handful.value[i] = static_cast<C>(values[begin + i]);
    write_handful<C><<<1, 256, 0, stream>>>(handful, out + begin, count);
    check_launch("numbers from the host");
  }
}

}  // namespace latentfast::cuda
