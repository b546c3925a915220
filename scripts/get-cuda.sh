#!/usr/bin/env bash
# Makes a tree to build the features `cuda` and `nccl` with, without a GPU, a driver or a toolkit:
#
#     scripts/get-cuda.sh DIR
#     CUDA_HOME=DIR PATH=DIR/bin:$PATH CUDA_COMPUTE_CAP=90 cargo build --release --features cuda
#
# DIR gets nvcc, headers and the static runtime of CUDA 13.0 out of pinned Python wheels (105 MB to fetch, 270 MB unpacked), and
# libraries to link with that open libcuda, libcublas, libcurand, libnvrtc, libcudnn and libnccl at the first call: the program
# starts on a machine that has none of them. Run again, it does nothing. The tree holds absolute paths: make it where it stays.
#
# Linux on x86-64; needs python3 with pip, unzip, gcc, g++ and cargo. Exit code 77: a wheel could not be had, nothing was changed.
set -euo pipefail

dir=${1:?usage: scripts/get-cuda.sh DIR}
here=$(cd "$(dirname "$0")" && pwd)
stamp="cuda-13.0.88 $(sha256sum "$here/lazystub.py" | cut -c1-12)"
if [ -f "$dir/.stamp" ] && [ "$(cat "$dir/.stamp")" = "$stamp" ]; then
  echo "already there: $dir"
  exit 0
fi
skip() { echo "skipped: $*"; exit 77; }
[ "$(uname -sm)" = "Linux x86_64" ] || skip "the wheels are for Linux on x86-64, this is $(uname -sm)"
for tool in python3 unzip gcc g++ cargo; do
  command -v "$tool" > /dev/null || skip "$tool is not installed"
done

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cat > "$scratch/wheels.txt" <<'WHEELS'
nvidia-cuda-nvcc==13.0.88 --hash=sha256:56fe502eb77625a12f25172caa3cdddb4e4c8ba2c8c17dba44b164761b380f03
nvidia-cuda-crt==13.0.88 --hash=sha256:2c8043c7c9e02492716426e9919fc78d2c5b3b2a7a768a88e952676b08aa55a4
nvidia-nvvm==13.0.88 --hash=sha256:c5f41ffeb6466944a026dfa5317d7d85355c119bbec279205d22f1869d1054e0
nvidia-cuda-runtime==13.0.96 --hash=sha256:7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548
nvidia-cuda-cccl==13.0.85 --hash=sha256:e0da7ad981f3a8aff08241b5bfc1af868742a63e2762f53a5171c492ef242649
WHEELS
python3 -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes --only-binary=:all: \
  --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2010_x86_64 \
  --platform manylinux_2_12_x86_64 -d "$scratch/wheels" -r "$scratch/wheels.txt" \
  || skip "the wheels of CUDA 13.0 could not be fetched"
for wheel in "$scratch"/wheels/*.whl; do
  unzip -q -o "$wheel" 'nvidia/cu13/*' -d "$scratch/tree"
done

mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
rm -rf "$dir"/{bin,include,lib,lib64,nvvm,.stamp}
mv "$scratch"/tree/nvidia/cu13/* "$dir/"
chmod +x "$dir"/bin/* "$dir"/nvvm/bin/*
ln -s lib "$dir/lib64"
# the static runtime, which opens libcuda.so.1 by itself
echo 'INPUT(libcudart_static.a)' > "$dir/lib/libcudart.so"

# the functions that the libraries must have are those that cudarc declares
sources() { ls -d "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/cudarc-0.19.*/src 2> /dev/null | sort -V | tail -1; }
if [ -z "$(sources)" ]; then
  (cd "$here/.." && cargo fetch --quiet)
fi
python3 "$here/lazystub.py" "$(sources)" "$dir/lib"
echo '__global__ void twice(float *x) { x[0] *= 2; }' > "$scratch/twice.cu"
"$dir/bin/nvcc" -arch=sm_90 -c "$scratch/twice.cu" -o "$scratch/twice.o"
echo "$stamp" > "$dir/.stamp"
"$dir/bin/nvcc" --version | sed -n 4p
