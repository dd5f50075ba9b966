"""Methods that read text, as a job of stages: tokens, blocks, and what the model lost on text that it did not read."""

import functools
import json
import pathlib
import shutil
from dataclasses import dataclass
from typing import Any

from cs336.inference.load import load_model, load_tokenizer
from cs336.inference.quantization.awq import awq_block
from cs336.inference.quantization.gptq import gptq_block
from cs336.inference.quantization.layerwise import Scheme, quantize_blocks_
from cs336.inference.quantization.windows import Windows, tokenize
from cs336.models import save_pretrained
from cs336.models.huggingface import has_weights
from cs336.nn import QuantMethod
from cs336.utils.device import pick
from cs336.utils.files import replacing
from cs336.utils.stages import Outcome, Stage, run_stages

BLOCK_METHODS = {"gptq": gptq_block, "awq": awq_block}
METHOD_OF_BITS: dict[int, QuantMethod] = {4: "int4", 8: "int8"}
SHARDS, BLOCKS, RESULT = "calibration", "blocks", "compression.json"


@dataclass(frozen=True)
class Calibrated:
    """See compress. Raises ValueError for values that do not fit."""

    found: pathlib.Path
    out: pathlib.Path
    method: str
    group: int | None
    text: pathlib.Path
    bits: int = 4
    samples: int = 128
    act_order: bool = False
    asymmetric: bool = False
    device: str = "auto"
    format: str = "cs336"

    def __post_init__(self):
        if self.bits not in METHOD_OF_BITS:
            raise ValueError(f"bits must be 4 or 8, got {self.bits!r}")
        if self.samples < 1:
            raise ValueError(f"samples must be 1 or more, got {self.samples}")
        if self.act_order and self.method != "gptq":
            raise ValueError(f"act_order is of gptq, got it with {self.method}")
        if not self.text.exists():
            raise FileNotFoundError(f"{self.text} does not exist: expected a text to calibrate with")

    def run(self) -> dict[str, Any]:
        """Bytes of the weights, and bits per byte of the text that is held out, before and after."""
        inputs = self.found, self.text
        settings = {"method": self.method, "bits": self.bits, "group": self.group, "samples": self.samples}
        settings |= {"act_order": self.act_order, "asymmetric": self.asymmetric, "format": self.format}
        tokens = Stage(
            "tokens", "calibration text", self._tokenize, (f"{SHARDS}/meta.json",), inputs, {}, kept=(SHARDS,)
        )
        made = self._quantise, ("config.json",), inputs, settings
        whole = functools.partial(has_weights, self.out)
        blocks = Stage("quantise", "one block after the other", *made, kept=(BLOCKS,), is_whole=whole)
        measure = Stage("measure", "bits per byte", self._measure, (RESULT,), inputs, settings)
        run_stages(self.out, [tokens, blocks, measure])
        shutil.rmtree(self.out / BLOCKS, ignore_errors=True)  # the model has them now
        return json.loads((self.out / RESULT).read_text(encoding="utf-8"))

    def _tokenize(self) -> Outcome:
        return Outcome(f"{tokenize(self.found, self.text, self.out / SHARDS):,} tokens")

    def _quantise(self) -> Outcome:
        model = load_model(self.found, "cpu")
        data = Windows(self.out / SHARDS, model.config)
        scheme = Scheme(METHOD_OF_BITS[self.bits], self.group, zeros=self.asymmetric, order=self.act_order)
        quantize = functools.partial(BLOCK_METHODS[self.method], scheme=scheme)
        folder = self.out / BLOCKS
        batches = data.batches(data.read(self.samples))
        say = functools.partial(print, "   ", flush=True)
        quantize_blocks_(model, batches, scheme, quantize, folder, device=pick(self.device), say=say)
        save_pretrained(model, self.out, load_tokenizer(self.found), quantized_as=self.format)
        return Outcome(f"{len(data.read(self.samples)):,} windows of {data.context:,} tokens read")

    def _measure(self) -> Outcome:
        found: dict[str, Any] = {}
        for when, path in (("before", self.found), ("after", self.out)):
            model = load_model(path, self.device)
            found[f"bytes_{when}"] = sum(tensor.nbytes for tensor in model.state_dict().values())
            found[f"bits_{when}"] = Windows(self.out / SHARDS, model.config).bits_per_byte(model)
        with replacing(self.out / RESULT) as file:
            json.dump(found, file, indent=2)
        return Outcome(f"{found['bits_before']:.4f} -> {found['bits_after']:.4f} bits per byte")
