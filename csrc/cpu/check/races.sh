#!/bin/sh
# Builds the engine with ThreadSanitizer, and runs check/bits.cpp, whose callers share the engine's threads. Fails at the
# first data race. It needs g++ with its libtsan.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
flags="-std=c++17 -O1 -g1 -fsanitize=thread -fno-math-errno -fno-trapping-math -ffp-contract=fast -pthread"
jobs=
for source in "$here"/bits.cpp "$here"/../*.cpp; do
  case $(basename "$source" .cpp) in
    bindings) continue ;;
    kernels_avx2) set="-mavx2 -mfma" ;;
    *) set= ;;
  esac
  g++ $flags $set -c "$source" -o "$build/$(basename "$source" .cpp).o" &
  jobs="$jobs $!"
done
for job in $jobs; do wait "$job"; done
g++ $flags "$build"/*.o -o "$build"/bits
TSAN_OPTIONS=halt_on_error=1 "$build"/bits
