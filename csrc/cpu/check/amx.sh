#!/bin/sh
# Builds the engine with AMX's tile registers and dot products of bf16 in plain C++, and runs check/bits.cpp with them.
# Fails if bits differ, or if this machine has AMX and its sums are others. It needs g++ for x86-64, and AVX2.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
flags="-std=c++17 -O1 -Wall -Wextra -Werror -Wno-psabi -fno-math-errno -fno-trapping-math -ffp-contract=fast -pthread"
amx="-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mavx512bf16 -mamx-tile -mamx-bf16"
compile() {  # a source, the name of its object, flags
  g++ $flags $3 -c "$1" -o "$build/$2.o"
}
link() {
  g++ -pthread "$build"/common_*.o "$build/$1"_*.o -o "$build/$1"
}
for others in avx2 avx512 avx512_bf16; do
  printf '#include "%s/../kernels.h"\nnamespace tarflow { extern const Kernels* const kernels_%s; ' "$here" $others
  printf 'const Kernels* const kernels_%s = nullptr; }\n' $others
done > "$build"/none.cpp
{
  compile "$here"/../kernels_amx_bf16.cpp real_kernels "$amx"
  compile "$here"/../dispatch.cpp real_dispatch ""
  for source in "$here"/bits.cpp "$build"/none.cpp "$here"/../*.cpp; do
    case $(basename "$source" .cpp) in
      bindings | dispatch | kernels_a*) continue ;;
    esac
    compile "$source" common_"$(basename "$source" .cpp)" ""
  done
} &
compile "$here"/../kernels_amx_bf16.cpp emulated_kernels "-DTARFLOW_EMULATED=1 -mavx2 -mfma"
compile "$here"/../dispatch.cpp emulated_dispatch -DTARFLOW_EMULATED=1
wait $!
for each in emulated real; do
  link $each
  "$build/$each" > "$build/$each".txt
done
cat "$build"/emulated.txt
if grep -q amx_bf16 "$build"/real.txt; then diff "$build"/emulated.txt "$build"/real.txt; fi
