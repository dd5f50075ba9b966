"""Quantised layers in files: in ours, in compressed-tensors', in GPTQ's and in AWQ's, read and written by name."""

from cs336.models.huggingface.quantized.layers import FORMATS as FORMATS
from cs336.models.huggingface.quantized.layers import read_quantized as read_quantized
from cs336.models.huggingface.quantized.layers import write_quantized as write_quantized
