// LATENTFAST_HD: for functions that the CPU's compiler and CUDA's both take.
#pragma once

#ifdef __CUDACC__
#define LATENTFAST_HD __host__ __device__ inline
#else
#define LATENTFAST_HD inline
#endif
