"""The same quantisers as others have written them, on the same weights and text: torchao, llm-compressor.

Each puts weights in place of a model's that are what its quantised layers multiply with, or returns a model that has
them. llm-compressor has a model of transformers for it, made of a directory that we write; it wants torch, transformers
and compressed-tensors of certain versions, for which an environment of its own is best.
"""

import contextlib
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file

from cs336.models import Transformer
from cs336.models.huggingface import from_pretrained, save_pretrained
from cs336.nn.quantized import quantizable

Batches = list[torch.Tensor]
Method = Callable[[Transformer, Batches], Any]


def methods(group: int) -> Iterator[tuple[str, Method]]:
    """Those of what is installed: it says what is not."""
    with _installed("torchao"):
        import torchao as _  # noqa: F401 (whether there is one)

        yield "torchao int8", torchao(8, group)
        yield "torchao int4", torchao(4, group)
        yield "torchao 3 bits", torchao(3, group)
    with _installed("llmcompressor"):
        from llmcompressor.modifiers.gptq import GPTQModifier
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQModifier

        def four_bits(symmetric: bool = True, bits: int = 4) -> dict[str, Any]:
            weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group"}
            groups = {"group_0": {"targets": ["Linear"], "weights": weights | {"group_size": group}}}
            return {"config_groups": groups, "ignore": ["lm_head"]}

        yield "llm-compressor int4", llm_compressor(lambda: [QuantizationModifier(**four_bits())])
        for name, order in (("", None), (" act-order", "static")):
            options = {"dampening_frac": 0.01, "actorder": order}
            make = lambda o=options: [GPTQModifier(**four_bits(), **o)]  # noqa: E731
            yield f"llm-compressor gptq int4{name}", llm_compressor(make)
        make = lambda: [GPTQModifier(**four_bits(bits=3), dampening_frac=0.01, actorder="static")]  # noqa: E731
        yield "llm-compressor gptq 3 bits act-order", llm_compressor(make)
        make = lambda: [AWQModifier(), QuantizationModifier(**four_bits(symmetric=False))]  # noqa: E731
        yield "llm-compressor awq int4 asymmetric", llm_compressor(make)


@contextlib.contextmanager
def _installed(package: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        print(f"{package} does not run here: {error}", flush=True)


def torchao(bits: int, group: int) -> Method:
    def run(model: Transformer, batches: Batches) -> None:
        from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

        dtype = {4: torch.int4, 8: torch.int8, 3: torch.int3}[bits]
        names = quantizable(model.layers)
        config = IntxWeightOnlyConfig(weight_dtype=dtype, granularity=PerGroup(group))
        quantize_(model.layers, config, filter_fn=lambda module, name: name in names)

    return run


def llm_compressor(recipe: Callable[[], list]) -> Method:
    def run(model: Transformer, batches: Batches) -> Transformer:
        from compressed_tensors.quantization.lifecycle.forward import fake_quantize
        from llmcompressor import oneshot
        from transformers import AutoModelForCausalLM

        with tempfile.TemporaryDirectory() as folder:
            save_pretrained(model, folder)
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            names = set(theirs.state_dict())
            windows = [
                {"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in torch.cat(batches)
            ]
            loader = torch.utils.data.DataLoader(windows, batch_size=None)
            with mock.patch.object(torch.Tensor, "pin_memory", lambda t: t):  # AWQ pins, without a GPU too
                oneshot(
                    model=theirs,
                    processor=object(),  # of texts; these are tokens
                    dataset=loader,
                    recipe=recipe(),
                    num_calibration_samples=len(windows),
                    max_seq_length=batches[0].shape[1],
                    pipeline="sequential",
                )
            for layer in theirs.modules():
                if scheme := getattr(layer, "quantization_scheme", None):
                    zeros = getattr(layer, "weight_zero_point", None)
                    layer.weight.data = fake_quantize(layer.weight.data, layer.weight_scale, zeros, scheme.weights)
            path = pathlib.Path(folder) / "model.safetensors"
            kept = {name: t.contiguous() for name, t in theirs.state_dict().items() if name in names}
            kept.pop("lm_head.weight", None) if model.config.tie_embeddings else None
            save_file(kept, path, metadata={"format": "pt"})
            return from_pretrained(folder)  # of its layout, which a model of another file's need not have

    return run
