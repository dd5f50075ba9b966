"""Building blocks of language models: torch.nn.Modules over cs336.ops, with torch's parameter names."""

from cs336.nn.attention import Attention as Attention
from cs336.nn.embedding import Embedding as Embedding
from cs336.nn.linear import Linear as Linear
from cs336.nn.mlp import SwiGLU as SwiGLU
from cs336.nn.mlp import default_d_ff as default_d_ff
from cs336.nn.norms import LayerNorm as LayerNorm
from cs336.nn.norms import RMSNorm as RMSNorm
from cs336.nn.positions import RotaryEmbedding as RotaryEmbedding
