#!/usr/bin/env bash
# Nsight Systems on a few training steps: a timeline to open, and tables of phases and kernels.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: profiling/nsys.sh OUT [MODEL] [--batch N] [--steps N]

  profiling/nsys.sh step                   # writes step.nsys-rep: open it in Nsight Systems
  profiling/nsys.sh step 350M --batch 16

The timeline has the NVTX ranges step, forward, backward and optimizer, and one for each of our launchers. The tables:
time of the ranges on the GPU, and time of the kernels. Phases need the Python package nvtx.
TEXT
}

if [[ $# -lt 1 || $1 == -h || $1 == --help ]]; then
  usage
  [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
fi
if ! command -v nsys >/dev/null; then
  echo "profiling/nsys.sh: nsys is not on PATH. It comes with the CUDA toolkit (package nsight-systems): install it, or" \
    "add its folder to PATH." >&2
  exit 1
fi

out=$(realpath -m "$1")
shift
cd "$(dirname "$0")/.."
nsys profile --trace=cuda,nvtx,cublas,cudnn --capture-range=cudaProfilerApi --capture-range-end=stop \
  --force-overwrite=true --output="$out" "${PYTHON:-python3}" -m profiling.step "$@"
nsys stats --report nvtx_gpu_proj_sum --report cuda_gpu_kern_sum --format column "$out.nsys-rep"
