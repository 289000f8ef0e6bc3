#!/bin/sh
# Builds the engine for 64-bit ARM and for this machine, and runs check/bits.cpp, whose sums are about the same on both,
# and the golden cases by check/golden.cpp, there in qemu. Fails if bits differ, or a case. It needs what Debian calls
# g++-aarch64-linux-gnu and qemu-user, and Python with tarflow_fast and the tests' own dependencies.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
flags="-std=c++17 -O2 -Wall -Wextra -Werror -fno-math-errno -fno-trapping-math -ffp-contract=fast -pthread"
python "$here"/../../../tests/golden/flat.py "$build"/golden.cases
compile() {  # a compiler, a folder, what this processor may have
  mkdir "$build/$2"
  jobs=
  for source in "$here"/bits.cpp "$here"/golden.cpp "$here"/../*.cpp; do
    name=$(basename "$source" .cpp)
    set=
    case $2/$name in
      */bindings) continue ;;
      arm/kernels_neon_bf16) set=$3 ;;
    esac
    $1 $flags $set -c "$source" -o "$build/$2/$name.o" &
    jobs="$jobs $!"
  done
  for job in $jobs; do wait "$job"; done
  engine=$(ls "$build/$2"/*.o | grep -v -e /bits.o -e /golden.o)
  for each in bits golden; do $1 -pthread "$build/$2/$each.o" $engine -o "$build/$2/$each"; done
}
compile g++ here ""
compile aarch64-linux-gnu-g++ arm -march=armv8.2-a+bf16
"$build"/here/bits
"$build"/here/golden "$build"/golden.cases
for processor in cortex-a72 max; do  # without and with dot products of bf16
  echo "$processor:"
  qemu-aarch64 -cpu $processor -L /usr/aarch64-linux-gnu "$build"/arm/bits
  qemu-aarch64 -cpu $processor -L /usr/aarch64-linux-gnu "$build"/arm/golden "$build"/golden.cases
done
