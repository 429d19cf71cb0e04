// Which of the compiled instruction sets runs: the best one that the processor has.
#include <atomic>
#include <cstring>

#include "cpu/loops.h"

namespace latentfast {

// setup.py compiles loops.cpp once for each of these (LATENTFAST_ISAS) and lists the best first.
#define LATENTFAST_DECLARE(isa) extern const Loops kLoops_##isa;
LATENTFAST_ISAS(LATENTFAST_DECLARE)
#undef LATENTFAST_DECLARE

namespace {

bool runs_here([[maybe_unused]] const char* isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (std::strcmp(isa, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") &&
           __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  }
  if (std::strcmp(isa, "avx2") == 0) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  }
#endif
  return true;
}

const Loops* find(const char* wanted) {
#define LATENTFAST_TRY(isa) \
  if ((wanted == nullptr || std::strcmp(wanted, #isa) == 0) && runs_here(#isa)) return &kLoops_##isa;
  LATENTFAST_ISAS(LATENTFAST_TRY)
#undef LATENTFAST_TRY
  return nullptr;
}

std::atomic<const Loops*>& current() {
  static std::atomic<const Loops*> loops{find(nullptr)};
  return loops;
}

}  // namespace

const Loops& loops() { return *current().load(std::memory_order_relaxed); }

}  // namespace latentfast

// The name of the instruction set in use.
extern "C" __attribute__((visibility("default"))) const char* latentfast_cpu_isa() {
  return latentfast::loops().isa;
}

// Use another instruction set ("avx512", "avx2", "baseline"; null: the best one), for the tests that compare
// their bits. False, and nothing happens, where this library or this processor has none of that name.
extern "C" __attribute__((visibility("default"))) bool latentfast_cpu_use_isa(const char* name) {
  const latentfast::Loops* found = latentfast::find(name);
  if (found != nullptr) latentfast::current().store(found);
  return found != nullptr;
}
