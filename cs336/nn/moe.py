"""Mixture of experts: a router sends each token to the top k of E small MLPs.     arXiv:1701.06538, arXiv:2101.03961

    s = softmax(W x) or sigmoid(W x)         over the experts
    T = the k experts with the largest s + b      b: the bias of balancing, which chooses and does not weigh
        of the experts in its best groups, if they are in groups: arXiv:2405.04434, arXiv:2412.19437
    y = sum_{e in T} g_e expert_e(x) + shared(x)      g = scale * s_T, divided by its sum if normalised
                                                      shared_gate: sigmoid(w x) shared(x)

Nothing is dropped: each expert takes as many tokens as are sent to it. Tokens are sorted by expert, and each projection
is one grouped matmul on a GPU, a loop over experts elsewhere; where there is no gradient and it is faster, one kernel
gathers the tokens, multiplies and gates. Fine-grained and shared experts are arXiv:2401.06066.

Balance, of N tokens (with f_e the share of the N k choices that fell on e, P_e the mean over tokens of s_e / sum s):

    loss    E sum_e f_e P_e, 1 where all is even, is added to what is trained         arXiv:2101.03961
    bias    after each step b_e goes up by u where f_e is below its share, else down   arXiv:2408.15664, no loss

and the router's z-loss is the mean of logsumexp(W x)^2 (arXiv:2202.08906).

N = tokens, E = experts, K = choices a token, R = N K rows, M = d_model, F = features of an expert.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cs336 import ops
from cs336.nn.checks import check_choice, check_counts, check_flags, check_positive
from cs336.nn.linear import Linear
from cs336.nn.mlp import ACTIVATIONS, Activation, MLPConfig, gate, kept
from cs336.ops.dispatch import transformed
from cs336.ops.expert_swiglu import pays as expert_swiglu_pays


class Routing(NamedTuple):
    """What the routers of a forward pass say to who trains them: of one layer, or the sum of several."""

    balance: Tensor
    """Scalar: the balance loss times its coefficient."""
    z: Tensor
    """Scalar: the z-loss times its coefficient."""
    load_E: tuple[Tensor, ...]
    """Of each layer (E,): how many choices fell on each expert."""

    def metrics(self) -> dict[str, Tensor]:
        """Scalars to log: the two losses, and the most that fell on one expert, as a multiple of an even share."""
        busiest = torch.stack([load_E.max() * len(load_E) / load_E.sum().clamp(min=1) for load_E in self.load_E]).max()
        return {"router_balance": self.balance.detach(), "router_z": self.z.detach(), "router_busiest": busiest}

    def plus(self, other: "Routing") -> "Routing":
        return Routing(self.balance + other.balance, self.z + other.z, self.load_E + other.load_E)


class Experts(nn.Module):
    """num_experts MLPs in stacks: up_proj, and gate_proj if gated, (E, F, M), down_proj (E, M, F).

    Biases are vectors, an expert's behind another's, (E F,) and (E M,): what is done to matrices is not done to them.
    """

    gate_bias: nn.Parameter | None
    up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        d_ff: int,
        activation: Activation,
        gated: bool,
        bias: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.activation, self.gated = activation, gated
        shape, place = (num_experts, d_ff, d_model), {"device": device, "dtype": dtype}
        self.gate_proj = nn.Parameter(torch.empty(shape, **place)) if gated else None
        self.up_proj = nn.Parameter(torch.empty(shape, **place))
        self.down_proj = nn.Parameter(torch.empty(num_experts, d_model, d_ff, **place))
        for name, features in {"gate_bias": d_ff * gated, "up_bias": d_ff, "down_bias": d_model}.items():
            size = num_experts * features
            setattr(self, name, nn.Parameter(torch.empty(size, **place)) if bias and size else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for p in self.parameters():
            if p.dim() == 1:
                nn.init.zeros_(p)
                continue
            std = (2 / (p.shape[-1] + p.shape[-2])) ** 0.5
            nn.init.trunc_normal_(p, std=std, a=-3 * std, b=3 * std)

    @property
    def waits(self) -> bool:
        """Whether the host waits for load_E: see grouped_matmul."""
        return not all(_has_grouped_mm(w_EOK.flatten(0, 1), w_EOK) for w_EOK in self.parameters() if w_EOK.dim() == 3)

    def forward(self, x_NM: Tensor, token_R: Tensor, load_E: Tensor) -> Tensor:
        """x (N, M); the token (R,) of each row, rows by expert, of which load_E (E,) are each's -> (R, M)."""
        if torch.is_autocast_enabled(x_NM.device.type):
            x_NM = x_NM.to(torch.get_autocast_dtype(x_NM.device.type))
        expert_R = None
        if self.down_bias is not None:
            expert_R = torch.repeat_interleave(load_E, output_size=len(token_R))
        hidden_RF = self._hidden(x_NM, token_R, load_E, expert_R)
        return _biased(grouped_matmul(hidden_RF, self.down_proj, load_E), self.down_bias, expert_R)

    def _hidden(self, x_NM: Tensor, token_R: Tensor, load_E: Tensor, expert_R: Tensor | None) -> Tensor:
        """(R, F): in one pass where it is SwiGLU without biases, has no gradient, and that is faster."""
        if self.gate_proj is not None and self.activation == "silu" and expert_R is None:
            args = x_NM, token_R, load_E, self.gate_proj, self.up_proj
            if expert_swiglu_pays(*args):
                return ops.expert_swiglu(*args)
        x_RM = x_NM[token_R]
        up_RF = _biased(grouped_matmul(x_RM, self.up_proj, load_E), self.up_bias, expert_R)
        if self.gate_proj is None:
            return ACTIVATIONS[self.activation](up_RF)
        gate_RF = _biased(grouped_matmul(x_RM, self.gate_proj, load_E), self.gate_bias, expert_R)
        return gate(self.activation, gate_RF, up_RF)


def _biased(x_RO: Tensor, bias: Tensor | None, expert_R: Tensor | None) -> Tensor:
    """x plus the part of a bias (E O,) that is of each row's expert."""
    if bias is None or expert_R is None:
        return x_RO
    return x_RO + bias.view(-1, x_RO.shape[-1]).to(x_RO.dtype).index_select(0, expert_R)


def grouped_matmul(x_NK: Tensor, w_EOK: Tensor, load_E: Tensor) -> Tensor:
    """Each group of load_E[e] rows of x (N, K) by its own w[e] (O, K), transposed: (N, O) in x's dtype.

    On a GPU of compute capability 9.0 in bfloat16 torch's grouped matmul, which does not wait for load_E; elsewhere one
    matmul an expert, for which the host waits.
    """
    w_EOK = w_EOK.to(x_NK.dtype)
    if transformed() and _is_batched(load_E):
        return _every_expert(x_NK, w_EOK, load_E)
    if _has_grouped_mm(x_NK, w_EOK):
        ends_E = load_E.cumsum(0, dtype=torch.int32)
        return torch._grouped_mm(x_NK, w_EOK.transpose(-2, -1), offs=ends_E)
    parts = x_NK.split(load_E.tolist())
    return torch.cat([F.linear(part, w) for part, w in zip(parts, w_EOK.unbind(), strict=True)])


def _is_batched(x: Tensor) -> bool:
    """Whether vmap holds a batch of x, under whatever other transforms."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x) and not functorch.is_batchedtensor(x):
        x = functorch.get_unwrapped(x)
    return functorch.is_batchedtensor(x)


def _every_expert(x_NK: Tensor, w_EOK: Tensor, load_E: Tensor) -> Tensor:
    """grouped_matmul where vmap hides load_E from the host: all rows by each w[e], of which a row keeps its own."""
    row_N1, first_E = torch.arange(len(x_NK), device=x_NK.device)[:, None], load_E.cumsum(0) - load_E
    y_NO = F.linear(x_NK, w_EOK[0])
    for w_OK, first in zip(w_EOK[1:], first_E[1:], strict=True):
        y_NO = torch.where(row_N1 < first, y_NO, F.linear(x_NK, w_OK))
    return y_NO


def _has_grouped_mm(x: Tensor, w: Tensor) -> bool:
    aligned = x.shape[-1] % 8 == 0 and w.shape[-2] % 8 == 0  # rows of 16 bytes
    right = x.is_cuda and x.dtype == torch.bfloat16 and hasattr(torch, "_grouped_mm")
    return right and aligned and torch.cuda.get_device_capability(x.device)[0] >= 9


class MoE(nn.Module):
    """x (..., d_model) -> (y like x, Routing), whose formulas are at the top of the file; see MoEConfig."""

    def __init__(
        self,
        config: "MoEConfig",
        d_model: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.config = config
        E = config.num_experts
        self.router = Linear(d_model, E, bias=config.bias, device=device, dtype=dtype)
        kind = config.activation, config.gated, config.bias
        self.experts = Experts(E, d_model, config.width(d_model), *kind, device, dtype)
        shared = config.shared(d_model)
        self.shared = None if shared is None else shared.build(d_model, device=device, dtype=dtype)
        self.shared_gate = Linear(d_model, 1, device=device, dtype=dtype) if config.shared_gate else None
        self.balance_bias: Tensor | None
        bias = torch.zeros(E, device=device) if config.balance == "bias" else None
        self.register_buffer("balance_bias", bias)
        self.load: Tensor | None = None
        """(E,): choices since the last `balance_experts`, of forward passes in training, if balanced by a bias."""

    def reset_balance(self) -> None:
        if self.balance_bias is not None:
            self.balance_bias.zero_()

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        x_NM, config = x.reshape(-1, x.shape[-1]), self.config
        weight_NK, expert_NK, routing = self.route(x_NM)
        order = expert_NK.flatten().argsort(stable=True)  # choices, by expert
        y_sorted = self.experts(x_NM, order // config.top_k, routing.load_E[0])
        y_NKM = y_sorted[order.argsort()].unflatten(0, expert_NK.shape)
        # A GPU's autocast would sum in float32, and give that, unless told.
        y_NM = (weight_NK[..., None].to(y_NKM.dtype) * y_NKM).sum(1, dtype=y_NKM.dtype)
        y = y_NM.view(x.shape)
        if self.shared is None:
            return y, routing
        always = self.shared(x)
        return y + (always if self.shared_gate is None else self.shared_gate(x).sigmoid() * always), routing

    @property
    def routers(self) -> tuple[Linear, ...]:
        """What reads x and decides: not worth fewer bits."""
        return (self.router,) if self.shared_gate is None else (self.router, self.shared_gate)

    def route(self, x_NM: Tensor) -> tuple[Tensor, Tensor, Routing]:
        """Of each token (N, K) the weights of its experts, float32 or wider, and which they are."""
        config, E = self.config, self.config.num_experts
        logits_NE = self.router(x_NM)
        logits_NE = logits_NE.to(torch.promote_types(logits_NE.dtype, torch.float32))
        score_NE = logits_NE.softmax(-1) if config.router == "softmax" else logits_NE.sigmoid()
        wanted_NE = score_NE if self.balance_bias is None else score_NE + self.balance_bias
        if config.num_groups > 1:
            wanted_NE = self._in_best_groups(wanted_NE)
        expert_NK = wanted_NE.topk(config.top_k).indices
        weight_NK = score_NE.gather(-1, expert_NK)
        if config.normalize:
            weight_NK = weight_NK / weight_NK.sum(-1, keepdim=True)
        load_E = torch.zeros(E, dtype=torch.int64, device=x_NM.device)
        load_E = load_E.scatter_add(0, expert_NK.flatten(), torch.ones_like(expert_NK.flatten()))
        balance = z = logits_NE.new_zeros(())
        if config.balance == "loss" and config.balance_loss and len(x_NM):
            share_NE = score_NE if config.router == "softmax" else score_NE / score_NE.sum(-1, keepdim=True)
            choices_E = load_E / (len(x_NM) * config.top_k)
            balance = config.balance_loss * E * (choices_E * share_NE.mean(0)).sum()
        if config.z_loss and len(x_NM):
            z = config.z_loss * logits_NE.logsumexp(-1).square().mean()
        return config.scale * weight_NK, expert_NK, Routing(balance, z, (load_E,))

    def _in_best_groups(self, wanted_NE: Tensor) -> Tensor:
        """-inf for experts outside of a token's best groups: by their best score, of sigmoid's by their two best."""
        config = self.config
        wanted_NGE = wanted_NE.unflatten(-1, (config.num_groups, -1))
        best_NG = wanted_NGE.topk(1 if config.router == "softmax" else 2).values.sum(-1)
        chosen_NG = torch.zeros_like(best_NG, dtype=torch.bool)
        chosen_NG = chosen_NG.scatter(-1, best_NG.topk(config.groups_per_token).indices, True)
        return wanted_NGE.masked_fill(~chosen_NG[..., None], -torch.inf).flatten(-2)


def experts_of(model: nn.Module) -> Iterator[MoE]:
    """The mixtures of experts in a model, wrapped or not."""
    return (module for module in model.modules() if isinstance(module, MoE))


def add_loads(model: nn.Module, routing: Routing) -> None:
    """Remember the loads of a forward pass for `balance_experts`."""
    for moe, load_E in zip(experts_of(model), routing.load_E, strict=True):
        if moe.balance_bias is not None:
            moe.load = load_E if moe.load is None else moe.load + load_E


@torch.no_grad()
def balance_experts(model: nn.Module) -> None:
    """After an optimizer step: the biases of layers that balance by them go towards even loads, those of all ranks."""
    for moe in experts_of(model):
        if moe.balance_bias is not None and moe.load is not None:
            load_E = moe.load.to(torch.float32)
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(load_E)
            moe.balance_bias += moe.config.bias_rate * torch.sign(load_E.mean() - load_E)
        moe.load = None


def forget_loads(model: nn.Module) -> None:
    """After a step that is left out, in place of `balance_experts`."""
    for moe in experts_of(model):
        moe.load = None


@dataclass(frozen=True)
class MoEConfig:
    """See MoE. Raises ValueError for values that do not fit together."""

    num_experts: int
    """Experts to choose from, besides the shared ones."""
    top_k: int
    """Experts a token."""
    d_ff: int | None = None
    """Hidden features of an expert. None: those of a dense MLP, so that top_k of them cost top_k MLPs."""
    num_shared: int = 0
    """Experts that every token goes to, as one MLP of num_shared * d_ff features."""
    activation: Activation = "silu"
    """As in the mlp kind."""
    gated: bool = True
    """As in the mlp kind."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    """How logits become scores: over all experts together, or each by itself."""
    normalize: bool = True
    """The weights of a token's experts sum to `scale`."""
    scale: float = 1.0
    """Of the experts' weights: DeepSeek-V3's routed_scaling_factor."""
    num_groups: int = 1
    """Experts are in so many groups, of one size, one after the other."""
    groups_per_token: int = 1
    """A token's experts are of so many groups, those with the best expert, or of a sigmoid router the two best."""
    balance: Literal["loss", "bias", "none"] = "loss"
    """What keeps loads even: a loss that is added to what is trained, a bias that moves after each step, or nothing."""
    balance_loss: float = 0.01
    """Of the loss of balance "loss"."""
    bias_rate: float = 0.001
    """How far a bias goes in a step, of balance "bias"."""
    z_loss: float = 0.0
    """Of the mean square of the router's log-sum-exp (arXiv:2202.08906)."""
    bias: bool = False
    """Biases of the router and of every projection of the experts, as in gpt-oss (arXiv:2508.10925)."""
    shared_gate: bool = False
    """A learned sigmoid of the token multiplies what the shared experts give, as in Qwen2-MoE (arXiv:2407.10671)."""
    kind: Literal["moe"] = "moe"

    def __post_init__(self):
        check_counts(num_experts=self.num_experts, top_k=self.top_k)
        check_counts(optional=True, d_ff=self.d_ff)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("router", self.router, ("softmax", "sigmoid"))
        check_choice("balance", self.balance, ("loss", "bias", "none"))
        check_flags(gated=self.gated, normalize=self.normalize, shared_gate=self.shared_gate, bias=self.bias)
        check_positive(scale=self.scale, bias_rate=self.bias_rate)
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} is more than the num_experts {self.num_experts} there are")
        self._check_groups()
        if not isinstance(self.num_shared, int) or self.num_shared < 0:
            raise ValueError(f"num_shared must be an integer, 0 or more, got {self.num_shared!r}")
        if self.shared_gate and not self.num_shared:
            raise ValueError("shared_gate gates the shared experts: it needs a num_shared of 1 or more, got 0")
        for name in ("balance_loss", "z_loss"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a finite number, 0 or more, got {getattr(self, name)!r}")

    def _check_groups(self) -> None:
        check_counts(num_groups=self.num_groups, groups_per_token=self.groups_per_token)
        size, rest = divmod(self.num_experts, self.num_groups)
        if rest or (self.num_groups > 1 and self.router == "sigmoid" and size < 2):
            least = ", of 2 or more" if self.router == "sigmoid" else ""
            raise ValueError(f"num_groups {self.num_groups} must divide num_experts {self.num_experts}{least}")
        if self.groups_per_token > self.num_groups or self.groups_per_token * size < self.top_k:
            raise ValueError(
                f"groups_per_token {self.groups_per_token} of num_groups {self.num_groups}: expected at most all, "
                f"with top_k {self.top_k} experts or more"
            )

    def width(self, d_model: int) -> int:
        """Hidden features of an expert."""
        return MLPConfig(self.activation, self.gated, self.d_ff).width(d_model)

    def shared(self, d_model: int) -> MLPConfig | None:
        width = self.num_shared * self.width(d_model)
        return MLPConfig(self.activation, self.gated, width, self.bias) if self.num_shared else None

    def build(self, d_model: int, *, device=None, dtype=None) -> MoE:
        return MoE(self, d_model, device=device, dtype=dtype)

    def num_parameters(self, d_model: int) -> int:
        shared = self.shared(d_model)
        apart = shared.num_parameters(d_model) - shared.flops(d_model) // 2 if shared else 0  # its biases
        of_one = 1 + (2 if self.gated else 1) * self.width(d_model) + d_model
        return self._matrices(d_model) + apart + (self.num_experts * of_one if self.bias else 0)

    def idle_parameters(self, d_model: int) -> int:
        """Weights of matrices that do not multiply a given token: of the experts it is not sent to."""
        return (self.num_experts - self.top_k) * self.expert_parameters(d_model)

    def flops(self, d_model: int) -> int:
        """Of the forward pass, a token: the matmuls of the router, its top_k experts and the shared ones."""
        return 2 * (self._matrices(d_model) - self.idle_parameters(d_model))

    def activation_bytes(self, d_model: int, width: int) -> int:
        """Kept for the backward, a token: x, scores, choices, weights, and of each choice its row of x, what its expert
        keeps, its result and its place in the order. What is kept once for all tokens is left out."""
        F, K, E = self.width(d_model), self.top_k, self.num_experts
        hidden = kept(self.activation, self.gated) * F
        routing = 4 * E + 8 * K + (4 * K + 4) * self.normalize + (4 * E + 4) * bool(self.z_loss)
        routing += 4 * (self.router == "sigmoid" and self.balance == "loss")
        choice = width * (2 * d_model + hidden) + 8 + 8 + width + 8 * self.bias
        shared = self.shared(d_model)
        apart = 0 if shared is None else shared.activation_bytes(d_model, width) - width * d_model
        apart += self.shared_gate * width * (d_model + 1)  # both factors of what it gives
        return width * d_model + routing + K * choice + apart

    def _matrices(self, d_model: int) -> int:
        """Weights of the router, the experts, and the shared ones with their gate."""
        shared = self.shared(d_model)
        routed = self.num_experts * (d_model + self.expert_parameters(d_model))
        return routed + (shared.flops(d_model) // 2 if shared else 0) + self.shared_gate * d_model

    def expert_parameters(self, d_model: int) -> int:
        """Of one expert's matrices."""
        return (3 if self.gated else 2) * d_model * self.width(d_model)
