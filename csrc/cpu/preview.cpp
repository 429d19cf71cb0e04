// latent_to_rgb: a linear map of the channels to RGB at every latent position, enlarged bilinearly. The
// specification is latentfast/reference/preview.py; preview.h says how it is done.
#include "cpu/preview.h"

namespace latentfast {
namespace {

// How many rows of the output a task has: enough that the rows above it, which it shares, do not matter.
constexpr int64_t kBand = 64;

// Latents in memory.
template <typename T>
struct Latents {
  using C = Working<T>;
  using Room = Row<T>;
  static constexpr int kMost = kTile;

  explicit Latents(const View& z)
      : batch(z.size(0)),
        channels(z.size(1)),
        frames(z.size(2)),
        height(z.size(3)),
        width(z.size(4)),
        z_(data<T>(z)) {}

  const C* read(int64_t b, int64_t c, int64_t at, int n, Room& room) const {
    return widen(z_ + (b * channels + c) * frames * height * width + at, n, room);
  }

  int64_t batch, channels, frames, height, width;

 private:
  const T* z_;
};

void latent_to_rgb(const View& z, const View& weight, const View& bias, const View& out) {
  check_contiguous(z, "z");
  if (!check_preview(z, weight, bias, out, "latent_to_rgb")) return;
  dispatch_floating(z.scalar_type(), "latent_to_rgb", [&]<typename T>() {
    using C = Working<T>;
    const Latents<T> source(z);
    const C *w = data<C>(weight), *b = data<C>(bias);
    if (out.scalar_type() == ScalarType::Byte) {
      Preview<Latents<T>, uint8_t>(source, w, b, out, kBand).run();
    } else {
      Preview<Latents<T>, C>(source, w, b, out, kBand).run();
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(latentfast, CPU, m) { m.impl("latent_to_rgb", LATENTFAST_BOX(latent_to_rgb)); }

}  // namespace latentfast
