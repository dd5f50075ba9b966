"""Building blocks of language models: torch.nn.Modules over cs336.ops, with torch's parameter names.

Each has a frozen description beside it, which builds it and counts what it takes.
"""

from cs336.nn.attention import Attention as Attention
from cs336.nn.attention import AttentionConfig as AttentionConfig
from cs336.nn.embedding import Embedding as Embedding
from cs336.nn.linear import Linear as Linear
from cs336.nn.mlp import GELU as GELU
from cs336.nn.mlp import GELUConfig as GELUConfig
from cs336.nn.mlp import SwiGLU as SwiGLU
from cs336.nn.mlp import SwiGLUConfig as SwiGLUConfig
from cs336.nn.mlp import default_d_ff as default_d_ff
from cs336.nn.norms import LayerNorm as LayerNorm
from cs336.nn.norms import LayerNormConfig as LayerNormConfig
from cs336.nn.norms import RMSNorm as RMSNorm
from cs336.nn.norms import RMSNormConfig as RMSNormConfig
from cs336.nn.paged import PagedKeyValues as PagedKeyValues
from cs336.nn.paged import PagedTokens as PagedTokens
from cs336.nn.positions import NoPositionsConfig as NoPositionsConfig
from cs336.nn.positions import RopeConfig as RopeConfig
from cs336.nn.positions import RotaryEmbedding as RotaryEmbedding
from cs336.nn.state import Context as Context
from cs336.nn.state import KeyValues as KeyValues
from cs336.nn.state import MixerState as MixerState
