"""The model of cs336.models in plain PyTorch, as it is written well today: the opponent of bench_train.py.

One matmul for q, k and v and one for gate and up, a bf16 residual stream under autocast, SDPA, no biases.
B = batch, S = tokens, M = d_model, H = heads, D = head dim, F = d_ff.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cs336.models import Transformer, TransformerConfig


class Block(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        M, self.num_heads, self.eps = config.d_model, config.num_heads, config.norm_eps
        self.attention_norm = nn.Parameter(torch.ones(M))
        self.qkv = nn.Linear(M, 3 * M, bias=False)
        self.out = nn.Linear(M, M, bias=False)
        self.mlp_norm = nn.Parameter(torch.ones(M))
        self.gate_up = nn.Linear(M, 2 * config.ff_size, bias=False)
        self.down = nn.Linear(config.ff_size, M, bias=False)

    def forward(self, x_BSM: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        B, S, M = x_BSM.shape
        qkv = self.qkv(norm(x_BSM, self.attention_norm, self.eps)).view(B, S, 3, self.num_heads, -1)
        q_BHSD, k_BHSD, v_BHSD = qkv.permute(2, 0, 3, 1, 4)
        q_BHSD, k_BHSD = rotate(q_BHSD, cos_SD, sin_SD), rotate(k_BHSD, cos_SD, sin_SD)
        o_BHSD = F.scaled_dot_product_attention(q_BHSD, k_BHSD, v_BHSD, is_causal=True)
        x_BSM = x_BSM + self.out(o_BHSD.transpose(1, 2).reshape(B, S, M))
        gate_BSF, up_BSF = self.gate_up(norm(x_BSM, self.mlp_norm, self.eps)).chunk(2, -1)
        return x_BSM + self.down(F.silu(gate_BSF) * up_BSF)


class PlainTransformer(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, config: TransformerConfig):
        super().__init__()
        if config.num_kv_heads is not None or config.qk_norm or config.logit_softcap or config.rope_interleaved:
            raise ValueError(f"the plain model has no grouped queries, QK-norm, soft-cap or interleaved rope: {config}")
        self.eps = config.norm_eps
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.Parameter(torch.ones(config.d_model))
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        frequencies = config.rope_theta ** (-torch.arange(0, config.head_size, 2).double() / config.head_size)
        angles = torch.outer(torch.arange(config.context_length).double(), frequencies)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def compile_parts(self, compile: Callable) -> None:
        """A layer, once for all of them, and the head with the loss; the embedding is one kernel."""
        for layer in self.layers:
            layer.forward = compile(layer.forward)
        self.head_loss = compile(self.head_loss)  # type: ignore[method-assign]

    def loss(self, ids_BS: Tensor, targets_BS: Tensor) -> Tensor:
        x_BSM = self.embedding(ids_BS)
        if torch.is_autocast_enabled(x_BSM.device.type):
            x_BSM = x_BSM.to(torch.get_autocast_dtype(x_BSM.device.type))
        S = ids_BS.shape[1]
        for layer in self.layers:
            x_BSM = layer(x_BSM, self.cos[:S], self.sin[:S])
        return self.head_loss(x_BSM, targets_BS)

    def head_loss(self, x_BSM: Tensor, targets_BS: Tensor) -> Tensor:
        logits_BSV = self.head(norm(x_BSM, self.norm, self.eps))
        return F.cross_entropy(logits_BSV.float().flatten(0, 1), targets_BS.flatten())

    @torch.no_grad()
    def copy_weights(self, ours: Transformer) -> None:
        self.embedding.weight.copy_(ours.embedding.weight)
        self.norm.copy_(ours.norm.weight)
        if ours.head is not None:
            self.head.weight.copy_(ours.head.weight)
        for mine, theirs in zip(self.layers, ours.layers, strict=True):
            attention, mlp = theirs.attention, theirs.mlp
            mine.attention_norm.copy_(theirs.attention_norm.weight)
            mine.mlp_norm.copy_(theirs.mlp_norm.weight)
            mine.qkv.weight.copy_(torch.cat([p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)]))
            mine.out.weight.copy_(attention.o_proj.weight)
            mine.gate_up.weight.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
            mine.down.weight.copy_(mlp.down_proj.weight)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def rotate(x_BHSD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    a, b = x_BHSD.float().chunk(2, -1)
    return torch.cat([a * cos_SD - b * sin_SD, b * cos_SD + a * sin_SD], -1).to(x_BHSD.dtype)
