"""What a forward reads while parameters are still gathered it has waited for."""

import torch
from torch import nn

from cs336.parallel import ShardedAdamW


class Tied(nn.Module):
    """Its table is used before the element of a list that has it too."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, 4)
        self.heads = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
        self.heads[0].weight = self.embedding.weight

    def forward(self, ids):
        self.at_the_table = [bucket.gathering for bucket in self.optimizer._buckets]
        x = self.embedding(ids)
        for head in self.heads:
            x = head(x)
        return x


def test_a_parameter_that_is_tied_to_one_in_a_list(world):
    model = Tied()
    model.optimizer = ShardedAdamW(model.parameters(), bucket_mb=0)
    model.optimizer.overlap(model)
    for _ in range(2):
        model(torch.tensor([1, 2])).sum().backward()
        model.optimizer.step()
    holds_table = [model.embedding.weight in set(bucket.params) for bucket in model.optimizer._buckets]
    assert sorted(holds_table) == [False, True]
    assert model.at_the_table == [not holds for holds in holds_table]


def test_a_method_beside_forward(world):
    """As a Transformer's `features` is: it begins at the table, not at the model's own call."""
    model = Tied()
    model.optimizer = ShardedAdamW(model.parameters(), bucket_mb=0)
    model.optimizer.overlap(model)
    model(torch.tensor([1, 2])).sum().backward()
    model.optimizer.step()
    holds_table = [model.embedding.weight in set(bucket.params) for bucket in model.optimizer._buckets]
    assert all(bucket.gathering for bucket in model.optimizer._buckets)
    model.embedding(torch.tensor([1, 2]))
    assert [bucket.gathering for bucket in model.optimizer._buckets] == [not holds for holds in holds_table]
