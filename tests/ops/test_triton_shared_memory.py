"""Triton kernels fit the shared memory of the GPU that their plan was asked for: compiled for it, without one."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[2]
GPUS = {90: 232448, 86: 101376}  # compute capability: bytes that a block may have
FLOATS = ("g_ptr", "dlast_ptr", "dfirst_ptr", "lse_ptr")
INTS = ("segments_ptr", "table_ptr", "lens_ptr", "cu_ptr")


def shared_memory(kernel, capability: int, dtype: str, cut: dict, **constants) -> int:
    """Of a launch with this cut, addresses and strides in multiples of 16 bytes."""
    import triton
    from triton.backends.compiler import GPUTarget

    options = {name: cut[name] for name in ("num_warps", "num_stages")}
    constants |= {name: value for name, value in cut.items() if name not in options}
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if name in FLOATS else "*i32" if name in INTS else f"*{dtype}"
        else:
            signature[name] = "fp32" if name in ("outer", "scale") else "i32"
        if name not in constants and name.endswith(("_ptr", "_stride", "_page", "_token", "K", "V")):
            aligned[i,] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared


def compile_all() -> None:
    from cs336.ops.triton import gated_delta_rule, gated_delta_rule_bwd, linear_attention, paged_latent

    gpu, dtypes = torch.device("cuda"), {"fp32": torch.float32, "bf16": torch.bfloat16}
    for capability, room in GPUS.items():
        for module in (gated_delta_rule, linear_attention, paged_latent):
            module.shared_memory = lambda device, room=room: room
        for dtype in dtypes if capability == 90 else ["bf16"]:
            cut = gated_delta_rule.plan(128, 128, dtypes[dtype], gpu)
            took = shared_memory(gated_delta_rule_bwd._walk_back_kernel, capability, dtype, cut["walk back"])
            print(f"walk back {dtype} on {capability}: {took} of {room}")
        for rows in (16, 128):
            cut = paged_latent.plan(rows, 512, 64, torch.bfloat16, gpu)
            rest = {"L": 512, "R": 64, "MOST": paged_latent.MOST, "SPLIT": True, "IN_PAGE": True, "cu_ptr": None}
            took = shared_memory(paged_latent._latent_kernel, capability, "bf16", cut, **rest)
            print(f"latent attention, {rows} rows, on {capability}: {took} of {room}")


def test_kernels_fit():
    pytest.importorskip("triton.backends.nvidia")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 7
    for line in lines:
        took, room = map(int, line.rpartition(": ")[2].split(" of "))
        assert 0 < took <= room, line


if __name__ == "__main__":
    compile_all()
