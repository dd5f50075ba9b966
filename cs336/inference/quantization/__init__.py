"""Models with fewer bits a weight: int8 and int4 in groups, and the directories that hold them."""

from cs336.inference.quantization.compress import Compressed as Compressed
from cs336.inference.quantization.compress import compress as compress
from cs336.inference.quantization.gptq import gptq as gptq
from cs336.inference.quantization.rounding import quantize_ as quantize_
from cs336.inference.quantization.rounding import round_to_nearest as round_to_nearest
