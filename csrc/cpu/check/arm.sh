#!/bin/sh
# Builds the engine for 64-bit ARM, and runs check/bits.cpp there in qemu and here as well, where the sums are
# about the same. Fails if bits differ. It needs what Debian calls g++-aarch64-linux-gnu and qemu-user.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
flags="-std=c++17 -O2 -Wall -Wextra -Werror -fno-math-errno -fno-trapping-math -ffp-contract=fast -pthread"
engine=$(ls "$here"/../*.cpp | grep -v bindings)
aarch64-linux-gnu-g++ $flags "$here"/bits.cpp $engine -o "$build"/arm
g++ $flags "$here"/bits.cpp $engine -o "$build"/here
"$build"/here
qemu-aarch64 -L /usr/aarch64-linux-gnu "$build"/arm
