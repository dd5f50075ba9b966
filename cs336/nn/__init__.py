"""Building blocks of language models: torch.nn.Modules over cs336.ops, with torch's parameter names.

Each has a frozen description beside it, which builds it and counts what it takes.
"""

from cs336.nn.attention import Attention as Attention
from cs336.nn.attention import AttentionConfig as AttentionConfig
from cs336.nn.embedding import Embedding as Embedding
from cs336.nn.hyena import Hyena as Hyena
from cs336.nn.hyena import HyenaConfig as HyenaConfig
from cs336.nn.latent_attention import LatentAttention as LatentAttention
from cs336.nn.latent_attention import LatentAttentionConfig as LatentAttentionConfig
from cs336.nn.linear import Linear as Linear
from cs336.nn.linear_attention import LinearAttention as LinearAttention
from cs336.nn.linear_attention import LinearAttentionConfig as LinearAttentionConfig
from cs336.nn.mamba2 import Mamba2 as Mamba2
from cs336.nn.mamba2 import Mamba2Config as Mamba2Config
from cs336.nn.mlp import GELU as GELU
from cs336.nn.mlp import MLP as MLP
from cs336.nn.mlp import GELUConfig as GELUConfig
from cs336.nn.mlp import MLPConfig as MLPConfig
from cs336.nn.mlp import NoMLPConfig as NoMLPConfig
from cs336.nn.mlp import SwiGLU as SwiGLU
from cs336.nn.mlp import SwiGLUConfig as SwiGLUConfig
from cs336.nn.mlp import default_d_ff as default_d_ff
from cs336.nn.moe import MoE as MoE
from cs336.nn.moe import MoEConfig as MoEConfig
from cs336.nn.moe import Routing as Routing
from cs336.nn.norms import LayerNorm as LayerNorm
from cs336.nn.norms import LayerNormConfig as LayerNormConfig
from cs336.nn.norms import RMSNorm as RMSNorm
from cs336.nn.norms import RMSNormConfig as RMSNormConfig
from cs336.nn.paged import Chunks as Chunks
from cs336.nn.paged import PagedKeyValues as PagedKeyValues
from cs336.nn.paged import PagedLatents as PagedLatents
from cs336.nn.paged import PagedTokens as PagedTokens
from cs336.nn.position_embedding import LearnedPositions as LearnedPositions
from cs336.nn.position_embedding import SinusoidalPositions as SinusoidalPositions
from cs336.nn.positions import AlibiConfig as AlibiConfig
from cs336.nn.positions import NoPositionsConfig as NoPositionsConfig
from cs336.nn.positions import RopeConfig as RopeConfig
from cs336.nn.positions import RotaryEmbedding as RotaryEmbedding
from cs336.nn.quantized import QuantizedLinear as QuantizedLinear
from cs336.nn.quantized import QuantizedWeight as QuantizedWeight
from cs336.nn.quantized import QuantMethod as QuantMethod
from cs336.nn.quantized import is_quantized as is_quantized
from cs336.nn.quantized import replace_linears as replace_linears
from cs336.nn.rope_scaling import LinearScaling as LinearScaling
from cs336.nn.rope_scaling import Llama3Scaling as Llama3Scaling
from cs336.nn.rope_scaling import LongRopeScaling as LongRopeScaling
from cs336.nn.rope_scaling import NtkScaling as NtkScaling
from cs336.nn.rope_scaling import YarnScaling as YarnScaling
from cs336.nn.slotted import Slotted as Slotted
from cs336.nn.state import Context as Context
from cs336.nn.state import KeyValues as KeyValues
from cs336.nn.state import MixerState as MixerState
