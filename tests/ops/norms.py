"""The tests that every norm passes, for every variant. test_rms_norm.py and test_layer_norm.py say which norm."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from close import assert_close_to_ref

from cs336.ops import registry

CUDA = torch.cuda.is_available()
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [(F32, F32), (F16, F16), (BF16, BF16), (F16, F32), (BF16, F32)]  # of the rows, of the weights
SHAPES = [(0, 8), (1, 1), (7, 1), (5, 127), (4, 256), (3, 257), (67, 64)]  # (M, N)
LONG_SHAPES = [(3, 2500), (2, 40000)]
if CUDA:
    LONG_SHAPES += itertools.product((3, 300), (1024, 4096, 8192, 8200, 12288))
    LONG_SHAPES += itertools.product((2, 70), (16384, 16385, 32768, 65535, 65536, 131071, 131072))
    LONG_SHAPES += [(70001, 64), (20011, 129), (5003, 768)]
MANY = 300 if CUDA else 8  # rows for more than one wave of blocks; few where Triton is interpreted
EPS = 1e-5
STRIDED = {"strided rows": 3, "more strided rows": 16}


def as_tuple(out):
    return out if isinstance(out, tuple) else (out,)


def relaid(t, layout):
    """The values of t in another layout, with NaN in between."""
    if layout in STRIDED:  # rows further apart, by an odd and by an even number of vectors
        return F.pad(t, (0, STRIDED[layout]), value=torch.nan)[..., : -STRIDED[layout]]
    if layout == "unaligned":
        return F.pad(t.reshape(-1), (1, 0), value=torch.nan)[1:].view(t.shape)
    if layout == "strided features":
        return F.pad(t[..., None], (0, 1), value=torch.nan)[..., 0]
    if layout == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    return t


class NormTests:
    """Subclasses set name, num_params, op (ours) and torch_norm(x, params): the same function as torch has it."""

    @pytest.fixture(params=registry.NAMESPACE)
    def variant(self, request, device):
        """Each variant in turn, forced: a test that asks for it cannot be served by another one."""
        for suffix in ("fwd", "residual_fwd", "bwd"):
            name = f"{self.name}_{suffix}"
            if reason := registry.why_not(name, request.param, *self.raw_args(name, 1, 1, device)):
                pytest.skip(reason)
        with registry.use(request.param):
            yield request.param

    def params(self, N, dtype, device):
        return [torch.randn(N, dtype=dtype, device=device) for _ in range(self.num_params)]

    def raw_args(self, name, M, N, device, dtype=F32, weight_dtype=None):
        rows = [torch.randn(M, N, dtype=dtype, device=device) for _ in range(3)]
        stats = [torch.rand(M, device=device) for _ in range(self.num_params)]
        w, *b = self.params(N, weight_dtype or dtype, device)
        if name.endswith("bwd"):
            return (*rows, w, *stats)
        return (*rows[: 2 if "residual" in name else 1], w, *b, EPS)

    def check(self, x, params, residual=None, grads=(True, True), scale=0.0):
        """Outputs and gradients against fp64. grads: whether y, and the sum, get a gradient. scale: see close.py."""
        leaves = [t.detach().requires_grad_() for t in (x, *params, *([] if residual is None else [residual]))]
        x_, params_, residual_ = leaves[0], leaves[1 : 1 + len(params)], leaves[-1] if residual is not None else None
        outs = as_tuple(self.op(x_, *params_, eps=EPS, residual=residual_))
        chosen = [i for i, _ in enumerate(outs) if grads[i]]
        gs = [relaid(torch.randn_like(outs[i]), layout) for i, layout in zip(chosen, STRIDED, strict=False)]
        got = torch.autograd.grad([outs[i] for i in chosen], leaves, gs, allow_unused=True)

        # The sum is rounded to x's dtype before it is normalised: so is the reference's.
        total = x if residual is None else (x.float() + residual.float()).to(x.dtype)
        if residual is not None:
            assert torch.equal(outs[1], total)
            assert torch.equal(got[0], got[-1])

        def reference(dtype):
            s, *p = (t.detach().to(dtype).requires_grad_() for t in (total, *params))
            outs = self.torch_norm(s, p), s
            return outs[0], *torch.autograd.grad(
                [outs[i] for i in chosen], (s, *p), [g.to(dtype) for g in gs], allow_unused=True
            )

        fp64 = reference(torch.float64)
        mixed = params[0].dtype != x.dtype  # torch has no mixed norm: its best is fp32, rounded once
        torchs = reference(F32 if mixed else x.dtype)
        for ours, want, torchs_own in zip((outs[0], *got), fp64, torchs, strict=False):
            if want is None:
                assert ours is None
            else:
                assert_close_to_ref(ours, want, torchs_own.to(ours.dtype), scale)

    # ---- results ----

    @pytest.mark.parametrize("with_residual", [False, True])
    @pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
    @pytest.mark.parametrize(("M", "N"), SHAPES)
    def test_shapes(self, variant, device, M, N, dtype, weight_dtype, with_residual):
        x, residual = torch.randn(2, M, N, device=device).to(dtype)
        scale = 100.0 if N == 1 else 0.0  # with one feature the gradient's terms, about 1 / x, cancel to nothing
        self.check(x, self.params(N, weight_dtype, device), residual if with_residual else None, scale=scale)

    @pytest.mark.parametrize(("dtype", "with_residual"), [(F32, False), (BF16, True)])
    @pytest.mark.parametrize(("M", "N"), LONG_SHAPES)
    def test_long_shapes(self, variant, device, M, N, dtype, with_residual):
        self.test_shapes(variant, device, M, N, dtype, dtype, with_residual)

    @pytest.mark.parametrize("layout", ["contiguous", "strided rows", "unaligned", "strided features", "transposed"])
    @pytest.mark.parametrize(("shape", "dtype"), [((64,), F32), ((3, 2, 96), BF16), ((3, 5, 33), F32)])
    def test_layouts(self, variant, device, shape, dtype, layout):
        x, residual = torch.randn(2, *shape, device=device).to(dtype)
        x, residual = relaid(x, layout), relaid(residual, "more strided rows")  # each has its own stride
        params = [relaid(p, layout) for p in self.params(shape[-1], dtype, device)]
        self.check(x, params)
        self.check(x, params, residual)

    def test_rows_repeated_by_stride(self, variant, device):
        self.check(torch.randn(1, 96, device=device).expand(5, 96), self.params(96, F32, device))

    def test_gradient_repeated_by_stride(self, variant, device):
        x, (w, *b) = torch.randn(3, 5, device=device, requires_grad=True), self.params(5, F32, device)
        (got,) = torch.autograd.grad(self.op(x, w, *b, eps=EPS).sum(), x)
        (want,) = torch.autograd.grad(self.torch_norm(x, (w, *b)).sum(), x)
        torch.testing.assert_close(got, want)

    @pytest.mark.parametrize("grads", [(True, False), (False, True)])
    def test_gradient_of_one_output(self, variant, device, grads):
        x, residual = torch.randn(2, 5, 48, device=device)
        self.check(x, self.params(48, F32, device), residual, grads)

    @pytest.mark.parametrize("wanted", range(3))
    def test_gradient_of_one_input(self, variant, device, wanted):
        x, residual, (w, *b) = *torch.randn(2, 5, 48, device=device), self.params(48, F32, device)
        everything = self.raw_gradients(x, residual, w, *b)
        leaf = (x, residual, w)[wanted].requires_grad_()
        sum(o.square().sum() for o in self.op(x, w, *b, residual=residual)).backward()
        assert torch.equal(leaf.grad, everything[wanted])

    def raw_gradients(self, x, residual, w, *b):
        leaves = [t.detach().clone().requires_grad_() for t in (x, residual, w)]
        out = self.op(leaves[0], leaves[2], *b, residual=leaves[1])
        return torch.autograd.grad(sum(o.square().sum() for o in out), leaves)

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, under Triton's interpreter
    @pytest.mark.parametrize("dtype", [F16, BF16])
    def test_sum_rounds_any_bits_to_nearest_even(self, variant, device, dtype):
        """Normal, subnormal, infinite and NaN: pairs of random bits."""
        bits = torch.randint(-(2**15), 2**15, (2, 64, 640), device=device).to(torch.int16).view(dtype)
        if dtype == BF16:  # Triton's interpreter widens its subnormals wrongly
            bits[bits.abs() < 1e-35] = 0
        (x, residual), (w, *b) = bits, self.params(640, F32, device)
        _, total = self.op(x, w, *b, residual=residual)
        torch.testing.assert_close(total, (x.float() + residual.float()).to(dtype), rtol=0, atol=0, equal_nan=True)

    # ---- promises ----

    def test_deterministic(self, variant, device):
        x, residual, (w, *b) = *torch.randn(2, 4 * MANY, 160, device=device), self.params(160, F32, device)
        first, second = self.raw_gradients(x, residual, w, *b), self.raw_gradients(x, residual, w, *b)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_threads_do_not_matter(self):
        x, residual, (w, *b) = *torch.randn(2, 200, 320), self.params(320, F32, "cpu")
        before, results = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                with registry.use("native"):
                    results.append(self.raw_gradients(x, residual, w, *b))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    @pytest.mark.parametrize("N", [64, 321, 2500, *((16384, 32768, 131072) if CUDA else ())])
    @pytest.mark.parametrize("dtype", [F32, BF16])
    @pytest.mark.parametrize("layout", ["contiguous", "strided rows", "more strided rows", "unaligned"])
    def test_batch_invariant(self, variant, device, dtype, N, layout):
        """A row's result does not depend on the rows beside it, nor on how many they are, nor on where it lies."""
        if variant == "ref":
            pytest.skip("plain torch does not promise it")
        x, residual = (relaid(t, layout) for t in torch.randn(2, MANY, N, device=device).to(dtype))
        w, *b = self.params(N, dtype, device)
        for res in (None, residual):
            y = as_tuple(self.op(x, w, *b, residual=res))[0]
            for rows in (slice(0, 1), slice(4, 6), slice(MANY - 1, MANY)):
                for copied in (lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t):
                    alone = self.op(copied(x[rows]), w, *b, residual=None if res is None else copied(res[rows]))
                    assert torch.equal(as_tuple(alone)[0], y[rows])

    def test_outputs_do_not_alias(self, variant, device):
        for suffix, dsum in (("fwd", True), ("residual_fwd", True), ("bwd", True), ("bwd", False)):
            args = self.raw_args(f"{self.name}_{suffix}", 1, 1, device)
            args = args if dsum else (args[0], None, *args[2:])
            outs = registry.call(f"{self.name}_{suffix}", *args)
            addresses = [t.data_ptr() for t in (*args, *outs) if isinstance(t, torch.Tensor)]
            assert len(set(addresses)) == len(addresses)

    @pytest.mark.parametrize("weight_dtype", [BF16, F32])
    @pytest.mark.parametrize("suffix", ["fwd", "residual_fwd", "bwd"])
    def test_opcheck(self, variant, device, suffix, weight_dtype):
        name = f"{self.name}_{suffix}"
        args = self.raw_args(name, 5, 24, device, BF16, weight_dtype)
        overload = registry.OPS[name].overloads[variant]
        torch.library.opcheck(overload, args)
        if suffix == "bwd":
            torch.library.opcheck(overload, (args[0], None, *args[2:]), test_utils=("test_schema", "test_faketensor"))

    @pytest.mark.parametrize("with_residual", [False, True])
    def test_compile(self, variant, device, with_residual):
        x, residual, (w, *b) = *torch.randn(2, 6, 40, device=device), self.params(40, F32, device)
        leaves = [t.requires_grad_() for t in (x, w, *b, *([residual] if with_residual else []))]

        def loss(f):
            out = f(x, w, *b, residual=residual if with_residual else None)
            return sum(o.square().sum() for o in as_tuple(out))

        compiled = torch.compile(self.op, fullgraph=True, backend="inductor" if CUDA else "aot_eager")
        got, want = (torch.autograd.grad(loss(f), leaves) for f in (compiled, self.op))
        assert all(torch.equal(g, e) for g, e in zip(got, want, strict=True))

    def derivatives(self, norm, x, residual, params):
        """First and second derivatives, through y and the sum, with respect to everything."""
        leaves = [t.detach().clone().requires_grad_() for t in (x, *params, residual)]
        outs = norm(leaves[0], leaves[-1], leaves[1:-1])
        first = torch.autograd.grad(sum((o * o.detach().cos()).sum() for o in outs), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, materialize_grads=True)
        return *first, *second

    def test_gradient_of_a_gradient(self, variant, device):
        x, residual, params = *torch.randn(2, 4, 24, device=device), self.params(24, F32, device)

        def ours(x, residual, params):
            return self.op(x, *params, eps=EPS, residual=residual)

        def torchs(x, residual, params):
            total = x + residual
            return self.torch_norm(total, params), total

        got, want = (self.derivatives(norm, x, residual, params) for norm in (ours, torchs))
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)

    def test_create_graph_that_nobody_uses(self, variant, device):
        x, params = torch.randn(4, 24, device=device, requires_grad=True), self.params(24, F32, device)
        for create_graph in (False, True):
            (got,) = torch.autograd.grad(self.op(x, *params, eps=EPS).square().sum(), x, create_graph=create_graph)
            (want,) = torch.autograd.grad(self.torch_norm(x, params).square().sum(), x)
            torch.testing.assert_close(got, want)

    def test_float64_passes_gradcheck(self, device):
        x, residual = torch.randn(2, 3, 5, device=device, dtype=torch.float64)
        leaves = [t.requires_grad_() for t in (x, residual, *self.params(5, torch.float64, device))]
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(lambda x, residual, *params: self.op(x, *params, residual=residual), leaves)

    def test_float64_is_for_the_reference(self, variant, device):
        x, params = torch.randn(3, 5, device=device, dtype=torch.float64), self.params(5, torch.float64, device)
        if variant == "ref":
            torch.testing.assert_close(self.op(x, *params, eps=EPS), self.torch_norm(x, params))
        else:
            with pytest.raises(NotImplementedError, match="float64 is computed by the reference alone"):
                self.op(x, *params)

    @pytest.mark.parametrize("with_residual", [False, True])
    def test_transforms_of_torch_func(self, variant, device, with_residual):
        x, residual = torch.randn(2, 5, 3, 16, device=device)
        params = self.params(16, F32, device)

        def ours(x):
            return as_tuple(self.op(x, *params, eps=EPS, residual=residual[0] if with_residual else None))[0]

        def torchs(x):
            return self.torch_norm(x + residual[0] if with_residual else x, params)

        def transforms(norm):
            yield torch.func.vmap(norm)(x)
            yield torch.func.grad(lambda x: norm(x).square().sum())(x[0])
            yield torch.func.vmap(torch.func.grad(lambda x: norm(x).square().sum()))(x)
            yield torch.func.jvp(norm, (x[0],), (x[1],))[1]
            yield torch.func.hessian(lambda x: norm(x).square().sum())(x[0])

        for got, want in zip(transforms(ours), transforms(torchs), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)

    def test_meta(self, variant):
        x, residual, params = *torch.empty(2, 3, 4, 8, device="meta"), self.params(8, F32, "meta")
        assert [o.shape for o in self.op(x, *params, residual=residual)] == [x.shape, x.shape]

    @pytest.mark.parametrize("dtype", [F32, BF16])
    def test_autocast_changes_nothing(self, variant, device, dtype):
        x, (w, *b) = torch.randn(3, 8, device=device).to(dtype), self.params(8, F32, device)
        want = self.op(x, w, *b)
        with torch.autocast(device, dtype=BF16):
            got = self.op(x, w, *b)
        assert got.dtype == dtype
        assert torch.equal(got, want)

    # ---- refusals ----

    def test_bad_input(self, device):
        x, (w, *b) = torch.randn(3, 8, device=device), self.params(8, F32, device)
        for message, args, residual in [
            ("x must be .* got shape \\(\\)", (x[0, 0], w, *b), None),
            ("x must be .* got shape \\(3, 0\\)", (x[:, :0], w[:0], *(p[:0] for p in b)), None),
            ("x must be float32, float16, bfloat16 or float64, got torch.int32", (x.int(), w, *b), None),
            ("weight must be float32 or x's torch.float32, got torch.bfloat16", (x, w.bfloat16(), *b), None),
            ("weight must be \\(8,\\) on .* got \\(7,\\)", (x, w[:7], *b), None),
            ("weight must be \\(8,\\) on .* got \\(1, 8\\)", (x, w[None], *b), None),
            ("weight must be .* on meta", (x, w.to("meta"), *b), None),
            ("residual must be like x, \\(3, 8\\) .* got \\(2, 8\\)", (x, w, *b), x[:2]),
            ("residual must be like x, .*torch.float32.* got .*torch.float16", (x, w, *b), x.half()),
            ("residual must be like x, .* on meta", (x, w, *b), x.to("meta")),
        ]:
            with pytest.raises(ValueError, match=message):
                self.op(*args, residual=residual)

    @pytest.mark.parametrize("suffix", ["fwd", "residual_fwd", "bwd"])
    def test_raw_ops_refuse_bad_tensors(self, variant, device, suffix):
        """Each tensor argument spoilt in each way: an error, never a crash nor a result."""
        name = f"{self.name}_{suffix}"
        spoilt = {
            "int32": lambda t: t.int(),
            "float64": lambda t: t.double(),
            "one dim more": lambda t: t[None],
            "one dim less": lambda t: t[0],
            "last dim shorter": lambda t: t[..., :-1],
            "first dim longer": lambda t: torch.cat([t, t]),
            "last dim strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
            "another device": lambda t: t.to("cpu" if device == "cuda" else "meta"),
        }
        args, overload = self.raw_args(name, 4, 6, device), registry.OPS[name].overloads[variant]
        overload(*args)
        for i, how in itertools.product(range(len(args)), spoilt):
            # nothing else says how many rows x has, and the reference takes float64 beside float32 weights
            alone = suffix == "fwd" and i == 0 and (how == "first dim longer" or (how, variant) == ("float64", "ref"))
            if isinstance(args[i], torch.Tensor) and not alone:
                bad = (*args[:i], spoilt[how](args[i]), *args[i + 1 :])
                with pytest.raises((ValueError, RuntimeError)):
                    pytest.fail(f"argument {i} with {how} was taken: {overload(*bad)}")

    def test_raw_ops_refuse_no_features(self, variant, device):
        for suffix in ("fwd", "residual_fwd", "bwd"):
            name = f"{self.name}_{suffix}"
            with pytest.raises((ValueError, RuntimeError)):
                registry.OPS[name].overloads[variant](*self.raw_args(name, 3, 0, device))

    # ---- CUDA ----

    @pytest.mark.skipif(not CUDA, reason="CUDA graphs need a GPU")
    @pytest.mark.parametrize(("M", "N"), [(300, 1024), (2, 131072)])
    def test_cuda_graph(self, variant, device, M, N):
        x, (w, *b) = torch.randn(M, N, device=device, requires_grad=True), self.params(N, F32, device)
        w.requires_grad_()

        def step():
            y = self.op(x, w, *b)
            return y, *torch.autograd.grad(y, (x, w), x.detach())

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            step()  # first calls compile and allocate
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            x.normal_()
        graph.replay()
        assert all(torch.equal(c, e) for c, e in zip(captured, step(), strict=True))

    @pytest.mark.skipif(not CUDA, reason="streams need a GPU")
    def test_runs_on_the_current_stream(self, variant, device):
        x, (w, *b) = torch.zeros(4096, 4096, device=device), self.params(4096, F32, device)
        self.op(x, w, *b)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(50_000_000)  # a kernel on any other stream would still see zeros
            x.normal_()
            got = self.op(x, w, *b)
        torch.cuda.synchronize()
        assert torch.equal(got, self.op(x, w, *b))
