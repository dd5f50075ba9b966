"""torch.func over a whole model: what works on torch's modules works on ours."""

import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap

from cs336.models import Transformer, TransformerConfig

CONFIG = TransformerConfig(97, 24, num_layers=2, d_model=32, num_heads=4, init_std=0.15)


def test_vmap_over_the_forward(device):
    model, ids = Transformer(CONFIG).to(device), torch.randint(97, (3, 2, 9), device=device)
    torch.testing.assert_close(vmap(model)(ids), torch.stack([model(batch) for batch in ids]))


def test_gradients_of_each_sample(device):
    model, ids = Transformer(CONFIG).to(device), torch.randint(97, (3, 10), device=device)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params, ids_S):
        logits_SV = functional_call(model, params, (ids_S[None, :-1],))[0]
        return F.cross_entropy(logits_SV, ids_S[1:])

    per_sample = vmap(grad(loss), in_dims=(None, 0))(params, ids)
    for i, ids_S in enumerate(ids):
        model.zero_grad()
        F.cross_entropy(model(ids_S[None, :-1])[0], ids_S[1:]).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(per_sample[name][i], p.grad, msg=name)
