import os
import subprocess
import sys

import pytest
import torch

import cs336
from cs336 import ops
from cs336.ops import registry


def double(x):
    return 2 * x


def refuse_matrices(x):
    if x.dim() != 1:
        raise ValueError("x must be one row")


registry.define("only_ref(Tensor x) -> Tensor", fake=torch.empty_like, ref=double)
registry.define(
    "picky(Tensor x) -> Tensor",
    fake=torch.empty_like,
    ref=double,
    check=refuse_matrices,
    supports={"native": lambda x: None if x.numel() % 2 == 0 else f"needs an even number of elements, got {x.numel()}"},
)
registry.define("of_a_list(Tensor[] xs) -> Tensor", fake=lambda xs: torch.empty_like(xs[0]), ref=lambda xs: 2 * xs[0])


@pytest.fixture
def picky(monkeypatch):
    """An op with a native kernel that is off by one, so that a test sees which variant ran."""
    library = torch.library.Library("cs336", "FRAGMENT")
    library.impl("picky", lambda x: 2 * x + 1, "CPU")
    op = registry.OPS["picky"]
    supports = op.supports["native"]
    monkeypatch.setitem(op.devices, "native", op.devices["native"] | {"cpu"})
    monkeypatch.setitem(op.ranked, "cpu", [(op.overloads["native"], supports), *op.ranked["cpu"]])
    yield
    library._destroy()


@pytest.fixture(scope="module", autouse=True)
def _forget():
    yield
    for name in ("only_ref", "picky", "of_a_list"):
        del registry.OPS[name]


def run(code, **env):
    return subprocess.run([sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True)


def test_every_op_has_a_schema_under_every_namespace():
    for name, op in registry.OPS.items():
        for variant, namespace in registry.NAMESPACE.items():
            assert op.overloads[variant]._schema.name == f"{namespace}::{name}"
        assert {"cpu", "cuda", "meta"} <= op.devices["ref"]


def test_call_takes_the_best_variant_that_accepts(picky):
    assert registry.call("picky", torch.ones(2)).tolist() == [3, 3]
    assert registry.call("picky", torch.ones(3)).tolist() == [2, 2, 2]
    assert registry.call("only_ref", torch.ones(2)).tolist() == [2, 2]


def test_a_list_of_tensors_picks_the_device():
    assert registry.call("of_a_list", [torch.ones(2), torch.ones(3)]).tolist() == [2, 2]


def test_a_forced_variant_never_falls_back(picky):
    with registry.use("native"):
        assert registry.call("picky", torch.ones(2)).tolist() == [3, 3]
        with pytest.raises(NotImplementedError, match="needs an even number of elements, got 3"):
            registry.call("picky", torch.ones(3))
        with pytest.raises(NotImplementedError, match="only_ref has no native kernel for cpu tensors"):
            registry.call("only_ref", torch.ones(2))
    with registry.use("triton"), pytest.raises(NotImplementedError, match="picky has no triton kernel for cpu"):
        registry.call("picky", torch.ones(2))
    with registry.use("ref"):
        assert registry.call("picky", torch.ones(2)).tolist() == [2, 2]


def test_use_nests_and_survives_exceptions():
    with registry.use("ref"):
        with registry.use(None):
            assert registry.forced() is None
        with pytest.raises(KeyError), registry.use("native"):
            raise KeyError
        assert registry.forced() == "ref"
    with (
        pytest.raises(ValueError, match="unknown variant 'fast': expected one of native, triton, ref"),
        registry.use("fast"),
    ):
        pass


def test_the_environment_forces_a_variant():
    code = "from cs336.ops import registry; print(registry.forced())"
    assert run(code, CS336_VARIANT="ref").stdout == "ref\n"
    assert run(code, CS336_VARIANT="").stdout == "None\n"
    assert "unknown variant 'cuda'" in run(code, CS336_VARIANT="cuda").stderr


def test_check_runs_before_ref_and_fake():
    overload = registry.OPS["picky"].overloads["ref"]
    with pytest.raises(ValueError, match="must be one row"):
        overload(torch.ones(2, 2))
    with pytest.raises(ValueError, match="must be one row"):
        overload(torch.ones(2, 2, device="meta"))


def test_why_not_says_what_is_missing(monkeypatch):
    x = torch.ones(2)
    assert registry.why_not("only_ref", "ref", x) is None
    monkeypatch.setattr(registry._load, "CPU_MISSING", "_C.so is not built: run `pip install -e .`")
    reason = "only_ref has no native kernel for cpu tensors (_C.so is not built: run `pip install -e .`)"
    assert registry.why_not("only_ref", "native", x) == reason
    monkeypatch.setattr(registry, "TRITON_MISSING", "triton is not installed: pip install 'cs336[cuda]'")
    assert registry.why_not("only_ref", "triton", x).endswith("(triton is not installed: pip install 'cs336[cuda]')")
    monkeypatch.setattr(registry, "TRITON_MISSING", None)
    assert registry.why_not("only_ref", "triton", x).endswith("(set TRITON_INTERPRET=1 to interpret it)")


def test_no_variant_for_a_device_names_every_reason(monkeypatch):
    monkeypatch.setattr(registry, "_device", lambda args: "hpu")
    with pytest.raises(NotImplementedError) as error:
        registry.call("only_ref", torch.ones(2))
    for variant in registry.NAMESPACE:
        assert f"{variant}: only_ref has no {variant} kernel for hpu tensors" in str(error.value)


@pytest.mark.parametrize("variant", registry.NAMESPACE)
def test_a_force_holds_under_compile(device, variant):
    x, w = torch.randn(3, 8, device=device), torch.randn(8, device=device)
    if reason := registry.why_not("rms_norm_fwd", variant, x, w, 1e-5):
        pytest.skip(reason)
    graphs = []

    def backend(graph_module, _):
        graphs.append(str(graph_module.graph))
        return graph_module

    compiled = torch.compile(lambda x, w: ops.rms_norm(x, w), fullgraph=True, backend=backend)
    compiled(x, w)
    with registry.use(variant):
        compiled(x, w)
    assert f"torch.ops.{registry.NAMESPACE[variant]}.rms_norm_fwd" in graphs[-1]


def test_importing_cs336_imports_neither_torch_nor_triton():
    assert run("import cs336, sys; print(sys.modules.keys() & {'torch', 'triton', 'numpy'})").stdout == "set()\n"
    assert run("import cs336.ops, sys; print('triton' in sys.modules)").stdout == "False\n"


def test_deterministic_is_torchs_switch():
    before = torch.are_deterministic_algorithms_enabled()
    for on in (True, False):
        cs336.deterministic(on)
        assert torch.are_deterministic_algorithms_enabled() is on
    torch.use_deterministic_algorithms(before)
