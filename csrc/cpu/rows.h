// Rows of at most kTile elements on their way between tensors and the loops: widened to the working
// precision, rounded back, or put together from a broadcast operand.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "common/stable.h"
#include "cpu/loops.h"

namespace latentfast {

// What a dtype is computed in.
template <typename T>
using Working = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
inline constexpr bool kIsWide = std::is_same_v<T, Working<T>>;

// Elements that make a task worth a thread: torch's own measure. Waking one costs milliseconds on a busy
// machine.
constexpr int64_t kGrain = 32768;

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// A loop over [0, count) on torch's threads. No result may depend on how it is split.
template <typename F>
void parallel(int64_t count, int64_t elements_each, F&& f) {
  if (count <= 0) return;
  const auto task = [&](int64_t begin, int64_t end) {
    f(begin, end);
#if defined(__x86_64__)
    _mm_sfence();  // what was written around the caches is there before another thread goes on
#endif
  };
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_each)),
                              task);
}

inline int64_t item_size(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : (dtype == ScalarType::Float ? 4 : 2);
}

inline void zero(const View& x) {
  if (x.numel() > 0) std::memset(x.mutable_data_ptr(), 0, x.numel() * item_size(x.scalar_type()));
}

template <typename C>
struct WorkingRow {
  alignas(64) C values[kTile];
};

// Room for a row of T in the working precision.
template <typename T>
using Row = WorkingRow<Working<T>>;

// n elements in the working precision: those of x themselves if they have it, or `buffer`.
template <typename T>
const Working<T>* widen(const T* x, int n, Row<T>& buffer) {
  if constexpr (kIsWide<T>) {
    return x;
  } else {
    const auto* u = reinterpret_cast<const uint16_t*>(x);
    if constexpr (std::is_same_v<T, Half>) {
      loops().widen_half(u, n, buffer.values);
    } else {
      loops().widen_bfloat16(u, n, buffer.values);
    }
    return buffer.values;
  }
}

// A single element, for the rare paths that go one by one.
template <typename T>
Working<T> widened(const T& x) {
  if constexpr (kIsWide<T>) {
    return x;
  } else {
    float out;
    const auto* u = reinterpret_cast<const uint16_t*>(&x);
    std::is_same_v<T, Half> ? loops().widen_half(u, 1, &out) : loops().widen_bfloat16(u, 1, &out);
    return out;
  }
}

// The same in a given precision, for operands of a dtype of their own.
template <typename C, typename M>
const C* widen_to(const M* x, int n, Row<C>& buffer) {
  if constexpr (std::is_same_v<Working<M>, C>) {
    return widen(x, n, buffer);
  } else {
    for (int i = 0; i < n; ++i) buffer.values[i] = static_cast<C>(widened(x[i]));
    return buffer.values;
  }
}

// A working row rounded to T.
template <typename T>
void round_row(const Working<T>* row, int n, T* out) {
  if constexpr (kIsWide<T>) {
    std::copy_n(row, n, out);
  } else if constexpr (std::is_same_v<T, Half>) {
    loops().round_half(row, n, reinterpret_cast<uint16_t*>(out));
  } else {
    loops().round_bfloat16(row, n, reinterpret_cast<uint16_t*>(out));
  }
}

// Results from this size on are written around the caches: else their old contents would be read first, as
// much memory traffic again. Smaller ones are left in a cache for whoever reads them next; of larger ones
// that reader would find a part there at best, which is worth less than the reading saved.
constexpr int64_t kStreamedBytes = int64_t(4) << 20;

// A tensor of results, written row by row. An absent one takes no rows.
template <typename T>
class Output {
 public:
  Output(T* data, int64_t numel)
      : data_(data), streams_(numel * static_cast<int64_t>(sizeof(T)) >= kStreamedBytes) {}

  explicit operator bool() const { return data_ != nullptr; }
  T& operator[](int64_t i) const { return data_[i]; }
  bool streams() const { return streams_; }

  // Where the row of results at `at` is computed; it goes to `finish` then.
  Working<T>* begin(int64_t at, Row<T>& buffer) const {
    if constexpr (kIsWide<T>) {
      if (data_ != nullptr && !streams_) return data_ + at;
    }
    return buffer.values;
  }

  void finish(const Working<T>* row, int n, int64_t at) const {
    if (data_ == nullptr) return;
    if constexpr (kIsWide<T>) {
      if (row != data_ + at) copy(row, n, at);
    } else if (streams_) {
      alignas(64) T packed[kTile];
      round_row(row, n, packed);
      copy(packed, n, at);
    } else {
      round_row(row, n, data_ + at);
    }
  }

  // Finished elements, with their bits.
  void copy(const T* from, int64_t n, int64_t at) const {
    if (streams_) {
      loops().stream(from, n * static_cast<int64_t>(sizeof(T)), data_ + at);
    } else {
      std::memcpy(static_cast<void*>(data_ + at), from, n * sizeof(T));
    }
  }

 private:
  T* data_;
  bool streams_;
};

// And back.
template <typename T>
T rounded(Working<T> value) {
  if constexpr (kIsWide<T>) {
    return value;
  } else {
    T out;
    round_row(&value, 1, &out);
    return out;
  }
}

// The lanes of a reduction, added in a fixed order.
inline double add_lanes(const double* lanes) {
  double part[kLanes];
  std::copy(lanes, lanes + kLanes, part);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  }
  return part[0];
}

// An operand that broadcasts to a target, read along the target's elements. C: the working precision of the
// kernel.
template <typename C>
class Broadcast {
 public:
  // `operand` is contiguous, of dtype `dtype`, and of the shape `shape` aligned at the right with `target`.
  Broadcast(const void* operand, ScalarType dtype, Shape shape, Shape target, const char* name)
      : data_(static_cast<const char*>(operand)), dtype_(dtype) {
    STD_TORCH_CHECK(join_dims<1>(target, 0, target.dims, {shape}, joined_), name,
                    " has too many broadcast dimensions");
    inner_ = joined_.size[joined_.dims - 1];
    varies_ = joined_.stride[0][joined_.dims - 1] != 0;
    size_ = item_size(dtype);
  }

  // Where the operand's values at n elements of the target from `start` on lie side by side; null if they do
  // not.
  const C* direct(int64_t start, int64_t n, int64_t skip = 0) const {
    if (dtype_ != kDtype || !varies_ || inner_ - start % inner_ < n) return nullptr;
    int64_t at[1];
    joined_.offsets(start, at);
    return reinterpret_cast<const C*>(data_) + at[0] + skip;
  }

  // The operand's values at n ≤ kTile elements of the target from `start` on: in `buffer`, or where they lie.
  // `skip`: elements of the operand to pass over first, to get at one of several stacked operands.
  const C* read(int64_t start, int n, C* buffer, int64_t skip = 0) const {
    if (const C* there = direct(start, n, skip)) return there;
    int64_t at[1];
    joined_.offsets(start, at);
    at[0] += skip;
    int64_t left = inner_ - start % inner_;
    for (int done = 0; done < n;) {
      const int run = static_cast<int>(std::min<int64_t>(left, n - done));
      if (varies_) {
        copy(at[0], run, buffer + done);
      } else {
        C value;
        copy(at[0], 1, &value);
        std::fill(buffer + done, buffer + done + run, value);
      }
      done += run;
      left = inner_;
      if (done < n) {
        joined_.offsets(start + done, at);
        at[0] += skip;
      }
    }
    return buffer;
  }

 private:
  static constexpr ScalarType kDtype = std::is_same_v<C, double> ? ScalarType::Double : ScalarType::Float;

  void copy(int64_t offset, int n, C* out) const {
    const char* from = data_ + offset * size_;
    switch (dtype_) {
      case ScalarType::Double:
        std::copy_n(reinterpret_cast<const double*>(from), n, out);
        break;
      case ScalarType::Float:
        std::copy_n(reinterpret_cast<const float*>(from), n, out);
        break;
      default:
        if constexpr (std::is_same_v<C, float>) {
          const auto* u = reinterpret_cast<const uint16_t*>(from);
          dtype_ == ScalarType::Half ? loops().widen_half(u, n, out) : loops().widen_bfloat16(u, n, out);
        }
    }
  }

  const char* data_;
  ScalarType dtype_;
  Joined<1> joined_;
  int64_t inner_;
  int64_t size_;
  bool varies_;
};

}  // namespace latentfast
