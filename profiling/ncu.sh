#!/usr/bin/env bash
# Nsight Compute on one benchmark case: speed of light, roofline, memory, occupancy, stalls.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: profiling/ncu.sh OP PASS [--shape MxN] [--variant NAME] [-- NCU-ARGUMENTS]

  profiling/ncu.sh rms_norm bwd
  profiling/ncu.sh rms_norm fwd --shape 131072x256 --variant triton
  profiling/ncu.sh layer_norm bwd -- --set full --export bwd      # everything, for the GUI

OP, PASS, shapes and variants are the benchmark's: see `python -m benchmarks.run ops --help`. Kernels inside the NVTX
range "profile" are measured; RANGE=NAME picks another, such as the launcher rms_norm_bwd. Clocks are left alone, so
percentages are of the clock that the GPU ran at. Where counters are refused (ERR_NVGPUCTRPERM), ask the machine's
administrator to allow them for everyone.
TEXT
}

if [[ $# -lt 2 || $1 == -h || $1 == --help ]]; then
  usage
  [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
fi
if ! command -v ncu >/dev/null; then
  echo "profiling/ncu.sh: ncu is not on PATH. It comes with the CUDA toolkit (package nsight-compute): install it, or" \
    "add /usr/local/cuda/bin or /opt/nvidia/nsight-compute/VERSION to PATH." >&2
  exit 1
fi

case=()
while [[ $# -gt 0 && $1 != -- ]]; do
  case+=("$1")
  shift
done
[[ ${1:-} == -- ]] && shift
sections=(SpeedOfLight SpeedOfLight_RooflineChart MemoryWorkloadAnalysis Occupancy LaunchStats WarpStateStats)

cd "$(dirname "$0")/.."
exec ncu --clock-control none --print-details all --nvtx --nvtx-include "${RANGE:-profile}/" "${sections[@]/#/--section=}" "$@" \
  "${PYTHON:-python3}" -m profiling.case "${case[@]}"
