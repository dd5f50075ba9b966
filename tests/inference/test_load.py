"""A trained model is found and read, also from what the first release left."""

import pathlib

import pytest
import torch
from safetensors.torch import load_file

from cs336.inference.load import find_model, find_tokenizer, load_model
from cs336.tokenizer import Tokenizer

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
X = torch.arange(16).view(2, 8) * 7 % 264


@pytest.mark.parametrize("where", ["run", "run/export", "run/checkpoints/step_00000060"])
def test_what_the_first_release_left(where):
    found = find_model(FIXTURES / where)
    model = load_model(found, device="cpu")
    want = load_file(FIXTURES / "logits.safetensors")["trained"]
    torch.testing.assert_close(model(X), want, atol=1e-6, rtol=1e-6)
    assert Tokenizer.load(find_tokenizer(found)).vocab_size == 257
