#!/usr/bin/env bash
# Everything that needs a GPU, in one script: build, tests, sanitizers, benchmark rows. Needs torch and nvcc (or libraries
# already built) and downloads nothing. Logs and rows go to OUT (default: out/gpu).
#
#   tools/gpu.sh [build] [test] [sanitize] [bench]      all four if none is named
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/gpu}
PYTHON=${PYTHON:-python3}
steps=${*:-build test sanitize bench}
mkdir -p "$OUT"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=0

step() { # NAME COMMAND...: run it, keep its log, go on if it fails
  local name=$1
  shift
  echo "== $name: $*"
  if ! timeout "${STEP_SECONDS:-900}" "$@" 2>&1 | tee "$OUT/$name.log" | tail -n "${TAIL:-25}"; then
    echo "== $name FAILED"
    failed=1
  fi
}

for one in $steps; do
  case $one in
    build)
      if ls latentfast/_native_cuda*.so >/dev/null 2>&1 && [ "${REBUILD:-0}" = 0 ]; then
        echo "== build: the libraries are there already (REBUILD=1 makes them anew)"
      else
        step build env LATENTFAST_CUDA=1 "$PYTHON" setup.py build_ext --inplace
      fi
      step doctor "$PYTHON" -m latentfast.doctor
      ;;
    test) step test "$PYTHON" -m pytest -q -p no:cacheprovider ${PYTEST_ARGS:-} ;;
    sanitize)
      for tool in memcheck racecheck; do
        step "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
          "$PYTHON" tools/sanitize.py --backend cuda
      done
      ;;
    bench) step bench "$PYTHON" -m latentfast bench run --device cuda --out "$OUT" ${BENCH_ARGS:-} ;;
    *) echo "unknown step '$one': build, test, sanitize or bench" >&2; exit 2 ;;
  esac
done
exit $failed
