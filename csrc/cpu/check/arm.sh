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
aarch64-linux-gnu-g++ $flags -march=armv8.2-a+bf16 -c "$dots" -o "$build"/dots.o
aarch64-linux-gnu-g++ $flags "$here"/bits.cpp $(echo "$engine" | grep -v neon_bf16) "$build"/dots.o -o "$build"/arm
g++ $flags "$here"/bits.cpp $engine -o "$build"/here
"$build"/here
for processor in cortex-a72 max; do  # without and with dot products of bf16
  echo "$processor:"
  qemu-aarch64 -cpu $processor -L /usr/aarch64-linux-gnu "$build"/arm
done
