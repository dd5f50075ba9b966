"""Language models: their description, the model, its cache, and the Hugging Face layout on disk."""

from cs336.models.cache import KVCache as KVCache
from cs336.models.config import TransformerConfig as TransformerConfig
from cs336.models.huggingface import from_pretrained as from_pretrained
from cs336.models.huggingface import save_pretrained as save_pretrained
from cs336.models.transformer import Transformer as Transformer
