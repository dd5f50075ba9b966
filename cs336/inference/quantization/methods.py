"""What the calibrated methods do to one block."""

from torch import nn

from cs336.inference.quantization.calibration import Inputs
from cs336.inference.quantization.gptq import gptq
from cs336.inference.quantization.layerwise import Scheme, output_error
from cs336.nn.quantized import BITS


def gptq_block(block: nn.Module, inputs: list[Inputs], scheme: Scheme) -> str:
    """GPTQ of each layer of a block; the error of their outputs, relative to these.

    Raises ValueError by the name of a layer whose weight is not finite.
    """
    read = {name: each for each in inputs for name in each.layers}
    errors = []
    for name, (old, new) in scheme.replace(block).items():
        hessian = read[name].hessian
        options = {"act_order": scheme.order, "asymmetric": scheme.zeros}
        try:
            new.fill(gptq(old.weight, hessian, bits=BITS[scheme.method], group=new.group, **options), old.bias)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        errors.append(output_error(old.weight, new, read[name]))
    return summary(errors)


def summary(errors: list[tuple[float, float]]) -> str:
    off, whole = map(sum, zip(*errors, strict=True))
    return f"outputs are {(off / whole) ** 0.5 if whole else 0:.2%} off"


BLOCK_METHODS = {"gptq": gptq_block}
