import io
import json
import os
import pathlib
import re
import resource
import zipfile

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cs336.models import Transformer, TransformerConfig
from cs336.optim import AdamW, param_groups
from cs336.training import checkpoint, load_checkpoint, save_checkpoint
from cs336.training.checkpoint import MODEL, OPTIMIZER, STATE, list_checkpoints, prune_checkpoints, read_extra


def model(width=8):
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 2))


def step(net, optimizer, seed):
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
    loss = net(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


OPTIMIZERS = {
    "ours": lambda p: AdamW(p, lr=0.01),
    "torch AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW, lr in a tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_loaded_run_goes_on_bit_for_bit(tmp_path, kind):
    net = model()
    optimizer = OPTIMIZERS[kind](net.parameters())
    for seed in range(3):
        step(net, optimizer, seed)
    save_checkpoint(net, optimizer, 3, tmp_path / "c", extra={"note": [1, None, 0.1]})
    ahead = [step(net, optimizer, seed) for seed in range(3, 6)]

    net = model()
    optimizer = OPTIMIZERS[kind](net.parameters())
    assert load_checkpoint(tmp_path / "c", net, optimizer) == 3
    assert read_extra(tmp_path / "c") == {"note": [1, None, 0.1]}
    assert [step(net, optimizer, seed) for seed in range(3, 6)] == ahead


@pytest.mark.parametrize("place", ["memory", "file"])
def test_file_objects(tmp_path, place):
    net, other = model(), model()
    optimizer, resumed = AdamW(net.parameters()), AdamW(other.parameters())
    step(net, optimizer, 0)
    with io.BytesIO() if place == "memory" else open(tmp_path / "c", "w+b") as file:
        assert save_checkpoint(net, optimizer, 3, file) is None
        file.seek(0)
        assert load_checkpoint(file, other, resumed) == 3
        assert step(other, resumed, 1) == step(net, optimizer, 1)
        with pytest.raises(ValueError, match=r"^checkpoint the file object does not fit the model"):
            load_checkpoint(file, model(width=9))
        file.truncate(100)
        with pytest.raises(ValueError, match="the file object holds no checkpoint"):
            load_checkpoint(file, other)


def test_errors_name_the_archive(tmp_path):
    """Not where it was unpacked."""
    file = tmp_path / "c.pt"
    with open(file, "wb") as archive:
        save_checkpoint(model(), None, 3, archive)
    with pytest.raises(ValueError, match=rf"^checkpoint {file} does not fit the model"):
        load_checkpoint(file, model(width=9))
    with pytest.raises(ValueError, match=rf"^checkpoint {file} was saved without an optimizer"):
        load_checkpoint(file, None, AdamW(model().parameters()))
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data[:-1] if name == MODEL else data)
    with pytest.raises(checkpoint.DamagedError, match=rf"^checkpoint {file} is damaged: {MODEL}"):
        load_checkpoint(file, model())


def test_archives_of_others_are_refused(tmp_path):
    whole = save_checkpoint(model(), None, 3, tmp_path / "c.pt").read_bytes()
    (tmp_path / "bomb.pt").write_bytes(whole)
    with zipfile.ZipFile(tmp_path / "bomb.pt", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(1 << 26))
    with pytest.raises(checkpoint.DamagedError, match=r"bomb\.pt would unpack to 67,[\d,]+ bytes"):
        load_checkpoint(tmp_path / "bomb.pt")
    place = whole.rindex(b"PK\5\6") + 16  # where the list of members begins, by the end of the file
    (tmp_path / "c.pt").write_bytes(whole[:place] + b"\xf0\xff\xff\x7f" + whole[place + 4 :])
    with pytest.raises(checkpoint.DamagedError, match=r"c\.pt holds no checkpoint"):
        load_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize(
    "change",
    [
        {"iteration": "3"},
        {"tied": []},
        {"tied": {"a": 3}},
        {"optimizer": 4},
        {"optimizer": {"numbers": {}}},
        {"optimizer": {"numbers": {"0": 1}, "groups": []}},
        {"optimizer": {"numbers": {}, "groups": [5]}},
        {"shards": {"model": [{"file": "../model.safetensors", "pieces": {}}]}},
    ],
    ids=repr,
)
def test_a_state_that_nobody_wrote_is_refused_whatever_its_checksum(tmp_path, change):
    net, optimizer = model(), AdamW(model().parameters())
    path = save_checkpoint(net, optimizer, 3, tmp_path / "c")
    state = json.loads((path / STATE).read_text()) | change
    state["checksums"][STATE] = checkpoint._text_digest(state)
    (path / STATE).write_text(json.dumps(state))
    with pytest.raises(checkpoint.DamagedError, match=rf"{path} cannot be read: {STATE}"):
        load_checkpoint(path, net, optimizer)


def test_options_that_an_optimizer_cannot_have_are_refused(tmp_path):
    net = model()
    optimizer = AdamW(net.parameters())
    path = save_checkpoint(net, optimizer, 3, tmp_path / "c")
    state = json.loads((path / STATE).read_text())
    state["optimizer"]["groups"][0]["betas"] = 5
    state["checksums"][STATE] = checkpoint._text_digest(state)
    (path / STATE).write_text(json.dumps(state))
    with pytest.raises(ValueError, match=f"{path} does not fit the optimizer"):
        load_checkpoint(path, net, optimizer)


def test_weights_alone(tmp_path):
    net, other = model(), model()
    assert save_checkpoint(net, None, 7, str(tmp_path / "c")) == tmp_path / "c"
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [MODEL, STATE]
    assert load_checkpoint(str(tmp_path / "c")) == load_checkpoint(tmp_path / "c", other) == 7
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="without an optimizer"):
        load_checkpoint(tmp_path / "c", other, AdamW(other.parameters()))


def test_tied_and_overlapping_tensors(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embedding.weight
            self.register_buffer("whole", torch.randn(6))
            self.register_buffer("part", self.whole[3:])
            self.register_buffer("across", self.whole.view(2, 3).T)
            self.register_buffer("none", torch.zeros(0, 3))

    net, other = Tied(), Tied()
    save_checkpoint(net, None, 0, tmp_path / "c")
    assert "head.weight" not in load_file(tmp_path / "c" / MODEL)
    load_checkpoint(tmp_path / "c", other)
    assert other.head.weight is other.embedding.weight
    for name, tensor in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_a_compiled_model_has_its_own_names(tmp_path):
    net = model()
    save_checkpoint(torch.compile(net), None, 0, tmp_path / "c")
    load_checkpoint(tmp_path / "c", model())
    load_checkpoint(tmp_path / "c", torch.compile(model()))


def test_saving_again_replaces(tmp_path):
    net = model()
    for iteration in (1, 2):
        save_checkpoint(net, None, iteration, tmp_path / "c")
    assert load_checkpoint(tmp_path / "c") == 2
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    (tmp_path / "empty").mkdir()
    save_checkpoint(net, None, 3, tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/file").write_text("mine")
    for occupied in ("file", "d"):
        with pytest.raises(FileExistsError, match="is not a checkpoint"):
            save_checkpoint(net, None, 1, tmp_path / occupied)


def full_disk(monkeypatch, call):
    """The given call of the writer raises what a full disk raises."""
    calls = {"save_file": checkpoint.save_file, "write_text": pathlib.Path.write_text, "sync": checkpoint.sync}
    count = dict.fromkeys(calls, 0)

    def wrap(name):
        def wrapped(*args, **kwargs):
            count[name] += 1
            if (name, count[name]) == call:
                raise OSError(28, os.strerror(28))
            return calls[name](*args, **kwargs)

        return wrapped

    monkeypatch.setattr(checkpoint, "save_file", wrap("save_file"))
    monkeypatch.setattr(checkpoint, "sync", wrap("sync"))
    monkeypatch.setattr(pathlib.Path, "write_text", wrap("write_text"))


@pytest.mark.parametrize("call", [("save_file", 1), ("save_file", 2), ("write_text", 1), ("sync", 1), ("sync", 4)])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, call):
    net = model()
    optimizer = AdamW(net.parameters())
    step(net, optimizer, 0)
    save_checkpoint(net, optimizer, 1, tmp_path / "c")
    save_checkpoint(net, optimizer, 1, tmp_path / "beside")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    step(net, optimizer, 1)
    with monkeypatch.context() as patch:
        full_disk(patch, call)
        with pytest.raises(OSError, match=r"c was not written \(.*No space left.*earlier checkpoints are whole"):
            save_checkpoint(net, optimizer, 2, tmp_path / "c")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert load_checkpoint(tmp_path / "c", net, optimizer) == 1
    save_checkpoint(net, optimizer, 2, tmp_path / "c")
    assert load_checkpoint(tmp_path / "c", net, optimizer) == 2


def test_a_write_that_the_system_refuses(tmp_path):
    """No mock: past the limit of a file's size every write fails, as on a full disk."""
    net, big = model(), nn.Linear(100, 1000)
    save_checkpoint(net, None, 1, tmp_path / "c")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"was not written \(.*File too large"):
            save_checkpoint(big, None, 2, tmp_path / "c")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    assert load_checkpoint(tmp_path / "c", net) == 1


def test_crash_between_the_two_renames(tmp_path, monkeypatch):
    net = model()
    save_checkpoint(net, None, 1, tmp_path / "c")
    (tmp_path / "c").rename(tmp_path / ".c.previous")  # what a kill there leaves, with .c.tmp
    (tmp_path / ".c.tmp").mkdir()
    assert load_checkpoint(tmp_path / "c", net) == 1
    save_checkpoint(net, None, 2, tmp_path / "c")
    assert load_checkpoint(tmp_path / "c", net) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_what_cannot_be_loaded_is_named(tmp_path):
    net = model()
    optimizer = AdamW(net.parameters())
    step(net, optimizer, 0)
    path = save_checkpoint(net, optimizer, 1, tmp_path / "c")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "torchs.pt")
    with pytest.raises(checkpoint.DamagedError, match=r"torchs\.pt holds no checkpoint: expected .*, with state\.json"):
        load_checkpoint(tmp_path / "torchs.pt")
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a checkpoint: it has no state\.json"):
        load_checkpoint(tmp_path / "nowhere", net)
    newest = save_checkpoint(net, optimizer, 1, tmp_path / "run/checkpoints/step_00000001")
    for above in (newest.parent, newest.parent.parent):
        with pytest.raises(FileNotFoundError, match=rf"is not a checkpoint: .*; did you mean {newest}\?"):
            load_checkpoint(above, net)
    with pytest.raises(ValueError, match=r"does not fit the model: (?s:.*)size mismatch"):
        load_checkpoint(path, model(width=9))
    with pytest.raises(ValueError, match="does not fit the optimizer"):
        load_checkpoint(path, net, AdamW([net[0].weight]))
    data = (path / OPTIMIZER).read_bytes()
    (path / OPTIMIZER).write_bytes(data[:-5])
    with pytest.raises(ValueError, match=r"is damaged: optimizer\.safetensors"):
        load_checkpoint(path, net, optimizer)
    (path / OPTIMIZER).unlink()
    with pytest.raises(ValueError, match=r"is damaged: optimizer\.safetensors"):
        load_checkpoint(path, net, optimizer)
    for text in ("{", "[]", "[" * 100_000, json.dumps({"format": 9})):
        (path / STATE).write_text(text)
        with pytest.raises(ValueError, match=r"cannot be read: state\.json"):
            load_checkpoint(path)


def test_state_that_is_no_tensor_is_refused(tmp_path):
    net = model()
    optimizer = torch.optim.LBFGS(net.parameters())

    def closure():
        loss = net(torch.randn(16, 4)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(TypeError, match="cannot save the optimizer's"):
        save_checkpoint(net, optimizer, 1, tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_prune_keeps_the_newest(tmp_path):
    net = model()
    for iteration in (9, 10, 100):
        save_checkpoint(net, None, iteration, checkpoint.step_path(tmp_path, iteration))
    (tmp_path / "step_00000200").mkdir()  # not a checkpoint
    left = [tmp_path / f".step_00000300.{suffix}" for suffix in ("tmp", "previous")]  # by a writer that was killed
    for path in left:
        path.mkdir()
    assert [load_checkpoint(p) for p in list_checkpoints(tmp_path)] == [9, 10, 100]
    prune_checkpoints(tmp_path, keep=2)
    assert [load_checkpoint(p) for p in list_checkpoints(tmp_path)] == [10, 100]
    assert not any(path.exists() for path in left)
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_random_numbers_continue():
    state = json.loads(json.dumps(checkpoint.rng_state()))
    first = torch.rand(5)
    checkpoint.set_rng_state(state)
    assert torch.equal(torch.rand(5), first)


def test_files_and_paths_are_one_thing(tmp_path):
    """What a file object holds is read by its path, and what a path with a suffix holds by a file object."""
    net, other = model(), model()
    optimizer, resumed = AdamW(net.parameters()), AdamW(other.parameters())
    step(net, optimizer, 0)
    with open(tmp_path / "by_file.pt", "wb") as file:
        save_checkpoint(net, optimizer, 3, file, extra={"a": 1})
    save_checkpoint(net, optimizer, 3, tmp_path / "by_path.pt", extra={"a": 1})
    for name in ("by_file.pt", "by_path.pt"):
        assert load_checkpoint(tmp_path / name, other, resumed) == 3
        assert read_extra(str(tmp_path / name)) == {"a": 1}
        with open(tmp_path / name, "rb") as file:
            assert load_checkpoint(file, other, resumed) == 3
    assert step(other, resumed, 1) == step(net, optimizer, 1)
    save_checkpoint(net, optimizer, 4, tmp_path / "by_file.pt")
    assert load_checkpoint(tmp_path / "by_file.pt") == 4
    (tmp_path / "mine.pt").write_text("precious")
    with pytest.raises(FileExistsError, match="is not a checkpoint"):
        save_checkpoint(net, optimizer, 3, tmp_path / "mine.pt")
    with pytest.raises(ValueError, match=r"mine\.pt holds no checkpoint"):
        load_checkpoint(tmp_path / "mine.pt")


def test_errors_name_the_archive_and_not_where_it_is_unpacked(tmp_path):
    net = model()
    path = save_checkpoint(net, None, 1, tmp_path / "c.pt")
    for wanted, name in ((path, re.escape(str(path))), (io.BytesIO(path.read_bytes()), "the file object")):
        with pytest.raises(ValueError, match=f"checkpoint {name} does not fit the model"):
            load_checkpoint(wanted, model(width=64))
        with pytest.raises(ValueError, match=f"checkpoint {name} was saved without an optimizer"):
            load_checkpoint(wanted, net, AdamW(net.parameters()))


@pytest.mark.parametrize(
    ("iteration", "extra", "error"),
    [
        (-1, {}, "iteration must be a whole number"),
        (1.5, {}, "iteration"),
        (None, {}, "iteration must"),
        (1, {"a": object()}, "extra must be JSON"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_is_written(tmp_path, iteration, extra, error):
    with pytest.raises((ValueError, TypeError), match=error):
        save_checkpoint(model(), None, iteration, tmp_path / "c", extra=extra)
    assert not list(tmp_path.iterdir())


def test_damage_that_leaves_the_form_whole_is_found(tmp_path):
    net = model(width=64)
    for name in ("c", "c.pt"):
        path = save_checkpoint(net, None, 1, tmp_path / name)
        file = path / MODEL if path.is_dir() else path
        with file.open("r+b") as stream:
            stream.seek(file.stat().st_size // 2)
            stream.write(b"\xff" * 64)
        before = {k: v.clone() for k, v in net.state_dict().items()}
        with pytest.raises(checkpoint.DamagedError, match=r"is not what was written|holds no checkpoint"):
            load_checkpoint(path, net)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_the_models_configuration_is_kept(tmp_path):
    config = TransformerConfig(vocab_size=32, context_length=8, num_layers=1, d_model=16, num_heads=2)
    save_checkpoint(Transformer(config), None, 1, tmp_path / "c")
    assert checkpoint.read_model_config(tmp_path / "c", TransformerConfig) == config
    save_checkpoint(model(), None, 1, tmp_path / "d")
    assert checkpoint.read_model_config(tmp_path / "d", TransformerConfig) is None


def test_format_1_is_read_and_a_later_one_refused(tmp_path):
    old = pathlib.Path(__file__).parent / "fixtures/run_before/checkpoints/step_00000004"
    config = TransformerConfig(vocab_size=32, context_length=8, num_layers=1, d_model=8, num_heads=2)
    net = Transformer(config)
    assert load_checkpoint(old, net, AdamW(param_groups(net, 0.1))) == 4
    assert checkpoint.read_model_config(old, TransformerConfig) is None
    save_checkpoint(net, None, 1, tmp_path / "c")
    state = json.loads((tmp_path / "c" / STATE).read_text())
    (tmp_path / "c" / STATE).write_text(json.dumps(state | {"format": 3}))
    with pytest.raises(ValueError, match="format 3, expected 1 or 2"):
        load_checkpoint(tmp_path / "c")
