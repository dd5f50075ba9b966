"""One function an op, plain tensors in and out. Each runs the best variant for its arguments: see registry.py."""

from cs336.ops.adamw import adamw_ as adamw_
from cs336.ops.attention import attention as attention
from cs336.ops.attention_varlen import attention_varlen as attention_varlen
from cs336.ops.causal_conv1d import causal_conv1d as causal_conv1d
from cs336.ops.cross_entropy import cross_entropy as cross_entropy
from cs336.ops.layer_norm import layer_norm as layer_norm
from cs336.ops.linear_attention import gated_delta_rule as gated_delta_rule
from cs336.ops.linear_attention import linear_attention as linear_attention
from cs336.ops.long_conv import long_conv as long_conv
from cs336.ops.qk_norm_rope import qk_norm_rope as qk_norm_rope
from cs336.ops.rms_norm import rms_norm as rms_norm
from cs336.ops.rope import rope as rope
from cs336.ops.rope import rope_qk as rope_qk
from cs336.ops.silu import silu as silu
from cs336.ops.softmax import softmax as softmax
from cs336.ops.swiglu import swiglu as swiglu
