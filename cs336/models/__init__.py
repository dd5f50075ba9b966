"""Language models: their description, the model, its state and memory, and the Hugging Face layout on disk."""

from cs336.models.block import BlockConfig as BlockConfig
from cs336.models.block import TransformerBlock as TransformerBlock
from cs336.models.config import TransformerConfig as TransformerConfig
from cs336.models.gguf import from_gguf as from_gguf
from cs336.models.gguf import tokenizer_from_gguf as tokenizer_from_gguf
from cs336.models.huggingface import from_pretrained as from_pretrained
from cs336.models.huggingface import save_pretrained as save_pretrained
from cs336.models.memory import Memory as Memory
from cs336.models.memory import decoding_memory as decoding_memory
from cs336.models.memory import training_memory as training_memory
from cs336.models.state import DecodingState as DecodingState
from cs336.models.state import PagedState as PagedState
from cs336.models.transformer import Transformer as Transformer
