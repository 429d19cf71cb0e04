// What every CUDA kernel of this library shares: the current stream and device, launch checks, facts about
// the card, and loads and stores of 16 bytes, the widest that one thread can make.
//
// The library must also load beside a torch that was built without CUDA (that is how `backends.py` can tell
// the reason), so no symbol of libtorch_cuda is referenced: the one that is needed, the current stream, is
// looked up at the first launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <array>
#include <atomic>
#include <cstdint>

#include "../common/stable.h"

namespace latentfast::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // reported once: the next launch must not find it again
  STD_TORCH_CHECK(false, what, ": ", cudaGetErrorString(status));
}

// The error of the launch itself; what goes wrong while the kernel runs shows at the next synchronisation, as
// in torch.
inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

// The stream torch is on, for this device and thread: a capturing one while a CUDA graph is recorded.
inline cudaStream_t current_stream(int device) {
  using Lookup = AOTITorchError (*)(int32_t, void**);
  static const Lookup lookup = [] {
    constexpr const char* name = "aoti_torch_get_current_cuda_stream";
    void* found = dlsym(RTLD_DEFAULT, name);
    if (found == nullptr) {  // torch's libraries may have been loaded with local visibility
      if (void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD)) found = dlsym(library, name);
    }
    return reinterpret_cast<Lookup>(found);
  }();
  STD_TORCH_CHECK(lookup != nullptr, "this torch has no CUDA: its current stream cannot be found");
  void* stream = nullptr;
  STD_TORCH_CHECK(lookup(device, &stream) == 0, "torch did not give its current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// Makes a device current for a scope. Nothing is called where it already is, which is nearly always.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    changed_ = before_ != device;
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

constexpr int kMaxDevices = 64;

struct Device {
  int multiprocessors;
  int capability;  // 90 for compute capability 9.0
};

inline const Device& device_of(int device) {
  static std::array<Device, kMaxDevices> devices;
  static std::array<std::atomic<bool>, kMaxDevices> known;
  STD_TORCH_CHECK(device >= 0 && device < kMaxDevices, "device index out of range: ", device);
  if (!known[device].load(std::memory_order_acquire)) {  // two threads may both ask: they write the same
    int count, major, minor;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
          "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
          "cudaDeviceGetAttribute");
    devices[device] = {count, 10 * major + minor};
    known[device].store(true, std::memory_order_release);
  }
  return devices[device];
}

// Where an operator's kernels go: the device of its tensors, made current, and torch's stream on it.
class Target {
 public:
  template <typename X>  // a Tensor or a View
  explicit Target(const X& x)
      : index(x.get_device_index()), guard_(index), stream(current_stream(index)), device(device_of(index)) {}

  const int index;

 private:
  DeviceGuard guard_;

 public:
  const cudaStream_t stream;
  const Device& device;
};

// Scratch memory from torch's allocator: ordered with the stream, and part of a CUDA graph that is being
// captured. It may be freed as soon as the kernels that use it are launched.
class Workspace {
 public:
  Workspace(const Target& target, int64_t bytes) {
    if (bytes == 0) return;
    const int64_t stride = 1;
    AtenTensorHandle handle;
    STD_TORCH_CHECK(aoti_torch_empty_strided(1, &bytes, &stride, aoti_torch_dtype_uint8(),
                                             aoti_torch_device_type_cuda(), target.index, &handle) == 0,
                    "cannot allocate ", bytes, " bytes of scratch memory");
    tensor_ = Tensor(handle);
    data_ = tensor_->data_ptr();
  }
  // At a multiple of the allocator's 512 bytes.
  void* data() const { return data_; }

 private:
  std::optional<Tensor> tensor_;
  void* data_ = nullptr;
};

constexpr int kSharedBytes = 48 << 10;  // of shared memory, what a block may have without asking

inline bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename I>
__host__ __device__ constexpr I ceil_div(I x, I y) {
  return (x + y - 1) / y;
}

// The type that elements of T are computed in.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// How many elements 16 bytes hold.
template <typename T>
constexpr int kPack = 16 / sizeof(T);

template <typename T>
__device__ __forceinline__ Wide<T> widen(T x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return __uint_as_float(static_cast<uint32_t>(x.x) << 16);
  } else if constexpr (std::is_same_v<T, Half>) {
    return __half2float(__ushort_as_half(x.x));
  } else {
    return x;
  }
}

// Rounded to nearest, ties to even.
template <typename T>
__device__ __forceinline__ T narrow(Wide<T> x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return BFloat16(__bfloat16_as_ushort(__float2bfloat16_rn(x)), BFloat16::from_bits());
  } else if constexpr (std::is_same_v<T, Half>) {
    return Half(__half_as_ushort(__float2half_rn(x)), Half::from_bits());
  } else {
    return x;
  }
}

// The elements in 16 bytes, widened.
template <typename T>
__device__ __forceinline__ void unpack(const uint4& raw, Wide<T> (&x)[kPack<T>]) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<T, BFloat16>) {
        x[2 * i] = __uint_as_float(words[i] << 16);
        x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
      } else {
        const float2 pair = __half22float2(reinterpret_cast<const __half2&>(words[i]));
        x[2 * i] = pair.x;
        x[2 * i + 1] = pair.y;
      }
    }
  } else if constexpr (sizeof(T) == 4) {
    x[0] = __uint_as_float(raw.x);
    x[1] = __uint_as_float(raw.y);
    x[2] = __uint_as_float(raw.z);
    x[3] = __uint_as_float(raw.w);
  } else {
    x[0] = __hiloint2double(raw.y, raw.x);
    x[1] = __hiloint2double(raw.w, raw.z);
  }
}

// The other way: rounded once, to nearest.
template <typename T>
__device__ __forceinline__ uint4 pack(const Wide<T> (&x)[kPack<T>]) {
  if constexpr (sizeof(T) == 2) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<T, BFloat16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
        words[i] = reinterpret_cast<const uint32_t&>(pair);
      } else {
        const __half2 pair = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
        words[i] = reinterpret_cast<const uint32_t&>(pair);
      }
    }
    return {words[0], words[1], words[2], words[3]};
  } else if constexpr (sizeof(T) == 4) {
    return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
  } else {
    return {static_cast<uint32_t>(__double2loint(x[0])), static_cast<uint32_t>(__double2hiint(x[0])),
            static_cast<uint32_t>(__double2loint(x[1])), static_cast<uint32_t>(__double2hiint(x[1]))};
  }
}

// The same number. The compiler does not know that, and keeps no running copies of what is linear in it:
// there are no registers for them.
template <typename I>
__device__ __forceinline__ I computed_anew(I x) {
  if constexpr (std::is_same_v<I, uint4>) {
    asm volatile("" : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w));
  } else if constexpr (sizeof(I) == 8) {
    asm volatile("" : "+l"(x));
  } else {
    asm volatile("" : "+r"(x));
  }
  return x;
}

// 16 bytes of an input, at this point of the program: loads that belong together stay together. Without a
// hint for L1, even for what is read once: with L1::no_allocate passes over several tensors took 2 to 8%
// longer.
__device__ __forceinline__ uint4 load(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// One line of 128 bytes into L2.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// 16 bytes that this kernel does not read back: first to leave L2 when room is needed.
__device__ __forceinline__ void store_once(void* p, const uint4& v) { __stcs(static_cast<uint4*>(p), v); }

}  // namespace latentfast::cuda
