"""The counts that `cs336 model info` prints are the model's."""

import pytest

from benchmarks.end_to_end.variants import MIXERS, VARIANTS
from cs336.cli.program import main
from cs336.models import Transformer, TransformerConfig, save_pretrained
from cs336.models.info import parts, table
from cs336.utils.config import dumps

CONFIG = TransformerConfig(64, 32, num_layers=3, d_model=32, num_heads=4)


@pytest.mark.parametrize("name", VARIANTS | MIXERS)
def test_parts_add_up_to_the_model(name):
    config = (VARIANTS | MIXERS)[name]
    *layers, total = parts(config, width=4, tokens=32)
    assert total.parameters == config.num_parameters()
    assert 3 * total.flops == config.flops_per_token()
    assert total.activation_bytes == config.activation_bytes(4)
    assert total.state_bytes == config.state_bytes(width=4)
    assert len(layers) == config.num_layers + 2


def test_the_roofline_is_the_slower_of_two():
    (_, layer, *_) = parts(CONFIG, width=2, tokens=320)
    assert layer.seconds(320, 1e12, 1e15) == layer.flops * 320 / 1e12
    assert layer.seconds(320, 1e18, 1e9) == layer.moved_bytes / 1e9
    assert layer.moved_bytes == 2 * (layer.parameters + 2 * 320 * 32)
    assert layer.seconds(320, None, 1e9) is None


def test_layers_that_are_alike_share_a_line():
    lines = table(CONFIG, peak_flops=1e12, bandwidth=1e11).splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "embedding",
        "layers 0-2 (attention, swiglu), each",
        "norm and head",
        "total",
    ]
    assert f"{CONFIG.num_parameters():,}" in lines[-1]


@pytest.mark.parametrize("what", ["model.toml", "run.toml", "export"])
def test_the_command(tmp_path, capsys, what):
    path = tmp_path / what
    if what == "export":
        save_pretrained(Transformer(CONFIG), path)
    elif what == "run.toml":
        path.write_text("budget = '1steps'\n[model]\n" + dumps(CONFIG))
    else:
        path.write_text(dumps(CONFIG))
    assert main(["model", "info", str(path), "--device", "cpu", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert f"{CONFIG.num_parameters():,}" in out
    assert "forward of 1 x 32 tokens in float32 on cpu: roofs" in out


def test_a_file_that_is_no_model(tmp_path, capsys):
    (tmp_path / "a.toml").write_text("vocab_size = 3\nlayer = 2\n")
    assert main(["model", "info", str(tmp_path / "a.toml")]) == 2
    assert "a.toml: unknown key layer" in capsys.readouterr().err
