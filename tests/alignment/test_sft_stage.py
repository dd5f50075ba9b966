"""`cs336 sft`: what it learns, what it refuses, and that a run goes on where it was killed."""

import json
import shutil

import pytest
import torch
from killing import check_a_killed_run_repeats_itself
from tiny_policy import TEMPLATE, digits, rows_of, save_model, tokenizer, write_rows

from cs336.alignment.batches import Batches, pad_examples
from cs336.alignment.examples import encode_completion, read_examples
from cs336.alignment.lora import LoRAConfig, apply_lora
from cs336.alignment.run import StageRun
from cs336.alignment.sft import Example
from cs336.alignment.stage import SMALL, Policy, slow_rate
from cs336.alignment.stages.sft import SFTConfig, SFTStage
from cs336.cli.program import main
from cs336.inference import LLM, SamplingParams
from cs336.inference.chat import ChatTemplate
from cs336.inference.quantization import compress
from cs336.models import BlockConfig, Transformer, from_pretrained
from cs336.nn import AttentionConfig, MoEConfig
from cs336.training import decisions
from cs336.training.run_dir import RunDir
from cs336.utils import config as configs

END = tokenizer().special_tokens["<|endoftext|>"]


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model")


def config(tmp_path, model, **options):
    data = {"train": digits(tmp_path / "train.jsonl"), "val": digits(tmp_path / "val.jsonl")}
    table = {"run_dir": tmp_path / "run", "init_from": model, "data": data, "budget": "60steps", "device": "cpu"}
    table |= {"optimizer": {"lr": 1e-2, "weight_decay": 0.0}, "batch_size": 2, "seed": 3}
    return configs.parse(SFTConfig, table | options)


def run(settings):
    return StageRun(settings, SFTStage(settings)).train()


@pytest.mark.parametrize("options", [{}, {"lora": {"rank": 2}}])
def test_the_last_save_is_planned_for_before_one_was_measured(tmp_path, model, monkeypatch, options):
    """Ten steps a second, and 2 s for what a checkpoint holds."""
    settings = config(tmp_path, model, budget="12s", checkpoint_interval=0, **options)
    stage = SFTStage(settings)
    saved = 4 * 3 * sum(p.numel() for p in stage.module.parameters())  # weights and AdamW's moments
    monkeypatch.setattr(decisions, "SAVED_PER_SECOND", saved / 2)
    planned, step = StageRun(settings, stage).decisions, 0
    while not planned.finished(step):
        step += 1
        planned.observe(step, 0.1 * step)
    assert step == pytest.approx(100, abs=3)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("2steps", "run has done 4 steps, and a budget of 2steps makes 2: give a larger budget"),
        ("0.001s", "longer than the budget of 0.001s: give a larger budget"),
    ],
)
def test_a_budget_that_is_used_up_already_is_refused(tmp_path, model, budget, message):
    run(config(tmp_path, model, budget="4steps"))
    exported = (tmp_path / "run/export/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=message):
        run(config(tmp_path, model, budget=budget))
    assert (tmp_path / "run/export/model.safetensors").read_bytes() == exported
    assert not (tmp_path / "run/failure.json").exists()
    assert run(config(tmp_path, model, budget="4steps")).step == 4
    assert run(config(tmp_path, model, budget="5steps")).step == 5


@pytest.mark.parametrize("batching", ["packed", "bucketed"])
def test_a_model_learns_to_answer_and_to_stop(tmp_path, model, batching):
    size = {"packed": 2, "bucketed": 10}[batching]
    result = run(config(tmp_path, model, batching=batching, batch_size=size, micro_batch_size=2))
    assert result.finished
    assert result.metrics["val/loss"] < 0.05
    llm = LLM(result.export, device="cpu", quiet=True)
    outputs = llm.chat([[{"role": "user", "content": str(d)}] for d in range(10)], SamplingParams(0, max_tokens=8))
    assert [(o.text, o.finish_reason) for o in outputs] == [(str(d), "stop") for d in range(10)]
    rows = rows_of(tmp_path / "run")
    assert next(row["val/loss"] for row in rows if "val/loss" in row) > 1
    samples = rows_of(tmp_path / "run", "samples.jsonl")
    assert {sample["step"] for sample in samples} >= {0, 60}
    assert samples[-1]["prompt"] == "3="
    assert samples[-1]["text"] == "3"


def test_validation_is_without_what_routers_add(tmp_path):
    block = BlockConfig(AttentionConfig(2), MoEConfig(4, 2, balance_loss=0.5))
    stage = SFTStage(config(tmp_path, save_model(tmp_path / "model", num_heads=None, layers=(block,)), sample_tokens=1))
    token_ids_BS, targets_BS, segments_BS = pad_examples(stage.val)
    with torch.no_grad():
        logits_BSV = stage.policy.model.eval()(token_ids_BS, segments=segments_BS)
    want = torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten())
    assert stage.evaluate().metrics["val/loss"] == pytest.approx(want.item(), rel=1e-4)


def test_its_run_directory_is_evaluated_on_text(tmp_path, model, capsys):
    run(config(tmp_path, model, budget="2steps"))
    (tmp_path / "text.txt").write_text("0123456789 " * 40)
    for place in ("run", "run/export"):
        assert main(["evaluate", str(tmp_path / place), "--text", str(tmp_path / "text.txt")]) == 0
        assert "this model" in capsys.readouterr().out
    assert (tmp_path / "run/evaluation.json").exists()
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert "has no validation data of its own: give text" in capsys.readouterr().err


def test_plain_completions_are_learned_too(tmp_path, model):
    rows = [{"prompt": f"{d}?", "completion": str(9 - d)} for d in range(10)]
    data = {"train": write_rows(tmp_path / "plain.jsonl", rows)}
    result = run(config(tmp_path, model, data=data, budget="80steps", batch_size=3))
    llm = LLM(result.export, device="cpu", quiet=True)
    outputs = llm.generate([f"{d}?" for d in range(10)], SamplingParams(0, max_tokens=8))
    assert [o.text for o in outputs] == [str(9 - d) for d in range(10)]


def test_a_small_model_at_the_default_rate_begins_with_a_hint(tmp_path, model, capsys):
    """And goes on without one, as it begins at another rate."""
    for budget, lr, hinted in (("1steps", {}, True), ("2steps", {}, False), ("1steps", {"lr": 2e-5}, False)):
        run(config(tmp_path, model, budget=budget, optimizer=lr, run_dir=tmp_path / str(lr)))
        said = " ".join("".join(capsys.readouterr()).split())
        assert ("at which 5,552 learn slowly: try --optimizer.lr 0.001" in said) == hinted
    settings = config(tmp_path, model, optimizer={})
    assert slow_rate(settings, SMALL) is None
    assert str(slow_rate(settings, SMALL - 1)).endswith("--optimizer.lr 0.0001")


def test_without_a_template_turns_end_as_the_models_texts_do(tmp_path, model):
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (model / name).unlink(missing_ok=True)
    assert "<|im_end|>" not in tokenizer().special_tokens
    policy = Policy(config(tmp_path, model))
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "1"}]
    written = policy.template.render(turns, add_generation_prompt=False)
    assert written.endswith("<|im_start|>assistant\n1<|endoftext|>\n")
    assert ChatTemplate(policy.model.chat_template).render(turns, add_generation_prompt=False) == written


def test_adapters_learn_and_the_rest_stays(tmp_path, model):
    settings = config(tmp_path, model, lora={"rank": 8}, budget="150steps", optimizer={"lr": 3e-2, "weight_decay": 0.0})
    stage = SFTStage(settings)
    before = {name: p.clone() for name, p in stage.policy.model.named_parameters()}
    result = StageRun(settings, stage).train()
    for name, p in stage.policy.model.named_parameters():
        assert torch.equal(p, before[name]) == ("lora_" not in name)
    assert result.metrics["val/loss"] < 0.7 * rows_of(tmp_path / "run")[0]["val/loss"]
    llm = LLM(result.export, device="cpu", quiet=True)
    ids = torch.tensor([tokenizer().encode("3=3")])
    with torch.no_grad():
        stage.policy.model.eval()
        torch.testing.assert_close(llm.model(ids), stage.policy.model(ids), rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name, _ in llm.model.named_parameters())
    alone = LLM(result.export.parent / "adapter", device="cpu", quiet=True)  # with the tokenizer of its base
    torch.testing.assert_close(alone.model.state_dict(), llm.model.state_dict(), rtol=1e-5, atol=1e-6)
    assert alone.model.end_ids == llm.model.end_ids
    assert alone.chat_template.render([{"role": "user", "content": "1"}]) == llm.chat_template.render(
        [{"role": "user", "content": "1"}]
    )
    assert alone.encode(["3=3"]) == llm.encode(["3=3"])


@pytest.mark.parametrize("options", [{}, {"lora": {"rank": 2}}])
def test_a_quantised_model_which_would_not_learn_is_refused(tmp_path, model, options):
    compress(model, tmp_path / "int8", "int8", 8)
    with pytest.raises(ValueError, match="int8 is quantised, and its weights would not learn: give the model"):
        run(config(tmp_path, tmp_path / "int8", **options))
    with pytest.raises(ValueError, match="adapt the model that it was made of"):
        apply_lora(from_pretrained(tmp_path / "int8"), LoRAConfig())


def test_a_killed_run_repeats_itself_bit_for_bit(tmp_path, model):
    options = {"log_interval": 3, "checkpoint_interval": 4, "eval_interval": 10, "lora": {"rank": 2}}
    check_a_killed_run_repeats_itself(SFTStage, config(tmp_path, model, **options))
    a, b = ((tmp_path / name / "export" / "model.safetensors").read_bytes() for name in ("run", "killed"))
    assert a == b


def test_rows_of_a_run_that_was_killed_before_its_first_checkpoint(tmp_path, model, capsys):
    settings = config(tmp_path, model, budget="2steps")
    (tmp_path / "run").mkdir()
    write_rows(tmp_path / "run" / "metrics.jsonl", [{"step": 0, "val/loss": 9.0}, {"step": 1, "train/loss": 9.0}])
    run(settings)
    assert f"{tmp_path}/run: 1 step of a run that ended before its first" in " ".join(capsys.readouterr().out.split())
    assert [row["step"] for row in rows_of(tmp_path / "run") if "val/loss" in row] == [0, 1, 2]
    assert all(row.get("val/loss") != 9.0 != row.get("train/loss") for row in rows_of(tmp_path / "run"))


def test_a_loss_that_is_not_finite_ends_the_run_and_says_so(tmp_path, model, capsys):
    path = tmp_path / "sft.toml"
    optimizer = {"lr": 1e30, "max_grad_norm": float("inf")}
    path.write_text(configs.dumps(config(tmp_path, model, optimizer=optimizer, checkpoint_interval=1)))
    assert main(["sft", "--config", str(path)]) == 2
    assert "not finite" in capsys.readouterr().err
    failure = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert failure["error"] == "NonFiniteError"
    assert failure["step"] > 1
    assert failure["checkpoint"].endswith(f"step_{failure['step'] - 1:08d}")


def test_a_run_goes_on_as_itself_alone(tmp_path, model):
    run(config(tmp_path, model, budget="2steps"))
    assert run(config(tmp_path, model, budget="3steps")).step == 3
    with pytest.raises(ValueError, match=r"another configuration \(seed: 3 -> 4\)"):
        run(config(tmp_path, model, seed=4))
    write_rows(tmp_path / "other.jsonl", [{"prompt": "1", "completion": "2"}])
    with pytest.raises(ValueError, match=r"another data\.train"):
        run(config(tmp_path, model, data={"train": tmp_path / "other.jsonl"}))
    with pytest.raises(ValueError, match="another init_from"):
        run(config(tmp_path, save_model(tmp_path / "second", seed=1)))
    facts = tmp_path / "run" / "run.json"
    with pytest.raises(ValueError, match="holds a run of `cs336 sft`: use another run_dir"):
        RunDir(tmp_path / "run", 1).saved_config()
    facts.write_text(facts.read_text().replace('"stage": "sft"', '"stage": "dpo"'))
    with pytest.raises(ValueError, match="holds a run of `cs336 dpo`: use another run_dir"):
        run(config(tmp_path, model, budget="4steps"))
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(ValueError, match="holds a run of `cs336 dpo`: use another run_dir"):
        run(config(tmp_path, model, budget="3steps"))
    facts.write_text(facts.read_text().replace('"stage": "dpo"', '"stage": "sft"'))
    with pytest.raises(ValueError, match=r"holds a finished model, .*export, and no checkpoint"):
        run(config(tmp_path, model, budget="3steps"))
    shutil.rmtree(tmp_path / "run/export")
    assert run(config(tmp_path, model, budget="3steps")).step == 3
    for torn in ("[1]", "{", ""):
        facts.write_text(torn)
        assert run(config(tmp_path, model, budget="3steps")).step == 3


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (TEMPLATE.replace("={{ m.content }}<|endoftext|>", ""), "drops or rewrites message 1"),
        (
            TEMPLATE.replace("<|endoftext|>", ""),
            r"no token ends message 1, the assistant's: expected '<\|endoftext\|>' at the end of '",
        ),
    ],
)
def test_templates_that_teach_nothing_good(tmp_path, model, template, message):
    (tmp_path / "template.jinja").write_text(template)
    with pytest.raises(ValueError, match=rf"train\.jsonl:1: .*{message}"):
        SFTStage(config(tmp_path, model, chat_template=str(tmp_path / "template.jinja")))


def test_a_tokenizer_of_another_model(tmp_path, model):
    other = tokenizer()
    path = tmp_path / "tokenizer.json"
    type(other)({i: bytes([c]) for i, c in enumerate(b"ab")}, [], ["<|endoftext|>"]).save(path)
    with pytest.raises(ValueError, match="is not the one that lies with the model"):
        SFTStage(config(tmp_path, model, tokenizer=str(path)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": "1"}]}, "no message is the assistant's"),
        ({"messages": []}, "expected a list of"),
        ({"prompt": "1", "completion": ""}, "must not be empty"),
        ({"prompt": "1"}, '"completion" must be text'),
        ({"text": "1"}, 'expected "messages", or "prompt" and "completion"; the line has text'),
        ([1], "expected a JSON object"),
        ({"prompt": "1", "completion": "2" * 30}, r"1 of 1 examples are longer than 24 tokens"),
    ],
)
def test_examples_that_are_none(tmp_path, model, row, message):
    data = {"train": write_rows(tmp_path / "bad.jsonl", [row])}
    with pytest.raises(ValueError, match=message):
        SFTStage(config(tmp_path, model, data=data))


def test_long_examples_are_dropped_if_so_asked(tmp_path, model):
    rows = [{"prompt": "1", "completion": "2" * n} for n in (3, 30)]
    data = {"train": write_rows(tmp_path / "long.jsonl", rows)}
    stage = SFTStage(config(tmp_path, model, data=data, too_long="drop"))
    assert stage.num_examples == 1
    assert "1 longer ones are dropped" in stage.describe()


def test_a_batch_is_an_examples_turn_once_an_epoch():
    lengths = [(7 * i) % 50 + 1 for i in range(1000)]
    for bucketed in (False, True):
        batches = Batches(lengths, 8, seed=1, bucketed=bucketed)
        first, second = ([batches.batch(e * 125 + i) for i in range(125)] for e in (0, 1))
        assert sorted(i for b in first for i in b) == sorted(i for b in second for i in b) == list(range(1000))
        assert first != second
        assert Batches(lengths, 8, seed=1, bucketed=bucketed).batch(130) == second[5]
        spread = sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in first) / 125
        assert (spread < 3) == bucketed
        assert sorted(first) != first
    with pytest.raises(ValueError, match="no examples"):
        Batches([], 8)


def test_padding_is_no_part_of_an_example():
    ids, targets, segments = pad_examples([Example([1, 2, 3], [False, True, True]), Example([4, 5], [False, True])])
    assert ids.tolist() == [[1, 2, 3], [4, 5, 0]]
    assert targets.tolist() == [[2, 3, -100], [5, -100, -100]]
    assert segments.tolist() == [[0, 0, 0], [0, 0, -1]]


def test_a_completion_ends_once():
    ours = tokenizer()
    assert encode_completion("1", "2", ours, [END]).token_ids == [1, 2, END]
    assert encode_completion("1", "2<|endoftext|>", ours, [END]).token_ids == [1, 2, END]
    assert encode_completion("1", "2", ours, [END]).mask == [False, True, True]
    with pytest.raises(ValueError, match="no token ends a completion"):
        encode_completion("1", "2", ours, [])


def test_errors_name_the_line(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "1", "completion": "2"}])
    path.write_text(path.read_text() + "\n{broken\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:3: expected a JSON object"):
        read_examples(path, tokenizer(), ChatTemplate(TEMPLATE), [END])


def test_the_verb(tmp_path, model, capsys):
    path = tmp_path / "sft.toml"
    path.write_text(configs.dumps(config(tmp_path, model, budget="4steps")))
    assert main(["sft", "--config", str(path), "--budget", "2steps", "--print-config"]) == 0
    assert 'budget = "2steps"' in capsys.readouterr().out
    assert main(["sft", "--config", str(path)]) == 0
    assert (tmp_path / "run" / "report.html").exists()
    assert main(["sft", "--help"]) == 0
    assert "--lora.rank int" in capsys.readouterr().out
    assert main(["sft", "--config", str(path), "--lora.targets", "nothing", "--run-dir", str(tmp_path / "b")]) == 2
    assert "name no linear layer" in capsys.readouterr().err
    assert main(["sft", "--config", str(path), "--budget", "3Mtok"]) == 2
    assert "steps or time" in capsys.readouterr().err


def test_a_model_s_scales_of_the_learning_rate_hold(tmp_path, model, monkeypatch):
    monkeypatch.setattr(Transformer, "lr_scales", lambda self: {"layers.0.mlp.down_proj.weight": 0.5})
    settings = config(tmp_path, model, budget="2steps")
    stage = SFTStage(settings)
    StageRun(settings, stage).train()
    rates = {group["lr_scale"]: group["lr"] for group in stage.optimizer.param_groups}
    assert rates[0.5] == rates[1.0] / 2 > 0
