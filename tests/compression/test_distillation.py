"""The loss is the divergence it says, the teacher's words stay what they were, and a student comes closer to it."""

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch

from cs336.cli.program import main
from cs336.compression import Distill, DistillConfig, TopLogits, distill, kl_of_top, prune_depth
from cs336.compression import distill_job as job
from cs336.inference.quantization import compress
from cs336.models import Transformer, TransformerConfig, from_pretrained, save_pretrained
from cs336.tokenizer import Tokenizer
from cs336.training import NextToken
from cs336.training.weights import load_weights
from cs336.utils import stages


def model_of(num_layers=2, vocab_size=48, seed=0):
    torch.manual_seed(seed)
    return Transformer(TransformerConfig(vocab_size, 16, num_layers, 32, num_heads=4, d_ff=64, init_std=0.1)).eval()


def random_logs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(2).log_softmax(-1)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_with_the_whole_vocabulary_it_is_the_divergence(divergence):
    q, p = random_logs(2, 3, 9), random_logs(2, 3, 9, seed=1)
    a, b = (p, q) if divergence == "forward" else (q, p)
    expected = torch.nn.functional.kl_div(b, a, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl_of_top(q, p, divergence), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_what_was_not_kept_counts_as_one_token(divergence):
    q, p = torch.tensor([0.5, 0.2, 0.2, 0.1]), torch.tensor([0.4, 0.3, 0.1, 0.2])
    merged = [torch.stack((x[0], x[1], x[2] + x[3])) for x in (q, p)]
    a, b = reversed(merged) if divergence == "forward" else merged
    expected = (a * (a / b).log()).sum()
    torch.testing.assert_close(kl_of_top(q[:2].log(), p[:2].log(), divergence), expected, atol=1e-6, rtol=1e-5)
    assert expected < kl_of_top(q.log(), p.log(), divergence)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_the_objective_sums_over_what_counts(divergence):
    model, teacher = model_of(), model_of(seed=1)
    ids = torch.randint(0, 48, (3, 8), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1, 1).masked_fill(torch.arange(8) == 7, -100)
    with torch.no_grad():
        top = teacher(ids).log_softmax(-1).topk(5)
        q = model(ids).log_softmax(-1).gather(-1, top.indices)
        kl = kl_of_top(q, top.values, divergence)[:, :7].sum()
        ce, count, _ = NextToken()(model, (ids, targets))
    loss, counted, metrics = Distill(divergence, 0.25)(model, (ids, targets, top.indices, top.values))
    torch.testing.assert_close(loss, 0.75 * kl + 0.25 * ce)
    assert counted == count == 21
    torch.testing.assert_close(metrics["kl"], kl)
    torch.testing.assert_close(metrics["cross_entropy"], ce)
    same = Distill(divergence)(model, (ids, targets, *_all_of(model, ids)))[0]
    assert abs(same.item()) < 1e-3  # of itself it learns nothing
    loss.backward()
    assert model.head.weight.grad.abs().sum() > 0


def _all_of(model, ids):
    with torch.no_grad():
        top = model(ids).log_softmax(-1).topk(48)
    return top.indices, top.values


def test_options_are_checked():
    with pytest.raises(ValueError, match="forward or reverse, got 'both'"):
        Distill("both")
    with pytest.raises(ValueError, match=r"share from 0 to 1, got 1\.5"):
        Distill(cross_entropy=1.5)
    with pytest.raises(ValueError, match="top_k must be 1 or more, got 0"):
        DistillConfig(top_k=0)


def test_top_logits_are_kept_and_a_damaged_file_is_refused(tmp_path, monkeypatch):
    teacher, tops = model_of(), TopLogits(tmp_path / "teacher")
    windows = [torch.randint(0, 48, (8,), generator=torch.Generator().manual_seed(i)) for i in range(20)]
    with pytest.raises(ValueError, match=r"top_k must be in 1\.\.48"):
        tops.write(teacher, windows, 49)
    tops.write(teacher, windows, 5)
    ids, logprobs = tops.read(np.array([17, 3]))
    with torch.no_grad():
        expected = teacher(torch.stack([windows[17], windows[3]])).log_softmax(-1).topk(5)
    assert torch.equal(ids, expected.indices)
    torch.testing.assert_close(logprobs, expected.values, atol=4e-3, rtol=1e-3)  # float16
    files = sorted((tmp_path / "teacher").glob("*.safetensors"))
    whole = [file.read_bytes() for file in files]
    assert [file.name for file in files] == ["00000.safetensors", "00001.safetensors"]
    files[1].write_bytes(whole[1][:-1] + b"\x7f")
    with pytest.raises(ValueError, match=r"00001\.safetensors is damaged: delete it"):
        tops.read(np.array([17]))
    made = []
    monkeypatch.setattr(Transformer, "forward", lambda self, x, _f=Transformer.forward: made.append(1) or _f(self, x))
    tops.write(teacher, windows, 5)  # only what is not whole
    assert len(made) == 4
    assert [file.read_bytes() for file in files] == whole


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A teacher that has learned a text, its pruned student, and the text."""
    place = tmp_path_factory.mktemp("models")
    draw = np.random.default_rng(0)
    words = ["cat", "dog", "mat", "log", "sun", "sea", "red", "big"]
    text = place / "text.txt"
    text.write_text(" ".join(words[(i * i + draw.integers(2)) % 8] for i in range(700)))
    tokenizer = Tokenizer.train([text.read_text()], 270, ["<|endoftext|>"])
    model = model_of(3, 270)
    ids = torch.tensor(tokenizer.encode(text.read_text()))
    windows = ids[: len(ids) // 17 * 17].view(-1, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        rows = windows[torch.arange(16) * 5 % len(windows) - step % 5]
        loss, count, _ = NextToken()(model, (rows[:, :-1], rows[:, 1:]))
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_pretrained(model, place / "teacher", tokenizer)
    save_pretrained(prune_depth(model, 0.34, [windows[:8, :-1]]), place / "student", tokenizer)
    return place, text


OPTIONS = {"steps": 40, "batch_size": 8, "lr": 2e-3, "top_k": 16, "samples": 64}


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_a_distilled_student_is_closer_than_one_that_read_the_text(saved, tmp_path, divergence):
    place, text = saved
    found = {}
    for name, share in (("teacher", 0.0), ("text", 1.0)):
        config = DistillConfig(**OPTIONS, divergence=divergence, cross_entropy=share)
        found[name] = distill(place / "teacher", place / "student", tmp_path / name, calibrate=text, config=config)
    assert found["teacher"].kl_after < 0.9 * found["text"].kl_after
    assert found["teacher"].kl_after < 0.5 * found["teacher"].kl_before
    assert found["text"].kl_before == found["teacher"].kl_before


def test_a_run_that_was_stopped_ends_as_one_that_was_not(saved, tmp_path, monkeypatch, capsys):
    place, text = saved
    command = ["compress", str(place / "teacher"), "--method", "distill", "--student", str(place / "student")]
    command += ["--calibrate", str(text), "--steps", "20", "--lr", "1e-3", "--top-k", "8", "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    save, saves = job.save_checkpoint, []

    def stop(*args):
        save(*args)
        saves.append(args[2])
        if len(saves) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(job, "save_checkpoint", stop)
    assert main([*command, "--out", str(tmp_path / "cut")]) == 130
    assert saves == [2, 4, 6, 8]
    assert main([*command, "--out", str(tmp_path / "cut")]) == 0
    assert saves[4] == 10
    whole, cut = (from_pretrained(tmp_path / name).state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    said = [json.loads((tmp_path / name / "compression.json").read_text()) for name in ("whole", "cut")]
    assert said[0] == said[1]
    assert not (tmp_path / "cut" / "checkpoint").exists()
    capsys.readouterr()
    assert main([*command, "--out", str(tmp_path / "cut")]) == 0
    assert capsys.readouterr().out.count("(done before)") == 4
    (tmp_path / "cut" / "model.safetensors").unlink()
    assert main([*command, "--out", str(tmp_path / "cut")]) == 0
    again = from_pretrained(tmp_path / "cut").state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_nothing_is_learned_again_when_it_stops_behind_the_export(saved, tmp_path, monkeypatch):
    place, text = saved
    config, write, saves = DistillConfig(**OPTIONS | {"steps": 4}), stages._Job._write, []
    save = job.save_checkpoint
    monkeypatch.setattr(job, "save_checkpoint", lambda *args: saves.append(args[2]) or save(*args))

    def stop(self, stage, entry):
        if stage.name == "learn" and "seconds" in entry:
            raise KeyboardInterrupt
        write(self, stage, entry)

    call = functools.partial(distill, place / "teacher", place / "student", tmp_path, calibrate=text, config=config)
    with monkeypatch.context() as patch:
        patch.setattr(stages._Job, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            call()
    call()
    assert saves == [1, 2, 3, 4]
    assert not (tmp_path / job.CHECKPOINT).exists()


@pytest.mark.parametrize("wider", ["teacher", "student"])
def test_one_tokenizer_s_vocabularies_may_be_padded_to_other_sizes(saved, tmp_path, wider):
    place, text = saved
    model, tokenizer = from_pretrained(place / wider), Tokenizer.load(place / wider / "tokenizer.json")
    padded = Transformer(dataclasses.replace(model.config, vocab_size=288))
    weights = {name: t.clone() for name, t in padded.state_dict().items()}
    for name, t in model.state_dict().items():
        weights[name][: len(t)] = t
    padded.load_state_dict(weights)
    save_pretrained(padded, tmp_path / wider, tokenizer)
    places = {name: tmp_path / name if name == wider else place / name for name in ("teacher", "student")}
    config = DistillConfig(**OPTIONS | {"steps": 20, "top_k": 270})
    found = distill(*places.values(), tmp_path / "out", calibrate=text, config=config)
    assert found.kl_after < found.kl_before


def test_another_tokenizer_is_refused(saved, tmp_path):
    place, text = saved
    tokenizer = Tokenizer.train(["other words entirely " * 9], 262, ["<|endoftext|>"])
    save_pretrained(model_of(1, 270), tmp_path / "other", tokenizer)
    with pytest.raises(ValueError, match="they must share a tokenizer"):
        distill(place / "teacher", tmp_path / "other", tmp_path / "out", calibrate=text)


def test_a_quantised_student_which_would_not_learn_is_refused(saved, tmp_path):
    place, text = saved
    compress(place / "student", tmp_path / "int8", "int8", 8)
    config = DistillConfig(top_k=8, steps=1)
    with pytest.raises(ValueError, match="int8 is quantised, and would not learn"):
        distill(place / "teacher", tmp_path / "int8", tmp_path / "out", calibrate=text, config=config)
    with pytest.raises(ValueError, match="int8 is quantised, and would not learn"):
        load_weights(from_pretrained(place / "student"), tmp_path / "int8")
