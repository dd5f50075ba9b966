import gzip
import json
import math
import re

import numpy as np
import pytest
import torch

from cs336 import ops
from cs336.data import ShardWriter, TokenDataset
from cs336.evaluation import baselines, bits_per_byte, evaluate, mean_loss
from cs336.models import BlockConfig, Transformer, TransformerConfig
from cs336.nn import AttentionConfig, MoEConfig


def write(directory, documents, vocab_size=257):
    """Bytes as tokens, 256 after each document."""
    with ShardWriter(directory, vocab_size=vocab_size, tokenizer="bytes", eot_id=256) as writer:
        for document in documents:
            ids = np.array([*document.encode(), 256])
            writer.write(ids, documents=1, text_bytes=len(ids) - 1)
    return directory


def test_a_model_that_knows_nothing_needs_the_bits_of_its_vocabulary():
    assert bits_per_byte(math.log(256), tokens=100, num_bytes=100) == pytest.approx(8)
    assert bits_per_byte(math.log(256), tokens=100, num_bytes=400) == pytest.approx(2)


def test_mean_loss_is_without_what_routers_add(tmp_path):
    torch.manual_seed(0)
    data = TokenDataset(write(tmp_path / "t", ["how do you train the best model?"]), 16)
    block = BlockConfig(AttentionConfig(2), MoEConfig(4, 2, balance_loss=0.5, z_loss=0.5))
    model = Transformer(TransformerConfig(257, 16, 1, 32, layers=(block,)))
    x_BS, y_BS = (torch.stack(part) for part in zip(*(data[i] for i in range(len(data))), strict=True))
    assert mean_loss(model, data) == pytest.approx(ops.cross_entropy(model(x_BS), y_BS).item(), rel=1e-5)


def test_mean_loss_is_over_every_window(tmp_path):
    torch.manual_seed(0)
    data = TokenDataset(write(tmp_path / "t", ["how do you train the best model?" * 3] * 5), 16)
    model = Transformer(TransformerConfig(257, 16, 1, 32, 2)).train()
    losses = [ops.cross_entropy(model(x[None]), y[None]).item() for x, y in (data[i] for i in range(len(data)))]
    assert len(losses) % 7 != 0  # the last batch is a smaller one
    assert mean_loss(model, data, batch_size=7) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert mean_loss(model, data, most_windows=10**9) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    spread = [losses[i * len(losses) // 5] for i in range(5)]
    assert mean_loss(model, data, batch_size=2, most_windows=5) == pytest.approx(sum(spread) / 5, rel=1e-5)
    assert model.training


def test_baselines_by_hand(tmp_path):
    train, held_out = ["aab" * 100], ["ab" * 50, "b"]
    found = {
        b.name: b
        for b in baselines(train, held_out, write(tmp_path / "train", train), write(tmp_path / "val", held_out))
    }
    a, b = 201 / (300 + 256), 101 / (300 + 256)
    expected = -(50 * math.log2(a) + 51 * math.log2(b)) / 101
    assert found["byte unigram"].bits_per_byte == pytest.approx(expected)
    a, b, end = 201 / (301 + 257), 101 / (301 + 257), 2 / (301 + 257)
    expected = -(50 * math.log2(a) + 51 * math.log2(b) + 2 * math.log2(end)) / 101
    assert found["token unigram"].bits_per_byte == pytest.approx(expected)
    assert found["gzip -9"].bits_per_byte == 8 * len(gzip.compress("".join(held_out).encode(), 9)) / 101
    assert found["xz -9e"].bits_per_byte > 0


def test_counting_in_chunks(tmp_path, monkeypatch):
    documents = ["how do you train the best model with a fixed set of resources?"] * 3
    whole = baselines(documents, documents, write(tmp_path / "t", documents), tmp_path / "t")
    monkeypatch.setattr("cs336.evaluation.baseline.CHUNK", 10)
    assert baselines(documents, documents, tmp_path / "t", tmp_path / "t") == whole


def test_nothing_to_measure(tmp_path):
    write(tmp_path / "t", ["a"])
    with pytest.raises(ValueError, match="no held-out text"):
        baselines(["a"], [], tmp_path / "t", tmp_path / "t")
    with pytest.raises(ValueError, match=r"meta\.json"):
        baselines(["a"], ["a"], tmp_path / "t", tmp_path / "t" / "00000.bin")


def test_a_long_text_is_compressed_in_part(tmp_path, monkeypatch):
    documents = ["how do you train the best model with a fixed set of resources? " * 40]
    write(tmp_path / "t", documents)
    whole = baselines(None, documents, None, tmp_path / "t")
    assert [b.name for b in whole] == ["gzip -9", "xz -9e"]  # nothing is known of a training text
    monkeypatch.setattr("cs336.evaluation.baseline.MOST_COMPRESSED", 1000)
    part = baselines(None, documents, None, tmp_path / "t")[0]
    assert part.bits_per_byte == pytest.approx(8 * len(gzip.compress(documents[0].encode()[:1000], 9)) / 1000)
    assert "its first 0 MB" in part.how


class Bytes:
    fingerprint = "bytes"

    def decode(self, ids):
        return bytes(ids.astype(np.uint8)).decode()


def test_evaluation_of_shards_is_that_of_their_text(tmp_path):
    torch.manual_seed(0)
    train, held_out = ["how do you train the best model? " * 9, "naïve"], ["with a fixed set of resources " * 3] * 4
    write(tmp_path / "train", train)
    write(tmp_path / "val", held_out)
    model = Transformer(TransformerConfig(257, 16, 1, 32, 2))
    found = evaluate(model, Bytes(), tmp_path / "val", tmp_path / "train")
    data = TokenDataset(tmp_path / "val", 16)
    assert found.loss == pytest.approx(mean_loss(model, data))
    assert found.bits_per_byte == bits_per_byte(found.loss, data.meta.tokens, data.meta.text_bytes)
    assert list(found.baselines) == baselines(train, held_out, tmp_path / "train", tmp_path / "val")
    assert found.how == "4 documents, 0.00 MB, read 16 tokens at a time"
    how = evaluate(model, Bytes(), tmp_path / "val", most_tokens=32).how
    assert re.search(r"read 16 tokens at a time, 2 of \d+ such windows, spread evenly$", how)
    with pytest.raises(ValueError, match="at least 1 token has to be read, not 0"):
        evaluate(model, Bytes(), tmp_path / "val", most_tokens=0)
    path = found.save(tmp_path)
    saved = json.loads(path.read_text())
    assert path == tmp_path / "evaluation.json"
    assert saved["bits_per_byte"] == found.bits_per_byte
    assert {b["name"] for b in saved["baselines"]} == {"byte unigram", "token unigram", "gzip -9", "xz -9e"}


def test_evaluation_refuses_the_tokens_of_another(tmp_path):
    write(tmp_path / "val", ["how do you train the best model?"])
    other = Bytes()
    other.fingerprint = "another"
    with pytest.raises(ValueError, match="was made by tokenizer bytes"):
        evaluate(Transformer(TransformerConfig(257, 16, 1, 32, 2)), other, tmp_path / "val")
