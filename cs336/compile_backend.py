"""torch.compile(model, backend="cs336"): norms, attention, rotary positions, MLPs and losses become ours.

What Dynamo captured is searched for these patterns, whoever wrote them, and the rest goes to inductor:

    attention   F.scaled_dot_product_attention, where ops/sdpa.py takes its arguments: with is_causal, or a mask that is
                keys <= queries  of two torch.arange, which transformers makes when it is compiled
    layer_norm  F.layer_norm over the last dim, with a weight
    rms_norm    F.rms_norm with a weight, or  w * (x * rsqrt(mean(x^2) + eps))  spelt out, as transformers does
    rope        x * cos + rotate_half(x) * sin, where cos and sin repeat their halves
    swiglu      F.silu(gate) * up, and geglu F.gelu(gate) * up, of equal shapes; relu2 the square of F.relu(x)
    cross_entropy           F.cross_entropy of rows of logits
    linear_cross_entropy    the same of F.linear's result, where nothing else reads it
"""

import logging
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.multiprocessing.reductions import StorageWeakRef

from cs336 import ops
from cs336.ops import sdpa, torch_cross_entropy
from cs336.ops.checks import FLOATS

log = logging.getLogger(__name__)


def cs336(graph_module: GraphModule, example_inputs: list, *, mode: str | None = None, options: dict | None = None):
    """The backend: `replace`, then inductor, with torch.compile's own mode and options."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    log.info("cs336 replaced %s", dict(replace(graph_module)))
    patches = (list_mode_options(mode) if mode is not None else {}) | (options or {})
    return compile_fx(graph_module, example_inputs, config_patches=patches or None)


def replace(graph_module: GraphModule, only: Collection[str] | None = None) -> Counter:
    """Put our ops in place of the patterns, in place: of `only` these, all if None. Returns how many of each there
    were."""
    counts: Counter = Counter()
    written = _memory(x for node in graph_module.graph.nodes for x in _written(node))
    for node in list(graph_module.graph.nodes):
        for name, match in PATTERNS.items():
            found = match(node) if only is None or name in only else None
            if found is None or not written.isdisjoint(_memory(_read_between(node, found[1]))):
                continue
            function, args, kwargs = found
            with graph_module.graph.inserting_before(node):
                new = graph_module.graph.call_function(function, args, kwargs)
            new.meta = {k: v for k, v in node.meta.items() if k != "source_fn_stack"}
            node.replace_all_uses_with(new)
            graph_module.graph.erase_node(node)
            counts[name] += 1
            break
    # What only writes into a tensor has no users, and is no less alive.
    graph_module.graph.eliminate_dead_code(lambda node: node.is_impure() or bool(_written(node)))
    graph_module.recompile()
    return counts


# ---- patterns: what a node shall become, (function, args, kwargs), or None ----


def _attention(node: Node):
    if node.target is not F.scaled_dot_product_attention:
        return None
    names = "query key value attn_mask dropout_p is_causal scale enable_gqa"
    query, key, value, mask, dropout, causal, *options = _arguments(node, names, (None, 0.0, False, None, False))
    if not causal and mask is not None and _hides_later_keys(mask, _value(query).shape[-2], _value(key).shape[-2]):
        mask, causal = None, True
    args = (query, key, value, mask, dropout, causal, *options)
    return (sdpa.sdpa, args, {}) if sdpa.takes(*map(_value, args)) else None


def _layer_norm(node: Node):
    if node.target is not F.layer_norm:
        return None
    x, shape, weight, bias, eps = _arguments(node, "input normalized_shape weight bias eps", (None, None, 1e-5))
    return (ops.layer_norm, (x, weight, bias, eps), {}) if _fits(node, x, weight, bias, shape) else None


def _rms_norm(node: Node):
    if node.target not in (F.rms_norm, torch.rms_norm):
        return _spelt_rms_norm(node)
    x, shape, weight, eps = _arguments(node, "input normalized_shape weight eps", (None, None))
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    return (ops.rms_norm, (x, weight, eps), {}) if _fits(node, x, weight, None, shape) else None


def _spelt_rms_norm(node: Node):
    """weight * (wide * rsqrt(wide.pow(2).mean(-1, keepdim) + eps)).to(dtype)   where wide = x.to(float32)"""
    for weight, normed in _both_ways(node, operator.mul):
        for wide, scale in _both_ways(_uncast(normed), operator.mul):
            if not _calls(scale, torch.rsqrt):
                continue
            for mean, eps in _both_ways(scale.args[0], operator.add):
                if not (isinstance(eps, float) and _is_mean_of_square(mean, wide)):
                    continue
                x = _uncast(wide)
                if _fits(node, x, weight, None, _value(x).shape[-1:]):
                    return ops.rms_norm, (x, weight, eps), {}
    return None


def _rope(node: Node):
    for left, right in _both_ways(node, operator.add):
        for x, cos in _both_ways(left, operator.mul):
            for half_turned, sin in _both_ways(right, operator.mul):
                if _is_half_turned(half_turned, x) and _repeats_halves(cos) and _repeats_halves(sin):
                    tables = _value(cos), _value(sin)
                    same = tables[0].shape == tables[1].shape and tables[0].shape[-1] == _value(x).shape[-1]
                    if same and _value(x).dtype in FLOATS and _value(node).dtype == _value(x).dtype:
                        return _turn, (x, cos, sin), {}
    return None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """cos and sin (..., D) hold each angle twice."""
    pairs = x.shape[-1] // 2
    return ops.rope(x, cos[..., :pairs].float(), sin[..., :pairs].float())


def _gated(activation: Callable, op: Callable) -> Callable:
    """The pattern activation(gate) * up."""

    def match(node: Node):
        for activated, up in _both_ways(node, operator.mul):
            if not (_calls(activated, activation) and len(activated.users) == 1 and isinstance(up, Node)):
                continue
            gate: Any = activated.args[0]
            options = {k: v for k, v in activated.kwargs.items() if k != "inplace"}
            if len(activated.args) == 1 and not activated.kwargs.get("inplace") and _alike(node, gate, up):
                return op, (gate, up), options
        return None

    return match


def _alike(*nodes) -> bool:
    """Whether all have one shape, device and dtype, one that our kernels take."""
    first, *others = (_value(x) for x in nodes)
    if not (isinstance(first, Tensor) and first.dtype in FLOATS):
        return False
    kind = first.shape, first.dtype, first.device  # sizes may be symbols: to be compared, not hashed
    return all(isinstance(v, Tensor) and (v.shape, v.dtype, v.device) == kind for v in others)


def _relu2(node: Node):
    if _calls(node, torch.square) or (_calls(node, torch.pow, operator.pow) and node.args[1] == 2):
        rectified: Any = node.args[0]
        plain = _calls(rectified, F.relu, torch.relu) and len(rectified.users) == 1 and len(rectified.args) == 1
        if plain and not rectified.kwargs.get("inplace") and _alike(node, rectified.args[0]):
            return ops.relu2, (rectified.args[0],), {}
    return None


def _cross_entropy(node: Node):
    if node.target is not F.cross_entropy:
        return None
    values = [_value(a) for a in node.args], {k: _value(v) for k, v in node.kwargs.items()}
    taken = torch_cross_entropy.takes(*values[0], **values[1])
    return (torch_cross_entropy.of_logits, node.args, dict(node.kwargs)) if taken else None


def _linear_cross_entropy(node: Node):
    if _cross_entropy(node) is None:
        return None
    names = "input target weight size_average ignore_index reduce reduction label_smoothing"
    logits, target, _, _, ignore_index, _, reduction, smoothing = _arguments(
        node, names, (None, None, -100, None, "mean", 0.0)
    )
    linear: Any = logits
    while _calls(linear, torch.Tensor.view, torch.Tensor.reshape, torch.flatten, torch.Tensor.contiguous) or (
        _calls(linear, torch.Tensor.float, torch.Tensor.to) and _value(linear).dtype == torch.float32
    ):
        if len(linear.users) != 1:
            return None
        linear = linear.args[0]
    if not (_calls(linear, F.linear) and len(linear.users) == 1):
        return None
    x, weight, bias = _arguments(linear, "input weight bias", (None,))
    dtypes = {_value(t).dtype for t in (linear, x, weight, bias) if t is not None}
    autocast = torch.is_autocast_enabled(_value(x).device.type)  # which casts for both
    if len(dtypes) > 1 and not autocast:
        return None
    if _value(weight).dim() != 2 or _value(weight).shape[0] != _value(logits).shape[1]:
        return None
    args = (x, weight, bias, target, ignore_index, reduction, smoothing, _value(node).dtype)
    return torch_cross_entropy.of_linear, args, {}


PATTERNS: dict[str, Callable] = {
    "linear_cross_entropy": _linear_cross_entropy,
    "cross_entropy": _cross_entropy,
    "swiglu": _gated(F.silu, ops.swiglu),
    "geglu": _gated(F.gelu, ops.geglu),
    "relu2": _relu2,
    "attention": _attention,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "rope": _rope,
}


# ---- reading a graph ----


def _value(x):
    """The fake tensor that stands for a node, or a constant."""
    return x.meta.get("example_value") if isinstance(x, Node) else x


def _calls(node, *functions: Callable) -> bool:
    """Whether node calls one of the functions, or the method of that name."""
    if not isinstance(node, Node):
        return False
    if node.op == "call_method":
        return node.target in {f.__name__ for f in functions}
    return node.op == "call_function" and node.target in functions


def _arguments(node: Node, names: str, defaults: tuple) -> list:
    """The call's arguments by name: the trailing ones have defaults."""
    values = dict(zip(names.split(), node.args, strict=False)) | node.kwargs
    required = len(names.split()) - len(defaults)
    filled = dict(zip(names.split()[required:], defaults, strict=True)) | values
    return [filled[name] for name in names.split()]


_TORCHS: dict[Callable, Callable] = {operator.mul: torch.mul, operator.add: torch.add}


def _both_ways(node, function: Callable) -> Iterator[tuple]:
    """The two operands of a sum or product, in either order."""
    if _calls(node, function, _TORCHS[function]) and len(node.args) == 2 and not node.kwargs:
        yield node.args
        yield node.args[::-1]


def _uncast(node):
    """What node is a cast of, or node."""
    while _calls(node, torch.Tensor.to, torch.Tensor.float, torch.Tensor.type_as):
        node = node.args[0]
    return node


def _fits(node: Node, x, weight, bias, shape) -> bool:
    """Whether our norms take these, and give the dtype that node has, also under autocast."""
    x, weight, bias = _value(x), _value(weight), _value(bias)
    return (
        isinstance(x, Tensor)
        and isinstance(weight, Tensor)
        and x.dim() > 0
        and x.dtype in FLOATS
        and _value(node).dtype == x.dtype
        and weight.dtype in (x.dtype, torch.float32)
        and tuple(shape) == tuple(x.shape[-1:]) == tuple(weight.shape)
        and weight.device == x.device
        and (bias is None or (bias.shape == weight.shape and bias.dtype == weight.dtype))
    )


def _hides_later_keys(mask, num_queries: int, num_keys: int) -> bool:
    """keys <= queries, of positions that begin at the same number: (..., 1, T) and (..., S, 1)."""
    while _calls(mask, torch.Tensor.expand):
        mask = mask.args[0]
    if _calls(mask, operator.le, torch.le):
        keys, queries = mask.args
    elif _calls(mask, operator.ge, torch.ge):
        queries, keys = mask.args
    else:
        return False
    starts = _counted_from(keys, -1), _counted_from(queries, -2)
    whole = _value(mask).shape[-2:] == (num_queries, num_keys)
    return whole and starts[0] is not None and starts[0] == starts[1] and not _writes_whole_numbers(mask.graph)


_IN_PLACE = "iadd iand ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv ixor"
_WRITING = {operator.setitem, *(getattr(operator, name) for name in _IN_PLACE.split())}


def _written(node: Node) -> list:
    """What it writes into."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = node.target in _WRITING or (name.endswith("_") and not name.endswith("__"))
    return [
        *node.args[: int(in_place and node.op != "placeholder")],
        *([out] if (out := node.kwargs.get("out")) else []),
    ]


def _memory(nodes: Iterable) -> set[StorageWeakRef]:
    """What views of one tensor share."""
    values = (_value(x) for x in nodes)
    return {StorageWeakRef(x.untyped_storage()) for x in values if isinstance(x, Tensor)}


def _read_between(node: Node, args: tuple) -> set[Node]:
    """Of a pattern of several nodes, which ends with `node` and becomes a call with `args`: these, and the nodes
    between. The call would read them later than the pattern does."""
    between: set[Node] = set()
    arguments, todo = {x for x in args if isinstance(x, Node)}, [node]
    while todo:
        for x in todo.pop().all_input_nodes:
            if x not in arguments | between:
                between.add(x)
                todo.append(x)
    return between | arguments if between else set()


def _writes_whole_numbers(graph: Graph) -> bool:
    """Whether anything is written into a tensor of integers or truth values: places, or a mask, may be others then."""
    written = (_value(x) for node in graph.nodes for x in _written(node))
    return any(isinstance(x, Tensor) and not x.is_floating_point() for x in written)


def _counted_from(node, dim: int) -> int | None:
    """The first of numbers that rise by one along a dim, of a tensor without others; None if they do not."""
    places = _value(node)
    if not isinstance(places, Tensor) or places.is_floating_point() or places.shape[dim] != places.numel():
        return None
    start = 0
    while not _calls(node, torch.arange):
        if _calls(node, torch.unsqueeze) or (_calls(node, operator.getitem) and _only_adds_dims(node.args[1])):
            node = node.args[0]
        elif _calls(node, operator.add, torch.add) and isinstance(node.args[1], int) and not node.kwargs:
            start += node.args[1]
            node = node.args[0]
        else:
            return None
    first, step = node.args[:-1] or (0,), node.kwargs.keys() & {"start", "end", "step"}
    return start + first[0] if len(first) == 1 and isinstance(first[0], int) and not step else None


def _only_adds_dims(index) -> bool:
    """Whether an index leaves all elements where they are."""
    return isinstance(index, tuple) and all(part is None or part == slice(None) for part in index)


def _is_mean_of_square(mean, of) -> bool:
    """mean(of^2, -1, keepdim=True)"""
    if not _calls(mean, torch.mean):
        return False
    square, dim, keepdim = _arguments(mean, "input dim keepdim", (None, False))
    if not (keepdim is True and dim in (-1, [-1], (-1,))):
        return False
    if _calls(square, torch.square):
        return square.args[0] is of
    if _calls(square, torch.pow, operator.pow):
        return square.args[0] is of and square.args[1] == 2
    return any(a is of and b is of for a, b in _both_ways(square, operator.mul))


def _is_half_turned(node, x) -> bool:
    """cat((-x[..., D / 2:], x[..., :D / 2]), -1)"""
    if not (_calls(node, torch.cat) and isinstance(x, Node) and _value(x) is not None):
        return False
    parts, dim = _arguments(node, "tensors dim", (0,))
    half = _value(x).shape[-1] // 2
    if dim not in (-1, _value(x).dim() - 1) or len(parts) != 2 or 2 * half != _value(x).shape[-1]:
        return False
    negated, first = parts
    if not (_calls(negated, operator.neg, torch.neg) and _calls(first, operator.getitem)):
        return False
    second = negated.args[0]
    return (
        _calls(second, operator.getitem)
        and second.args[0] is x
        and first.args[0] is x
        and _last(second.args[1]) == slice(half, None, None)
        and _last(first.args[1]) == slice(None, half, None)
    )


def _last(index):
    """The slice of the last dim, where an index leaves all other dims alone."""
    whole = isinstance(index, tuple) and index[0] is Ellipsis and len(index) == 2
    return index[-1] if whole else None


def _repeats_halves(table) -> bool:
    """Whether a table (..., D) is cat((a, a), -1) in what is done to it element by element."""
    seen = 0
    while isinstance(table, Node) and seen < 16:
        seen += 1
        if _calls(table, torch.cat):
            parts, dim = _arguments(table, "tensors dim", (0,))
            return dim in (-1, _value(table).dim() - 1) and len(parts) == 2 and parts[0] is parts[1]
        if _calls(table, operator.mul, torch.mul):
            table, other = table.args
            if not isinstance(other, int | float):
                return False
        elif _calls(table, torch.cos, torch.sin, torch.Tensor.to, torch.Tensor.float, torch.unsqueeze):
            at = table.args[1] if _calls(table, torch.unsqueeze) else 0
            if _calls(table, torch.unsqueeze) and at in (-1, _value(table).dim() - 1):
                return False
            table = table.args[0]
        else:
            return False
    return False
