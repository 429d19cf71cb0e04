// The gate of the tone map: of tone_map, alone and in a plan.
#pragma once

#include "launch.cuh"

namespace latentfast::cuda {

// 1/(1 + 2^x). In float32 it is four instructions, each within two units in the last place; with a reciprocal
// rounded as IEEE has it and an exponential that keeps subnormals, tone_map had about 25 an element, which
// take as long as its memory.
__device__ __forceinline__ float gate_at(float x) {
  float power, gate;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(gate) : "f"(1.0f + power));
  return gate;
}
__device__ __forceinline__ double gate_at(double x) { return 1.0 / (1.0 + exp2(x)); }

}  // namespace latentfast::cuda
