"""Preferences of a model's own answers: labels, places, agreement."""

import json

import pytest
import torch
from tiny_policy import TEMPLATE, save_model, tokenizer, write_rows

from cs336.alignment import LoRAConfig, apply_lora, merged, read_preferences
from cs336.alignment.examples import Prompt, Turn
from cs336.alignment.lora import LoRALinear
from cs336.alignment.make_pairs import JudgeLabels, LLMJudge, VerifierLabels, make_pairs
from cs336.cli.program import main
from cs336.inference import LLM
from cs336.inference.chat import ChatTemplate
from cs336.models import Transformer, TransformerConfig

PROMPTS = [Prompt((Turn("user", f"{d}?"),), d) for d in range(20)]


class Letters:
    """How many letters are in the answer."""

    kind, weight = "letters", 1.0

    def __call__(self, response, answer):
        return float(sum(c.isalpha() for c in response))


def llm_of(context_length=32):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(44, context_length, num_layers=1, d_model=16, num_heads=2, init_std=0.3))
    llm = LLM(model, tokenizer(), quiet=True)
    llm.chat_template = ChatTemplate(TEMPLATE)
    return llm


def test_the_better_answer_is_that_of_the_higher_score(tmp_path):
    path = tmp_path / "pairs.jsonl"
    report = make_pairs(llm_of(), PROMPTS, path, VerifierLabels([Letters()]), num_generations=4, max_tokens=5, seed=1)
    found = read_preferences(path)
    assert len(found) == report.pairs > 30
    for example in found:
        a, b = (Letters()(x, None) for x in (example.response_a, example.response_b))
        assert example.chosen == ("tie" if a == b else "a" if a > b else "b")
        assert example.margin == abs(a - b)
    assert report.ties == sum(example.chosen == "tie" for example in found)
    assert 0.25 < report.chose_a < 0.75
    assert report.agreement is None
    make_pairs(
        llm_of(), PROMPTS, tmp_path / "again", VerifierLabels([Letters()]), num_generations=4, max_tokens=5, seed=1
    )
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_a_judge_that_likes_a_place_agrees_with_nothing(tmp_path):
    first = JudgeLabels(lambda history, a, b: "a")
    report = make_pairs(llm_of(), PROMPTS, tmp_path / "p", first, max_tokens=5)
    assert (report.agreement, report.first_place, report.ties) == (0.0, 1.0, report.pairs)
    longer = JudgeLabels(lambda history, a, b: "tie" if len(a) == len(b) else "a" if len(a) > len(b) else "b")
    report = make_pairs(llm_of(), PROMPTS, tmp_path / "p", longer, max_tokens=5)
    assert (report.agreement, report.first_place) == (1.0, 0.5)
    decided = [e for e in read_preferences(tmp_path / "p") if e.chosen != "tie"]
    assert decided
    assert all(len(e.better) > len(e.worse) for e in decided)


def test_a_model_judges_by_its_letters():
    asked = []
    llm = llm_of(context_length=512)

    class Scores:
        tokenizer, chat_template = llm.tokenizer, llm.chat_template

        def score(self, prompts, letters):
            asked.append((prompts[0], letters))
            return [[type("T", (), {"logprob": value})()] for value in (-2.0, -1.0)]

    assert LLMJudge(Scores(), "be brief")([Turn("user", "hi")], "yes", "no") == "b"
    ((prompt, letters),) = asked
    assert letters == ["A", "B"]
    for part in ("be brief", "user: hi", "# Answer A\nyes", "# Answer B\nno"):
        assert part in prompt
    with pytest.raises(ValueError, match="give its LLM a tokenizer"):
        LLMJudge(LLM(llm.model, quiet=True))


@pytest.mark.parametrize("options", [{"num_generations": 3}, {"temperature": 0.0}, {"prompts": []}])
def test_what_makes_no_pairs(tmp_path, options):
    prompts = options.pop("prompts", PROMPTS)
    with pytest.raises(ValueError, match="pairs take prompts"):
        make_pairs(llm_of(), prompts, tmp_path / "p", VerifierLabels([Letters()]), **options)


def test_the_verb(tmp_path, capsys):
    model = save_model(tmp_path / "model", init_std=0.3)
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"{d}?", "answer": d} for d in range(10)])
    out = tmp_path / "pairs.jsonl"
    command = ["align", "pairs", str(model), str(prompts), str(out), "--max-tokens", "3", "--device", "cpu"]
    assert main([*command, "--label", "characters"]) == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == 10
    assert read_preferences(out)


def test_lora_begins_as_the_model_and_merges_into_it():
    model = llm_of().model
    ids = torch.randint(0, 40, (2, 8))
    with torch.no_grad():
        before = model(ids)
        learned = apply_lora(model, LoRAConfig(4, alpha=6.0, targets=("q_proj", "down_proj")))
        assert torch.equal(model(ids), before)
        assert {p for p in model.parameters() if p.requires_grad} == set(learned.parameters())
        assert len(learned) == 4
        for p in learned.parameters():
            p.normal_()
        after = model(ids)
        assert not torch.allclose(after, before)
        plain = merged(model)
        torch.testing.assert_close(plain(ids), after, rtol=1e-3, atol=1e-4)
        layer = model.layers[0].attention.q_proj
        product = 1.5 * layer.lora_b @ layer.lora_a
        torch.testing.assert_close(plain.layers[0].attention.q_proj.weight, layer.weight + product)
    assert not any(isinstance(m, LoRALinear) for m in plain.modules())
    assert merged(plain) is plain
    with pytest.raises(ValueError, match="name no linear layer"):
        apply_lora(plain, LoRAConfig(targets=("other",)))
    with pytest.raises(ValueError, match="rank 1 or more"):
        LoRAConfig(rank=0)
