"""One benchmark case for Nsight Compute: three calls on fresh inputs inside the NVTX range "profile".

python -m profiling.case rms_norm bwd --shape 8192x4096 --variant triton
"""

import argparse
import importlib

import torch

from benchmarks.harness import Case
from benchmarks.run import OPS


def find(op: str, pass_: str, shape: str | None) -> Case:
    """The sweep's case of that pass and shape, or its first one. Raises ValueError that lists what there is."""
    if op not in OPS:
        raise ValueError(f"no benchmark of {op}: expected one of {', '.join(OPS)}")
    cases = list(importlib.import_module(f"benchmarks.ops.bench_{op}").cases("full"))
    passes = dict.fromkeys(case.pass_ for case in cases)
    if pass_ not in passes:
        raise ValueError(f"{op} has no pass {pass_}: expected one of {', '.join(passes)}")
    shapes = {"x".join(map(str, case.shape)): case for case in cases if case.pass_ == pass_}
    if shape is not None and shape not in shapes:
        raise ValueError(f"the sweep has no shape {shape}: expected one of {', '.join(shapes)}")
    return shapes[shape or next(iter(shapes))]


def main() -> None:
    parser = argparse.ArgumentParser("python -m profiling.case", description=__doc__.splitlines()[0])
    parser.add_argument("op", help=", ".join(OPS))
    parser.add_argument("pass_", metavar="PASS", help="fwd, residual_fwd, bwd, ...")
    parser.add_argument("--shape", help="as the benchmark prints it, 8192x4096; the sweep's first if not given")
    parser.add_argument("--variant", default="native", help="native, triton, ref, eager, ... (%(default)s)")
    options = parser.parse_args()
    try:
        case = find(options.op, options.pass_, options.shape)
    except ValueError as error:
        parser.error(str(error))
    if options.variant not in case.contenders:
        parser.error(f"{case} has no contender {options.variant}: expected one of {', '.join(case.contenders)}")
    if not torch.cuda.is_available():
        raise SystemExit("Nsight Compute profiles kernels on a GPU, and torch sees none")
    device = torch.device("cuda")
    calls = [case.contenders[options.variant](*case.inputs(device)) for _ in range(4)]
    calls[0]()  # compiles and loads
    torch.cuda.synchronize()
    with torch.cuda.nvtx.range("profile"):
        for call in calls[1:]:
            call()
        torch.cuda.synchronize()
    print(f"{case}, {options.variant}: {case.bytes / 1e6:.1f} MB to move, {case.flops / 1e9:.1f} GFLOP to do")


if __name__ == "__main__":
    main()
