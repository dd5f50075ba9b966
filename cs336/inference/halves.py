"""When a decoding step is computed by halves: while one attends, which is memory's time, the multiprocessors that
attention leaves alone compute the other's products. Runner._by_halves does it."""

from collections.abc import Sequence as Rows
from typing import NamedTuple, cast

from cs336.inference import ranks
from cs336.inference.scheduler import Sequence
from cs336.models import Transformer, TransformerBlock
from cs336.nn import Attention
from cs336.ops import registry
from cs336.ops.paged_attention import NATIVE_HEAD_DIMS

# On an H200 256 requests of a Qwen3-0.6B come to 23.1k and 23.5k tokens/s by halves, 22.3k and 22.5k without. A step
# of 256 rows with 154,000 tokens takes 6.02 ms for 6.10, and 6.27 with 29 spare; of 96 rows with 105,000 tokens 4.6 for
# 4.3, and of 256 with 66,000 tokens 4.2 for 3.9.
SPARE = 48
LEAST_ROWS = 144
READ = 8  # bytes of keys and values for one of layers' weights


class Halves(NamedTuple):
    least_rows: int
    least_tokens: int
    """That a step attends to. Fewer are read in less time than the products of two halves take."""
    spare: int
    """Multiprocessors that attention leaves alone."""

    def spare_of(self, decodes: Rows[Sequence]) -> int:
        """Of a step that decodes these; 0 where it is faster as a whole."""
        pays = len(decodes) >= self.least_rows and sum(s.computed for s in decodes) >= self.least_tokens
        return self.spare if pays else 0


def halves_of(model: Transformer) -> Halves | None:
    """None where attention has no kernel that leaves multiprocessors alone, or does not see all tokens."""
    mixers = [cast(TransformerBlock, layer).attention for layer in model.layers]
    if ranks.is_divided(model) or registry.kernels("paged_attention", model.device)[0] != "native":
        return None
    if registry.capability(model.device) != (9, 0):
        return None
    if not all(isinstance(m, Attention) and m.window is None and m.head_dim in NATIVE_HEAD_DIMS for m in mixers):
        return None
    width = model.compute_dtype.itemsize
    if width != 2:
        return None
    weights = width * model.config.num_parameters(embeddings=False)
    return Halves(LEAST_ROWS, int(READ * weights / model.config.state_bytes(1, width)), SPARE)
