"""On Hopper the products of narrow tiles read shared memory, whatever ptxas compiled them: checked without a GPU."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from wgmma_descriptors import strays

ROOT = pathlib.Path(__file__).parents[2]
CODE = """
	.section	.text._kernel,"ax",@progbits
.text._kernel:
        /*0000*/                   ULDC.64 UR6, c[0x0][0x218] ;
        /*0010*/                   UMOV UR8, 0x400 ;
        /*0020*/                   S2UR UR4, SR_CgaCtaId ;
        /*0030*/                   ULEA UR8, UR4, UR8, 0x18 ;
        /*0040*/                   USHF.R.U32.HI UR4, URZ, 0x4, UR8 ;
        /*0050*/                   UIADD3 UR18, UP0, {base}, 0x20, URZ ;
.L_x_1:
        /*0060*/                   HGMMA.64x16x16.F32 R24, R32, gdesc[UR16].tnspB, R24, gsb0 ;
        /*0070*/              @!P1 BRA `(.L_x_1) ;
        /*0080*/                   EXIT ;
"""


@pytest.mark.parametrize(("base", "wrong"), [("UR4", 0), ("UR6", 1), ("UR30", 1)])
def test_what_is_not_of_shared_memory_is_found(base, wrong):
    assert len(strays(CODE.format(base=base))) == wrong


class Hopper:
    """A driver that has no GPU but what to compile for."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def launches() -> None:
    """Of shapes and strides that ptxas 12.8 compiled wrong where each tile was as wide as its features."""
    from cs336.ops.triton import attention, gated_delta_rule, gram, linear_attention, linear_quantized, paged_attention

    def rows(*shape):  # by token, 4 elements apart
        return torch.empty(*shape[:-1], shape[-1] + 4, dtype=torch.float16)[..., : shape[-1]].transpose(1, 2)

    attention.fwd(rows(2, 70, 2, 32), rows(2, 130, 2, 32), rows(2, 130, 2, 16), 1.0, True, -1, -1, 0.0)
    k_cache, v_cache = (torch.empty(4, 32, 2, n, dtype=torch.float16) for n in (60, 20))
    tables, lens = torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    q = torch.empty(2, 20, 4, 60, dtype=torch.float16)
    paged_attention.paged_attention(q, k_cache, v_cache, tables, lens, 1.0, -1, 0.0, None)
    square = torch.empty(2, 130, 130, dtype=torch.float16)
    gram.gram(square, square, 1.0, 1.0)
    for K, V in ((70, 20), (256, 64)):
        q, k, v, g = rows(2, 130, 2, K), rows(2, 130, 2, K), rows(2, 130, 2, V), torch.empty(2, 2, 130)
        state = torch.empty(2, 2, 3, K, V, dtype=torch.float16)
        if K == 70:
            cut = linear_attention.tiles(K, V, 64, v.dtype) | {"ROWS": 64}
            linear_attention.outputs(q, k, v, g, None, state, 1.0, cut)
        else:
            gated_delta_rule.corrected(k, v, g, g, None, None)
    x, q, scales = (torch.empty(40, 256).half(), torch.empty(64, 128, dtype=torch.uint8), torch.empty(64, 2).half())
    linear_quantized.linear_int4(x, q, scales, None, 128, None, True)


def compile_all() -> None:
    import triton

    from cs336.ops.triton import attention_tile, gated_delta_rule, linear_attention, paged_attention

    for module in (attention_tile, gated_delta_rule, linear_attention, paged_attention):
        module.shared_memory = lambda device: 232448
    triton.runtime.driver.set_active(Hopper())
    function, compiled = triton.runtime.jit.JITFunction, []
    run = function.run

    def compile_only(self, *args, warmup, **options):
        compiled.append((self.__name__, run(self, *args, warmup=True, **options).asm["cubin"]))

    function.run = compile_only
    launches()
    for name, cubin in compiled:
        path = pathlib.Path(sys.argv[1]) / f"{name}.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", path]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        print(json.dumps([name, sass.count("GMMA."), strays(sass)]))


def test_descriptors_are_of_shared_memory(tmp_path):
    triton = pytest.importorskip("triton")
    try:
        tools = [getattr(triton.knobs.nvidia, name).path for name in ("ptxas", "nvdisasm")]
    except (AttributeError, RuntimeError) as error:
        pytest.skip(f"Triton has no ptxas or no nvdisasm: {error}")
    assert all(map(os.path.exists, tools))
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    done = subprocess.run([sys.executable, __file__, tmp_path], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kernels = list(map(json.loads, done.stdout.splitlines()))
    assert len(kernels) == 7
    for name, products, wrong in kernels:
        assert products > 0, name
        assert wrong == [], f"{name}: {wrong}"


if __name__ == "__main__":
    compile_all()
