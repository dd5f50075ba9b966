"""Sequences in a paged cache, with NaN wherever no token is, and the attention of their last tokens by the formula."""

import torch
from attentions import definition

ABSURD = (2**31 - 1, -(2**31), -1)  # in entries of a page table that no sequence uses


def pool(lengths, page, Hkv, D, E=None, dtype=torch.float32, device="cpu", spare=2):
    """k_cache, v_cache, page_table, seq_lens, and the dense keys and values (length, Hkv, D) of each sequence."""
    pages = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(pages) + spare).tolist()
    width = max([*pages, 0]) + 2
    caches = [torch.full((len(order), page, Hkv, d), torch.nan, dtype=dtype, device=device) for d in (D, E or D)]
    table = torch.tensor(ABSURD * (width * len(lengths)), dtype=torch.int32)[: width * len(lengths)]
    table = table.view(len(lengths), width)
    dense = []
    for b, (length, count) in enumerate(zip(lengths, pages, strict=True)):
        table[b, :count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int32)
        dense.append([torch.randn(length, Hkv, c.shape[-1], dtype=torch.float32).to(device, dtype) for c in caches])
        token = torch.arange(length)
        places = (table[b].long()[token // page].to(device), (token % page).to(device))
        for cache, x in zip(caches, dense[-1], strict=True):
            cache[places] = x
    return *caches, table.to(device), torch.tensor(lengths, dtype=torch.int32, device=device), dense


def formula(qs, dense, dtype, window=None, sinks=None, **options):
    """[(o (Q, H, E), lse (H, Q))] of qs [(Q, H, D)] in `dtype`."""
    outputs = []
    for q, (k, v) in zip(qs, dense, strict=True):
        args = (x.to(dtype).transpose(0, 1)[None] for x in (q, k, v))
        o, lse = definition(*args, causal=True, window=None if window is None else (window, None), **options)
        if sinks is not None:
            total = torch.logaddexp(lse, sinks.to(dtype)[:, None])
            o, lse = o * torch.exp(lse - total).nan_to_num(0.0)[..., None], total
        outputs.append((o[0].transpose(0, 1), lse[0]))
    return outputs
