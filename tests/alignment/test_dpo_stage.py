"""`cs336 dpo`: that it learns what was preferred, with references that are kept."""

import pytest
import torch
from killing import check_a_killed_run_repeats_itself
from tiny_policy import outcomes, rows_of, save_model, tokenizer, write_rows

from cs336.alignment.examples import Turn
from cs336.alignment.pairs import PreferenceExample, read_preferences, write_preferences
from cs336.alignment.run import StageRun
from cs336.alignment.stages import dpo
from cs336.alignment.stages.dpo import DPOConfig, DPOStage, KTOStage, dpo_stage
from cs336.inference import LLM
from cs336.utils import config as configs

OURS = {"history": [{"role": "user", "content": "q"}], "response_a": "a", "response_b": "b", "chosen": "a"}


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model")


def preferences(path):
    """A digit is better answered by itself than by the next one; every other line has them the other way around."""
    examples = []
    for d in range(10):
        good, bad = str(d), str((d + 1) % 10)
        answers = (good, bad, "a") if d % 2 else (bad, good, "b")
        examples.append(PreferenceExample([Turn("user", str(d))], *answers))
    examples.append(PreferenceExample([Turn("user", "1")], "5", "6", "tie"))
    write_preferences(path, examples)
    assert read_preferences(path) == examples
    return path


def config(tmp_path, model, **options):
    data = {"train": preferences(tmp_path / "train.jsonl"), "val": preferences(tmp_path / "val.jsonl")}
    table = {"run_dir": tmp_path / "run", "init_from": model, "data": data, "budget": "40steps", "device": "cpu"}
    table |= {"optimizer": {"lr": 1e-2, "weight_decay": 0.0}, "batch_size": 5, "seed": 3}
    return configs.parse(DPOConfig, table | options)


def score(llm):
    """Log-probability of each digit after itself, over that of the next."""
    prompts = [f"{d}=" for d in range(10)]
    good = llm.score(prompts, [str(d) for d in range(10)])
    bad = llm.score(prompts, [str((d + 1) % 10) for d in range(10)])
    return [a[0].logprob - b[0].logprob for a, b in zip(good, bad, strict=True)]


@pytest.mark.parametrize("loss_type", ["sigmoid", "robust", "ipo", "hinge", "simpo", "orpo"])
def test_what_was_preferred_becomes_likelier(tmp_path, model, loss_type):
    options = {"label_smoothing": 0.1} if loss_type == "robust" else {}
    result = StageRun(config(tmp_path, model, loss_type=loss_type, **options), DPOStage(
        config(tmp_path, model, loss_type=loss_type, **options))).train()  # fmt: skip
    assert result.metrics["val/rewards/accuracies"] == 1
    assert min(score(LLM(result.export, device="cpu", quiet=True))) > 0
    assert min(score(LLM(model, device="cpu", quiet=True))) < 0
    first = rows_of(tmp_path / "run")[0]
    if loss_type not in ("simpo", "orpo"):  # the policy is the reference
        assert first["val/rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert (tmp_path / "run" / "reference.safetensors").exists() == (loss_type not in ("simpo", "orpo"))


def test_references_are_computed_once(tmp_path, model, monkeypatch):
    settings = config(tmp_path, model)
    first = DPOStage(settings).reference_N2
    calls = []
    own = dpo.answer_log_probs
    monkeypatch.setattr(dpo, "answer_log_probs", lambda *args, **kwargs: calls.append(args) or own(*args, **kwargs))
    assert torch.equal(DPOStage(settings).reference_N2, first)
    assert not calls
    assert not torch.equal(DPOStage(config(tmp_path, model, loss_type="ipo")).reference_N2, first)
    assert calls
    (tmp_path / "run" / "reference.safetensors").write_bytes(b"torn")
    assert torch.equal(DPOStage(settings).reference_N2, first)


def test_the_reference_is_that_of_plain_log_probs(tmp_path, model):
    stage = DPOStage(config(tmp_path, model))
    example = read_preferences(tmp_path / "train.jsonl")[3]
    assert (example.better, example.worse) == ("3", "4")
    end = tokenizer().special_tokens["<|endoftext|>"]
    for side, answer in enumerate((example.better, example.worse)):
        ids = torch.tensor([[*tokenizer().encode(f"3={answer}"), end]])
        log_probs = stage.policy.model(ids)[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        assert stage.reference_N2[3, side].item() == pytest.approx(log_probs[1:].sum().item(), rel=1e-4)  # after 3=


def test_a_killed_run_repeats_itself_bit_for_bit(tmp_path, model):
    options = {"checkpoint_interval": 3, "eval_interval": 7, "micro_batch_size": 2}
    check_a_killed_run_repeats_itself(DPOStage, config(tmp_path, model, **options))


@pytest.mark.parametrize(
    ("row", "history", "answers", "margin"),
    [
        (
            {"chosen": "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: 1\n2\n\nAssistant: a", "rejected":
             "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: 1\n2\n\nAssistant: b"},
            [("user", "hi"), ("assistant", "yes?"), ("user", "1\n2")], ("a", "b"), 0,
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, [("user", "q")], ("a", "b"), 0),
        (
            {"prompt": "q", "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
             "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}],
             "score_chosen": 8.5, "score_rejected": 6},
            [("user", "q")], ("a", "b"), 2.5,
        ),
        (
            {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
             "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]},
            [("user", "q")], ("a", "b"), 0,
        ),
        (
            {"history": [{"role": "user", "content": "q"}], "response_a": "b", "response_b": "a", "chosen": "b"},
            [("user", "q")], ("a", "b"), 0,
        ),
    ],
)  # fmt: skip
def test_forms_of_preferences(tmp_path, row, history, answers, margin):
    (found,) = read_preferences(write_rows(tmp_path / "rows.jsonl", [row]))
    assert [(turn.role, turn.content) for turn in found.history] == history
    assert (found.better, found.worse, found.margin) == (*answers, margin)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "1"}, "expected \"history\""),
        ({"chosen": "hi", "rejected": "ho"}, "Human"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"}, "differ before"),
        ({"prompt": "q", "chosen": "a", "rejected": 3}, "must be text or messages"),
        ({"history": [], "response_a": "a", "response_b": "b", "chosen": "a"}, "expected a list of"),
        (OURS | {"chosen": "c"}, "a, b or"),
        (OURS | {"margin": -1}, "margin must be 0 or more"),
    ],
)  # fmt: skip
def test_preferences_that_are_none(tmp_path, row, message):
    with pytest.raises(ValueError, match=rf"rows\.jsonl:1: .*{message}"):
        read_preferences(write_rows(tmp_path / "rows.jsonl", [row]))


def test_ties_alone_teach_nothing(tmp_path, model):
    write_preferences(tmp_path / "ties.jsonl", [PreferenceExample([Turn("user", "1")], "5", "6", "tie")])
    with pytest.raises(ValueError, match=r"ties\.jsonl: of 1 preferences none is left: 1 are ties"):
        DPOStage(config(tmp_path, model, data={"train": tmp_path / "ties.jsonl"}))
    row = {"prompt": "1", "chosen": "1", "rejected": "2"}
    data = {"train": write_rows(tmp_path / "rows.jsonl", [row, row | {"rejected": "\u00e9"}])}
    with pytest.raises(ValueError, match=r"rows\.jsonl: preference 2: the byte 0xC3 of the text is not in the voc"):
        DPOStage(config(tmp_path, model, data=data))
    with pytest.raises(ValueError, match="neither answer of a tie"):
        _ = read_preferences(tmp_path / "ties.jsonl")[0].better


def test_options_are_those_of_the_loss(tmp_path, model):
    with pytest.raises(ValueError, match="margin is simpo's"):
        config(tmp_path, model, margin=1.0)
    with pytest.raises(ValueError, match="label_smoothing"):
        config(tmp_path, model, loss_type="ipo", label_smoothing=0.1)
    with pytest.raises(ValueError, match="are kto's, not sigmoid's"):
        config(tmp_path, model, desirable_weight=2.0)
    with pytest.raises(ValueError, match="leave them out of loss_type kto"):
        config(tmp_path, model, loss_type="kto", margin=1.0)
    with pytest.raises(ValueError, match="must be above 0, got beta 0"):
        config(tmp_path, model, loss_type="kto", beta=0.0)


def kto_config(tmp_path, model, **options):
    data = {name: outcomes(tmp_path / f"{name}-outcomes.jsonl") for name in ("train", "val")}
    return config(tmp_path, model, data=data, loss_type="kto", batch_size=7, **options)


def test_what_was_judged_by_itself_becomes_likelier(tmp_path, model):
    settings = kto_config(tmp_path, model, desirable_weight=1.1)
    result = StageRun(settings, dpo_stage(settings)).train()
    assert min(score(LLM(result.export, device="cpu", quiet=True))) > 0
    first, second, *_, last = rows_of(tmp_path / "run")
    assert first["val/loss"] == pytest.approx((1.1 + 1) / 4, abs=1e-5)  # the policy is the reference: 1 - sigmoid(0)
    assert [first["val/kl"], second["kl"]] == pytest.approx([0, 0], abs=1e-5)
    assert last["val/rewards/chosen"] > last["val/kl"] / 10 > last["val/rewards/rejected"]
    assert last["val/rewards/margins"] == pytest.approx(last["val/rewards/chosen"] - last["val/rewards/rejected"])
    assert last["val/rewards/accuracies"] == 1


def test_the_reference_point_is_of_answers_to_other_prompts(tmp_path, model):
    """It and the step are the same whatever the micro-batches; a half of the batch would have another."""
    stage = dpo_stage(kto_config(tmp_path, model, run_dir=tmp_path / "whole"))
    parts = dpo_stage(kto_config(tmp_path, model, run_dir=tmp_path / "parts", micro_batch_size=2))
    written = [tokenizer().decode(item.rejected.token_ids) for item in stage.pairs[:4]]
    assert written == [f"{d}={x}<|endoftext|>" for d, x in ((0, 1), (0, 2), (1, 2), (1, 3))]
    with torch.no_grad():
        for policy in (stage.policy, parts.policy):
            for parameter in policy.model.parameters():
                parameter.mul_(0.5)  # nearer to a guess: what was unlikely is less so
    places = [0, 3, 5, 8, 13]
    unrelated = [torch.tensor([stage.pairs[i].rejected.token_ids]) for i in places]
    sums = [stage.policy.model(ids)[0].log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])[1:].sum() for ids in unrelated]
    want = max(0, sum(s.item() - stage.reference_N2[i, 1].item() for s, i in zip(sums, places, strict=True)) / 5)
    assert want > 0.01
    for one in (stage, parts):
        assert one._batch(places)[3].tolist() == pytest.approx([want] * 5, rel=1e-4)
    found = [one.update(1) for one in (stage, parts)]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_pairs_are_two_answers_each_to_kto(tmp_path, model):
    """The same tokens and labels as lines of their own, beside which they may stand; a tie is none."""
    pairs, lines = preferences(tmp_path / "pairs.jsonl"), tmp_path / "lines.jsonl"
    rows = []
    for d in range(10):
        prompt = [{"role": "user", "content": str(d)}]
        rows += [
            {"prompt": prompt, "completion": str((d + n) % 10), "label": n == 0, "rejected": "by a column"}
            for n in range(2)
        ]
    found = []
    for data in (pairs, write_rows(lines, rows)):
        stage = dpo_stage(config(tmp_path, model, data={"train": data}, loss_type="kto"))
        found.append((stage.pairs, stage.update(1)))
        assert found[-1][1]["tokens"] == 5 * 4  # D=D and the end
    assert found[0] == found[1]
    pairs.write_text(lines.read_text() + pairs.read_text())
    both = dpo_stage(config(tmp_path, model, data={"train": pairs}, loss_type="kto")).pairs
    assert [(item.chosen, item.right) for item in both] == [(item.chosen, item.right) for item in found[0][0] * 2]
    write_preferences(pairs, [PreferenceExample([Turn("user", "1")], "5", "6", "tie")])
    with pytest.raises(ValueError, match=r"pairs\.jsonl: no answer is left, 0 are longer than 24 tokens, 1 line a tie"):
        dpo_stage(config(tmp_path, model, data={"train": pairs}, loss_type="kto"))
    with pytest.raises(ValueError, match=r"pairs\.jsonl:1: chosen must be a, b or tie, got 'c'"):
        dpo_stage(config(tmp_path, model, data={"train": write_rows(pairs, [OURS | {"chosen": "c"}])}, loss_type="kto"))


def test_tokens_are_counted_without_padding(tmp_path, model):
    rows = [{"prompt": "1", "chosen": "1", "rejected": "234"}, {"prompt": "12", "chosen": "1", "rejected": "2"}]
    data = {"train": write_rows(tmp_path / "rows.jsonl", rows)}
    stage = dpo_stage(config(tmp_path, model, data=data, batch_size=2))
    assert stage.update(1)["tokens"] == (4 + 6) + (5 + 5)


def test_a_killed_run_of_kto_repeats_itself_bit_for_bit(tmp_path, model):
    check_a_killed_run_repeats_itself(KTOStage, kto_config(tmp_path, model, checkpoint_interval=3, eval_interval=7))


def test_answers_of_kto(tmp_path, model):
    """Those to another prompt end where the row does; labels that a batch lacks have no mean; one prompt is refused."""
    long = {"prompt": "1" * 10 + "=", "completion": "2", "label": True}
    rows = [long, {"prompt": "3=", "completion": "4" * 20, "label": True}]
    data = {"train": write_rows(tmp_path / "rows.jsonl", rows)}
    stage = dpo_stage(config(tmp_path, model, data=data, loss_type="kto"))
    assert [len(item.rejected.token_ids) for item in stage.pairs] == [24, 4]
    found = stage.update(1)
    assert "rewards/chosen" in found
    assert not {"rewards/rejected", "rewards/margins", "share/chosen"} & set(found)
    data = {"train": write_rows(tmp_path / "rows.jsonl", [long, long | {"label": False}])}
    with pytest.raises(ValueError, match=r"rows\.jsonl: all 2 answers are to one prompt: .* needs two prompts or more"):
        dpo_stage(config(tmp_path, model, data=data, loss_type="kto"))
