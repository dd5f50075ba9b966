"""Writing to a paged cache in plain torch."""

from torch import Tensor


def append_kv_(
    k_cache_PSHD: Tensor,
    v_cache_PSHE: Tensor,
    k_THD: Tensor,
    v_THE: Tensor,
    page_table_BM: Tensor,
    sequence_T: Tensor,
    position_T: Tensor,
) -> None:
    live_T = position_T >= 0
    sequence, position = sequence_T[live_T].long(), position_T[live_T].long()
    size = k_cache_PSHD.shape[1]
    page = page_table_BM[sequence, position // size].long()
    k_cache_PSHD[page, position % size] = k_THD[live_T]
    v_cache_PSHE[page, position % size] = v_THE[live_T]


def copy_pages_(cache_PSHD: Tensor, source_N: Tensor, target_N: Tensor) -> None:
    live_N = (source_N >= 0) & (target_N >= 0)
    cache_PSHD[target_N[live_N].long()] = cache_PSHD[source_N[live_N].long()]
