#!/usr/bin/env bash
# Builds the engine and the reader of PNGs with sanitizers in a folder of their own, and runs their tests there, on every
# instruction set that this machine has. The first finding fails. It needs g++, zlib's headers and what the tests need;
# arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/../.."
export TARFLOW_FAST_SANITIZERS=address,undefined TARFLOW_FAST_CUDA=0
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/source"
cp -R csrc kernels tarflow_fast setup.py pyproject.toml README.md LICENSE "$folder/source"
cp -R csrc tests pyproject.toml "$folder"  # csrc is for the emulation of CUDA, which some of these tests need
cd "$folder"
CXX=g++ python -m pip install --quiet --no-deps --target . ./source
ls tarflow_fast/_cpu* tarflow_fast/_png* > /dev/null  # the extensions are optional: without them tests would be skipped

# Python itself is not instrumented, so the runtime has to be there before it, and the library whose throw it watches.
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
export LD_PRELOAD
# Leaks are Python's own. Memory is full of NaN (0xff…) until it is written.
export ASAN_OPTIONS=detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1000000000
export UBSAN_OPTIONS=print_stacktrace=1
# The sanitizer itself takes more memory than the test of peak memory allows, so that test is left out.
python -m pytest tests/backend/cpu tests/models/test_cpu_density.py tests/models/test_cpu_density_fallback.py \
  tests/engine/test_contract.py tests/engine/test_windows.py tests/backend/test_masked.py tests/sampling/test_masked.py \
  tests/test_spline.py tests/fused tests/data/test_png.py \
  -m "not slow or between" -k "(cpu or png) and not peak_memory" "$@"
