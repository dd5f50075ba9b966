"""Kernels that start before the one ahead of them ends give what they give one by one."""

import torch


def check_without_waiting(chain, times):
    """chain(wait) calls `wait` after each kernel; on a stream, `times`, and in a graph it has the same bits without."""
    want = chain(torch.cuda.synchronize)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        assert all(torch.equal(chain(lambda: None), want) for _ in range(times))
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            got = chain(lambda: None)
        graph.replay()
        side.synchronize()
    assert torch.equal(got, want)
