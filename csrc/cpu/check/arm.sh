#!/bin/sh
# Builds the engine for 64-bit ARM, and runs check/bits.cpp there in qemu and here as well, where the sums are
# about the same. Fails if bits differ. It needs what Debian calls g++-aarch64-linux-gnu and qemu-user.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
flags="-std=c++17 -O2 -Wall -Wextra -Werror -fno-math-errno -fno-trapping-math -ffp-contract=fast -pthread"
engine=$(ls "$here"/../*.cpp | grep -v bindings)
dots=$here/../kernels_neon_bf16.cpp
g++ $flags "$here"/bits.cpp $engine -o "$build"/here &
here_too=$!
aarch64-linux-gnu-g++ $flags -march=armv8.2-a+bf16 -c "$dots" -o "$build"/dots.o
aarch64-linux-gnu-g++ $flags "$here"/bits.cpp $(echo "$engine" | grep -v neon_bf16) "$build"/dots.o -o "$build"/arm
wait $here_too
"$build"/here
run() {  # on a processor
  qemu-aarch64 -cpu "$1" -L /usr/aarch64-linux-gnu "$build"/arm > "$build/$1".txt
}
right=true
run cortex-a72 &  # without dot products of bf16, and with them
other=$!
run max || right=false
wait $other || right=false
for processor in cortex-a72 max; do
  echo "$processor:"
  cat "$build/$processor".txt
done
$right
