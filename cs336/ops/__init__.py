"""One function an op, plain tensors in and out. Each runs the best variant for its arguments: see registry.py."""

from cs336.ops.adamw import adamw_ as adamw_
from cs336.ops.attention import attention as attention
from cs336.ops.attention_varlen import attention_varlen as attention_varlen
from cs336.ops.cross_entropy import cross_entropy as cross_entropy
from cs336.ops.layer_norm import layer_norm as layer_norm
from cs336.ops.paged_attention import paged_attention as paged_attention
from cs336.ops.paged_attention import paged_prefill as paged_prefill
from cs336.ops.paged_cache import append_kv_ as append_kv_
from cs336.ops.paged_cache import copy_pages_ as copy_pages_
from cs336.ops.qk_norm_rope import qk_norm_rope as qk_norm_rope
from cs336.ops.rms_norm import rms_norm as rms_norm
from cs336.ops.rope import rope as rope
from cs336.ops.rope import rope_qk as rope_qk
from cs336.ops.sample import IN_PROMPT as IN_PROMPT
from cs336.ops.sample import Sampled as Sampled
from cs336.ops.sample import sample as sample
from cs336.ops.silu import silu as silu
from cs336.ops.softmax import softmax as softmax
from cs336.ops.swiglu import swiglu as swiglu
