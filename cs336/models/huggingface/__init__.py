"""Models on disk in the Hugging Face layout, one adapter a family; what no family has is written as our own kind.

A directory holds config.json, generation_config.json, model.safetensors (or shards with model.safetensors.index.json)
and, with a tokenizer, tokenizer.json, tokenizer_config.json and chat_template.jinja; that of a low-rank adapter in
PEFT's layout stands for its base model with the adapter merged. Nothing is ever unpickled.
"""

from cs336.models.huggingface.adapter import base_of as base_of
from cs336.models.huggingface.adapter import is_adapter as is_adapter
from cs336.models.huggingface.directory import OURS as OURS
from cs336.models.huggingface.directory import check_quantized_as as check_quantized_as
from cs336.models.huggingface.directory import from_pretrained as from_pretrained
from cs336.models.huggingface.directory import has_weights as has_weights
from cs336.models.huggingface.directory import read_config as read_config
from cs336.models.huggingface.directory import read_kind as read_kind
from cs336.models.huggingface.directory import read_step as read_step
from cs336.models.huggingface.directory import save_adapter as save_adapter
from cs336.models.huggingface.directory import save_pretrained as save_pretrained
