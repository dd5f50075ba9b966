import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

import cs336
from cs336 import _load, ops
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


seen = []  # what the functions of "with_defaults" and "writes_" were given


def with_defaults(x, shift, *, factor, note):
    seen.append((shift, factor, note))
    return factor * x + shift


registry.define(
    "with_defaults(Tensor x, float shift=1.5, *, int factor=2, Tensor? note=None) -> Tensor",
    fake=lambda x, shift, *, factor, note: torch.empty_like(x),
    ref=with_defaults,
    check=lambda x, shift, *, factor, note: seen.append((shift, factor, note)),
    supports={"ref": lambda x, shift, *, factor, note: "no zero factor" if factor == 0 else None},
)
registry.define(
    "writes_(Tensor x, Tensor(a!) y, *, Tensor(b!)[] zs, Tensor(c!)? more=None) -> ()",
    fake=lambda x, y, *, zs, more: None,
    ref=lambda x, y, *, zs, more: [t.copy_(x) for t in (y, *zs)] and None,
)
registry.define(
    "on_hopper(Tensor x) -> Tensor",
    fake=torch.empty_like,
    ref=double,
    capabilities={"native": ((9, 0), (9, 0))},
)
registry.define("anywhere(Tensor x) -> Tensor", fake=torch.empty_like, ref=double)
registry.define(
    "by_width(Tensor x) -> Tensor",
    fake=torch.empty_like,
    ref=double,
    prefer=lambda x: "triton" if x.shape[-1] >= 4 else "native",
)


@pytest.fixture
def picky():
    """An op with a native kernel that is off by one, so that a test sees which variant ran."""
    library = torch.library.Library("cs336", "FRAGMENT")
    library.impl("picky", lambda x: 2 * x + 1, "CPU")
    registry.OPS["picky"].order.clear()
    yield
    library._destroy()
    registry.OPS["picky"].order.clear()


@pytest.fixture(scope="module", autouse=True)
def _forget():
    ours = ("only_ref", "picky", "of_a_list", "with_defaults", "writes_", "on_hopper", "anywhere", "by_width")
    yield
    for name in ours:
        del registry.OPS[name]


@pytest.fixture
def gpu(monkeypatch):
    """gpu(capability): kernels, and a tensor without memory, on a GPU of that capability."""
    library = torch.library.Library("cs336", "FRAGMENT")
    triton = torch.library.Library("cs336_triton", "FRAGMENT")
    for name in ("on_hopper", "anywhere", "by_width"):
        library.impl(name, double, "CUDA")
        triton.impl(name, double, "CUDA")
    monkeypatch.setattr(_load, "missing", lambda kind: None)
    monkeypatch.setattr(_load, "architectures", lambda: ("80-real", "90"))

    def machine(capability, width=8):
        for name in ("on_hopper", "anywhere", "by_width"):
            registry.OPS[name].order.clear()
        monkeypatch.setattr(registry, "capability", lambda device: capability)
        with FakeTensorMode():
            return torch.empty(2, width, device="cuda")

    yield machine
    for name in ("on_hopper", "anywhere", "by_width"):
        registry.OPS[name].order.clear()
    library._destroy()
    triton._destroy()


def run(code, **env):
    return subprocess.run([sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True)


def test_every_op_has_a_schema_under_every_namespace():
    for name, op in registry.OPS.items():
        for variant, namespace in registry.NAMESPACE.items():
            assert op.overloads[variant]._schema.name == f"{namespace}::{name}"
        for kind in ("cpu", "cuda", "meta"):
            assert registry.missing(name, "ref", torch.device(kind)) is None


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
    not_built = "_C.so is not built: run `pip install --no-build-isolation -e .`"
    monkeypatch.setattr(_load, "missing", lambda kind: not_built)
    reason = f"only_ref has no native kernel for cpu tensors ({not_built})"
    assert registry.why_not("only_ref", "native", x) == reason
    monkeypatch.setattr(registry, "TRITON_MISSING", "triton is not installed: pip install 'cs336[cuda]'")
    assert registry.why_not("only_ref", "triton", x).endswith("(triton is not installed: pip install 'cs336[cuda]')")
    monkeypatch.setattr(registry, "TRITON_MISSING", None)
    assert registry.why_not("only_ref", "triton", x).endswith("(set TRITON_INTERPRET=1 to interpret it)")


def test_no_variant_for_a_device_names_every_reason(monkeypatch):
    monkeypatch.setattr(registry, "_device", lambda args: torch.device("hpu"))
    with pytest.raises(NotImplementedError) as error:
        registry.call("only_ref", torch.ones(2))
    for variant in registry.NAMESPACE:
        assert f"{variant}: only_ref has no {variant} kernel for hpu tensors" in str(error.value)


# ---- capabilities ----


@pytest.mark.parametrize(
    ("capability", "hopper", "anywhere"),
    [
        ((7, 5), ("ref",), ("ref",)),
        ((8, 0), ("triton", "ref"), ("native", "triton", "ref")),
        ((8, 9), ("triton", "ref"), ("native", "triton", "ref")),
        ((9, 0), ("native", "triton", "ref"), ("native", "triton", "ref")),
        ((10, 0), ("triton", "ref"), ("native", "triton", "ref")),
    ],
)
def test_a_kernel_is_picked_only_where_its_code_runs(gpu, capability, hopper, anywhere):
    x = gpu(capability)
    assert registry.kernels("on_hopper", x.device) == hopper
    assert registry.kernels("anywhere", x.device) == anywhere
    assert registry._choose("on_hopper", registry.OPS["on_hopper"], (x,), {}) == hopper[0]


def test_why_not_names_the_capability(gpu):
    x = gpu((8, 0))
    assert "on_hopper's native kernel needs compute capability 9.0, and cuda:0 has 8.0" in registry.why_not(
        "on_hopper", "native", x
    )
    x = gpu((7, 5))
    assert "anywhere's triton kernel needs compute capability 8.0 or newer" in registry.why_not("anywhere", "triton", x)
    reason = registry.why_not("anywhere", "native", x)
    assert "_C_cuda.so holds code for 80-real, 90, and cuda:0 has compute capability 7.5" in reason
    assert "CMAKE_CUDA_ARCHITECTURES=75" in reason
    with registry.use("native"), pytest.raises(NotImplementedError, match=r"needs compute capability 9\.0"):
        registry.call("on_hopper", gpu((10, 0)))


@pytest.mark.parametrize(
    ("architecture", "runs", "does_not"),
    [
        ("80-real", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (10, 0)]),
        ("86-real", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("90", [(9, 0), (10, 0), (12, 1)], [(8, 9)]),
        ("90-virtual", [(9, 0), (10, 0)], [(8, 9)]),
        ("90a-real", [(9, 0)], [(8, 9), (10, 0)]),
        ("100f-real", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("120", [(12, 0), (12, 1)], [(10, 3)]),
    ],
)
def test_what_an_architecture_runs_on(architecture, runs, does_not):
    assert all(_load.runs_on(architecture, capability) for capability in runs)
    assert not any(_load.runs_on(architecture, capability) for capability in does_not)


def test_the_faster_variant_goes_first_on_a_gpu(gpu, monkeypatch):
    x, op = gpu((9, 0)), registry.OPS["by_width"]
    assert registry._choose("by_width", op, (x,), {}) == "triton"
    assert registry._choose("by_width", op, (gpu((9, 0), width=3),), {}) == "native"
    assert registry._choose("by_width", op, (torch.ones(2, 8),), {}) == "ref"
    monkeypatch.setitem(op.order, x.device, ("native", "ref"))  # triton is not installed
    assert registry._choose("by_width", op, (x,), {}) == "native"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_library_has_code_for_this_gpu():
    assert _load.missing("cuda") is None
    assert _load.has_code_for(torch.cuda.get_device_capability())


# ---- arguments ----


def test_defaults_and_keywords_reach_every_function():
    x = torch.ones(2)
    for args, kwargs, want, result in [
        ((x,), {}, (1.5, 2, None), 3.5),
        ((x, 3.0), {}, (3.0, 2, None), 5.0),
        ((x,), {"shift": 0.5}, (0.5, 2, None), 2.5),
        ((x,), {"factor": 5}, (1.5, 5, None), 6.5),
    ]:
        seen.clear()
        assert registry.call("with_defaults", *args, **kwargs).tolist() == [result] * 2
        assert seen == [want, want]  # check and ref
        assert registry.OPS["with_defaults"].overloads["ref"](*(t.to("meta") for t in args[:1]), **kwargs).is_meta
    with registry.use("ref"), pytest.raises(NotImplementedError, match="no zero factor"):
        registry.call("with_defaults", x, factor=0)


def test_an_op_with_keywords_compiles():
    f = torch.compile(lambda x: registry.call("with_defaults", x, factor=3), fullgraph=True, backend="aot_eager")
    assert f(torch.ones(2)).tolist() == [4.5] * 2


@pytest.mark.parametrize("spoilt", range(3))
def test_what_the_schema_marks_is_noticed_by_autograd(spoilt):
    x, y, z, more = (torch.ones(2) for _ in range(4))
    w = torch.ones(2, requires_grad=True)
    losses = [(w * t).square().sum() for t in (y, z, more)]
    registry.call("writes_", x, y, zs=[z], more=more)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses[spoilt].backward()
    registry.call("writes_", x, y, zs=[z])


# ---- loading ----


def test_importing_asks_for_no_gpu():
    """A process that asked torch for its GPUs cannot use them after a fork."""
    code = """
import torch
def asked(*args): raise AssertionError("asked for a GPU")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda.get_device_capability = torch._C._cuda_init = asked
from cs336 import ops
y = ops.rms_norm(torch.ones(2, 8, requires_grad=True), torch.ones(8))
y.sum().backward()
print(torch.cuda.is_initialized())
"""
    done = run(code)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_fork_after_the_import_can_use_the_gpu():
    code = """
import os, torch
from cs336 import ops
if (child := os.fork()) == 0:
    x = torch.ones(2, 8, device="cuda")
    print(round(ops.rms_norm(x, x[0]).sum().item(), 3), flush=True)
    os._exit(0)
raise SystemExit(os.waitpid(child, 0)[1])
"""
    done = run(code)
    assert (done.returncode, done.stdout) == (0, "16.0\n"), done.stderr


def test_a_library_that_does_not_load_warns_once(monkeypatch, tmp_path):
    monkeypatch.setattr(_load, "HERE", tmp_path)
    (tmp_path / "_C.so").write_text("not a library")
    _load.missing.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"_C\.so does not load with torch .* Slower kernels") as caught:
            reasons = {_load.missing("cpu") for _ in range(3)}
        assert len(caught) == len(reasons) == 1
        assert "does not load with torch" in reasons.pop()
    finally:
        _load.missing.cache_clear()


def test_a_library_that_was_never_built_does_not_warn(monkeypatch, tmp_path, recwarn):
    monkeypatch.setattr(_load, "HERE", tmp_path)
    _load.missing.cache_clear()
    try:
        assert _load.missing("cpu") == "_C.so is not built: run `pip install --no-build-isolation -e .`"
        install = "run `pip install --no-build-isolation -e .`"
        assert (
            _load.missing("cuda") == f"_C_cuda.so is not built: {install} where nvcc is on PATH and CUDACXX is not none"
        )
        assert not recwarn.list
    finally:
        _load.missing.cache_clear()


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


def test_ops_see_that_determinism_is_asked_for():
    assert not registry.is_deterministic()
    with registry.determinism(True):
        assert registry.is_deterministic()
    assert not registry.is_deterministic()


def test_old_inductors_log_line_is_the_ops_name(monkeypatch):
    from torch._inductor import exc

    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    monkeypatch.setattr(exc.OperatorIssue, "operator_str", staticmethod(exc.OperatorIssue.operator_str))
    fake = registry._shortening_logs(lambda x: x)
    assert fake(1) == 1
    deep = [[[]]] * 3
    assert exc.OperatorIssue.operator_str("cs336.rms_norm_fwd", deep, {"x": deep}) == "cs336.rms_norm_fwd"
