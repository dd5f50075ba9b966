"""Log-probabilities, masks, means, entropy and divergences against plain float64 code."""

import pytest
import torch

from cs336.alignment import entropy, kl, masked_mean, masked_normalize, response_mask, sequence_log_probs
from cs336.models import Transformer, TransformerConfig


def model_of(**options):
    torch.manual_seed(1)
    return Transformer(TransformerConfig(40, 32, num_layers=1, d_model=16, num_heads=2, init_std=0.4, **options))


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": True}, {"logit_softcap": 3.0}])
def test_sequence_log_probs_are_those_of_the_logits(options):
    model = model_of(**options)
    ids_BS = torch.randint(40, (3, 9))
    for temperature in (1.0,) if options.get("logit_softcap") else (1.0, 0.7):
        logp_BTV = (model(ids_BS)[:, :-1].double() / temperature).log_softmax(-1)
        got, entropies = sequence_log_probs(model, ids_BS, temperature=temperature, return_entropy=True)
        want = logp_BTV.gather(-1, ids_BS[:, 1:, None])[..., 0]
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropies.double(), -(logp_BTV.exp() * logp_BTV).sum(-1), rtol=1e-5, atol=1e-5)
        weights = torch.randn(3, 8)
        grads = [
            torch.autograd.grad((x * weights).sum(), list(model.parameters()), retain_graph=True)
            for x in (got, want.float())
        ]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_sequence_log_probs_of_packed_rows():
    model = model_of()
    first, second = torch.randint(40, (1, 5)), torch.randint(40, (1, 4))
    segments = torch.tensor([[0] * 5 + [1] * 4])
    packed = sequence_log_probs(model, torch.cat([first, second], 1), segments_BS=segments)
    apart = [sequence_log_probs(model, x) for x in (first, second)]
    torch.testing.assert_close(packed, torch.cat([apart[0], torch.zeros(1, 1), apart[1]], 1), rtol=1e-5, atol=1e-5)


def test_sequence_log_probs_refuses():
    model, ids = model_of(), torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="2 tokens or more"):
        sequence_log_probs(model, ids[:, :1])
    with pytest.raises(ValueError, match="above 0"):
        sequence_log_probs(model, ids, temperature=0)
    with pytest.raises(ValueError, match="logit_softcap"):
        sequence_log_probs(model_of(logit_softcap=3.0), ids, temperature=0.5)


def test_response_mask_at_its_borders():
    prompts, lengths = torch.tensor([1, 2, 4, 3]), torch.tensor([5, 4, 5, 3])
    got = response_mask(prompts, lengths, 5)
    # prediction t is of token t + 1: the first token of a response is predicted from the last of its prompt
    want = [[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert got.dtype == torch.bool
    assert got.long().tolist() == want
    for prompt, length in ((0, 3), (3, 2), (1, 6)):
        with pytest.raises(ValueError, match="<= 5 tokens"):
            response_mask(torch.tensor([prompt]), torch.tensor([length]), 5)
    with pytest.raises(ValueError, match=r"\(batch,\)"):
        response_mask(prompts, lengths[:2], 5)


def test_masked_sums_and_means():
    x = torch.tensor([[1.0, 2.0, float("nan")], [4.0, float("inf"), float("nan")], [7.0, 8.0, 9.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    assert masked_mean(x, mask, 1).tolist() == [1.5, 4.0, 0.0]
    assert masked_mean(x, mask, 0).tolist() == [2.5, 2.0, 0.0]
    assert masked_mean(x, mask).item() == pytest.approx(7 / 3)
    assert masked_normalize(x, mask, 4, 1).tolist() == [0.75, 1.0, 0.0]
    assert masked_normalize(x, mask, 2.0).item() == 3.5
    (grad,) = torch.autograd.grad(masked_mean(x, mask), x)
    torch.testing.assert_close(grad, mask / 3)
    with pytest.raises(ValueError, match="mask must have shape"):
        masked_mean(x, mask[:1])


def test_entropy():
    assert entropy(torch.zeros(2, 8)).tolist() == pytest.approx([2.0794415] * 2)
    assert entropy(torch.tensor([0.0, 0.0, -torch.inf])).item() == pytest.approx(0.6931472)
    assert entropy(torch.tensor([1e4, 0.0])).item() == 0
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    want = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy(logits), want)
    assert torch.autograd.gradcheck(entropy, logits)
    holed = torch.tensor([0.3, -torch.inf, 1.0], requires_grad=True)
    assert torch.autograd.grad(entropy(holed), holed)[0].isfinite().all()
    assert entropy(torch.zeros(3, dtype=torch.bfloat16)).dtype == torch.float32


def test_kl_estimators():
    p, q = torch.tensor([0.6, 0.3, 0.1]).double(), torch.tensor([0.2, 0.5, 0.3]).double()
    exact = (p * (p / q).log()).sum()
    for estimator in ("k1", "k3"):  # their mean under p is the divergence
        torch.testing.assert_close((p * kl(p.log(), q.log(), estimator)).sum(), exact)
    torch.testing.assert_close(kl(p.log(), q.log(), "k2"), (p / q).log() ** 2 / 2)
    torch.testing.assert_close(kl(p.log(), q.log()), q / p - 1 - (q / p).log())
    assert (kl(p.log(), q.log()) >= 0).all()
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl(p, q, "k4")
    with pytest.raises(ValueError, match="must have shape"):
        kl(p, q[:1])
