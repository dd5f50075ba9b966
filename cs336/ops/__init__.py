"""One function an op, plain tensors in and out. Each runs the best variant for its arguments: see registry.py."""

from cs336.ops.activation import geglu as geglu
from cs336.ops.activation import relu2 as relu2
from cs336.ops.activation import swiglu as swiglu
from cs336.ops.adamw import adamw_ as adamw_
from cs336.ops.attention import attention as attention
from cs336.ops.attention_varlen import attention_varlen as attention_varlen
from cs336.ops.cross_entropy import cross_entropy as cross_entropy
from cs336.ops.dropout import dropout as dropout
from cs336.ops.embedding import embedding as embedding
from cs336.ops.layer_norm import layer_norm as layer_norm
from cs336.ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from cs336.ops.linear_cross_entropy import linear_log_probs as linear_log_probs
from cs336.ops.qk_norm_rope import qk_norm_rope as qk_norm_rope
from cs336.ops.rms_norm import rms_norm as rms_norm
from cs336.ops.rope import rope as rope
from cs336.ops.rope import rope_qk as rope_qk
from cs336.ops.silu import silu as silu
from cs336.ops.softmax import softmax as softmax
