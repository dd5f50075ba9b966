"""GGUF, the one-file format of llama.cpp: read a model and its tokenizer, quantized or not, as float weights."""

from cs336.models.gguf.model import from_gguf as from_gguf
from cs336.models.gguf.reader import GGUF as GGUF
from cs336.models.gguf.tokenizer import tokenizer_from_gguf as tokenizer_from_gguf
