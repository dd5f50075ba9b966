"""What to train: the sizes, hours and bytes that a plan promises, and that `cs336 train` takes it."""

import itertools
import pathlib

import numpy as np
import pytest

from cs336.cli import main
from cs336.models import TransformerConfig
from cs336.parallel.hardware import GPUS
from cs336.scaling import EPOCH, EPOCH_FIT, DataConstrainedLaw, step_law
from cs336.scaling.run_plan import LEAST_STEPS, MOST_EPOCHS, caution, fastest, plan_run, shapes
from cs336.training.config import TrainConfig
from cs336.training.fit import Numerics, predicted_memory
from cs336.utils.shards import ShardWriter

DUMP = 15e12 / 96  # tokens of one of FineWeb's 96 dumps
WEEKS = 14 * 86400.0
DOCS = pathlib.Path(__file__).parents[2] / "docs/scaling.md"
DAY = 86400.0


@pytest.fixture(scope="module")
def dump():
    """A Common Crawl dump and 32 H100s for two weeks."""
    return plan_run(DUMP, WEEKS, gpus=32, gpu="H100")


def test_a_common_crawl_dump_and_32_h100s_for_two_weeks(dump):
    best = dump[0]
    seconds = best.parallel.seconds
    share = seconds["compute"] / sum(seconds.values())  # the rest is copies and what is sent behind nothing
    assert 0.94 < share < 1
    flops = 32 * GPUS["H100"].flops * GPUS["H100"].efficiency * share * WEEKS
    assert best.tokens * best.model.flops_per_token() == pytest.approx(flops, rel=0.01)
    assert best.training_seconds == pytest.approx(WEEKS, rel=0.01)
    assert best.training_seconds <= WEEKS
    unlimited = DataConstrainedLaw(EPOCH, DUMP).optimum(flops)
    assert best.parameters == pytest.approx(unlimited.parameters, rel=0.4)  # 6 N D leaves out attention
    assert best.loss == pytest.approx(unlimited.loss, rel=0.005)
    assert 1 < best.epochs < 3
    assert best.parallel.memory.total < 0.9 * GPUS["H100"].memory
    rate, batch = step_law(best.model.num_parameters(embeddings=False), best.tokens)
    assert best.lr == pytest.approx(rate, rel=0.01)
    assert batch / 2 < best.batch_size * 2048 < 2 * batch
    assert [p.loss for p in dump] == sorted(p.loss for p in dump)
    assert all(p.parallel.fits for p in dump)
    assert caution(best) is None


def test_the_example_of_the_docs_is_what_is_printed(capsys):
    command = "plan run --tokens 1.56e11 --time 14d --gpu H100 --gpus 32 --top 5"
    assert main(command.split()) == 0
    said = capsys.readouterr().out
    text = DOCS.read_text()
    assert f"cs336 {command}\n" in text
    assert said.strip() in text


def test_the_trainer_agrees_that_it_fits(dump, tmp_path):
    for made in dump[:6]:
        made.config(tmp_path / "run", tmp_path / "tokens").save(tmp_path / "config.toml")
        config = TrainConfig.from_toml(tmp_path / "config.toml")
        assert config.model == made.model
        assert config.parallel.share(32, config.batch_size, config.micro_batch_size) * 32 == made.batch_size
        recompute = config.gradient_checkpointing
        need = predicted_memory(config, Numerics(4, 2, True), recompute, config.micro_batch_size, 32)
        assert need.total <= made.parallel.memory.total  # which the planner rounds up by its norms


def test_what_is_served_moves_the_optimum():
    free, served, more = (plan_run(1e12, DAY, gpu="H100", inference_tokens=n)[0] for n in (0, 1e10, 1e11))
    assert free.parameters > served.parameters > more.parameters
    assert free.loss < served.loss < more.loss
    assert more.tokens / more.parameters > 2 * free.tokens / free.parameters
    rate = GPUS["H100"].flops * GPUS["H100"].efficiency
    assert more.serving_seconds == pytest.approx(1e11 * more.model.flops_per_token() / 3 / rate)
    assert more.training_seconds + more.serving_seconds == pytest.approx(DAY, rel=0.01)


def test_scarce_data_are_repeated_and_then_time_is_left():
    plenty, scarce, least = (plan_run(n, DAY, gpu="H100")[0] for n in (1e12, 2e9, 1e7))
    assert plenty.epochs < 1
    assert 1 < scarce.epochs < MOST_EPOCHS
    assert scarce.loss > plenty.loss
    assert least.epochs == pytest.approx(MOST_EPOCHS, rel=0.01)
    assert least.training_seconds < DAY / 10
    assert scarce.loss == pytest.approx(float(DataConstrainedLaw(EPOCH, 2e9).loss(scarce.parameters, scarce.tokens)))


def test_the_interval_is_that_of_the_laws_end():
    loss, (low, high) = EPOCH_FIT.predict(1e10, 2e11)
    assert loss == pytest.approx(float(EPOCH.loss(1e10, 2e11)))
    assert (loss - low, high - loss) == pytest.approx((1.96 * 0.03, 1.96 * 0.03), rel=0.03)
    repeated, (low, high) = EPOCH_FIT.predict(1e10, 2e11, unique_tokens=1e10)
    assert low < repeated < high
    assert repeated > loss


def test_more_gpus_are_less_loss_and_a_batch_that_divides():
    one, three = (plan_run(1e11, DAY / 4, gpus=n, gpu="H100")[0] for n in (1, 3))
    assert three.loss < one.loss
    assert three.batch_size % 3 == 0
    assert min(one.steps, three.steps) >= LEAST_STEPS


def test_shapes_rise_and_their_heads_divide():
    models = list(shapes(1024, 64))
    sizes = [model.num_parameters() for model in models]
    assert sizes == sorted(set(sizes))
    assert all(model.d_model == model.num_heads * model.head_size for model in models)
    assert max(b / a for a, b in itertools.pairwise(sizes[20:])) < 1.5


def test_of_layouts_as_fast_the_largest_micro_batch():
    model = TransformerConfig(1024, 64, 4, 256, 4)
    assert fastest(model, 2, GPUS["H100"], 32).layout.micro_batch == 16
    assert not fastest(TransformerConfig(1024, 64, 100, 16384, 128), 1, GPUS["H100"], 1).fits


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data_tokens": 0.0}, "data_tokens must be positive"),
        ({"seconds": float("nan")}, "seconds must be positive"),
        ({"inference_tokens": -1.0}, "inference_tokens must be finite"),
        ({"gpus": 0}, "gpus must be 1 or more"),
        ({"gpu": "H1"}, "gpu must be one of"),
        ({"data_tokens": 100.0}, "no model trains for 100 steps"),
        ({"inference_tokens": 1e18}, "no model trains for 100 steps"),
    ],
)
def test_what_is_not_possible(values, message):
    with pytest.raises(ValueError, match=message):
        plan_run(**({"data_tokens": 1e10, "seconds": 3600.0, "gpus": 1} | values))


def test_a_plan_made_here_trains_here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with ShardWriter("tokens", tokenizer="0" * 64, vocab_size=64, eot_id=0) as writer:
        writer.write(np.random.default_rng(0).integers(1, 64, 8_000), documents=1)
    plan = "plan run --data tokens --time 2m --context-length 16 --write config.toml --run-dir run --top 1"
    assert main(plan.split()) == 0
    said = capsys.readouterr()
    assert "1 x " in said.out
    assert "cs336 train --config config.toml" in said.out
    assert "the published law is of 7e+07" in said.err
    steps = int(TrainConfig.from_toml("config.toml").budget.removesuffix("steps"))
    assert main(["train", "--config", "config.toml", "--device", "cpu", "--compile", "false"]) == 0
    assert f"{steps:,} steps" in capsys.readouterr().out.replace(f"{steps} steps", f"{steps:,} steps")


def test_money_is_time(capsys):
    verb = ["plan", "run", "--tokens", "1e10", "--gpu", "H100", "--gpus", "2", "--top", "1"]
    assert main([*verb, "--time", "10h"]) == 0
    timed = capsys.readouterr().out
    assert main([*verb, "--dollars", "40", "--dollars-per-gpu-hour", "2"]) == 0
    assert capsys.readouterr().out == timed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--time 1d --gpu H100", "say how much data there is"),
        ("--tokens 1e9 --gpu H100", "say --time 14d, or --dollars"),
        ("--tokens 1e9 --gpu H100 --dollars 5", "say --time 14d, or --dollars"),
        ("--tokens 1e9 --gpu H100 --time 5steps", "time must be like 14d"),
        ("--tokens 1e9 --gpu H100 --time 1d --efficiency 2", "efficiency must be in"),
        ("--tokens 1e9 --gpu H100 --time 1d --gpus 0", "gpus must be 1 or more"),
        ("--tokens 1e9 --gpu H100 --time 1d --top 0", "top must be 1 or more"),
    ],
)
def test_what_the_verb_refuses_is_a_sentence(options, message, capsys):
    assert main(["plan", "run", *options.split()]) == 2
    assert message in capsys.readouterr().err
