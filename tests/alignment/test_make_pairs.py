"""Preferences of a model's own answers: labels, places, agreement."""

import json
import re

import pytest
import torch
from tiny_policy import TEMPLATE, save_model, tokenizer, write_rows

from cs336.alignment import LoRAConfig, apply_lora, merged, read_preferences
from cs336.alignment.examples import Prompt, Turn
from cs336.alignment.lora import LoRALinear
from cs336.alignment.make_pairs import JudgeLabels, VerifierLabels, make_pairs
from cs336.cli.program import main
from cs336.inference import LLM
from cs336.inference.chat import ChatTemplate
from cs336.models import Transformer, TransformerConfig
from cs336.verifiers.judge import Judge

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


def judge_of(choose):
    """A judge that is told which answer it reads first and which second, and says choose(first, second)."""

    def chat(messages):
        fence = re.search(r"^=\w+=$", messages[0]["content"], re.MULTILINE).group()
        _, _, _, first, _, second, _ = messages[0]["content"].split(f"\n{fence}")
        return f"[[{choose(first.strip(), second.strip())}]]"

    return JudgeLabels(Judge(chat))


def test_a_judge_that_likes_a_place_agrees_with_nothing(tmp_path):
    report = make_pairs(llm_of(), PROMPTS, tmp_path / "p", judge_of(lambda a, b: "A"), max_tokens=5)
    assert (report.agreement, report.first_place, report.ties) == (0.0, 1.0, report.pairs)
    longer = judge_of(lambda a, b: "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B")
    report = make_pairs(llm_of(), PROMPTS, tmp_path / "p", longer, max_tokens=5)
    assert (report.agreement, report.first_place, report.unclear) == (1.0, 0.5, 0.0)
    decided = [e for e in read_preferences(tmp_path / "p") if e.chosen != "tie"]
    assert decided
    assert all(len(e.better.strip()) > len(e.worse.strip()) for e in decided)


def test_a_judge_that_says_nothing_chooses_nothing(tmp_path):
    report = make_pairs(llm_of(), PROMPTS, tmp_path / "p", JudgeLabels(Judge(lambda messages: "hm")), max_tokens=5)
    assert (report.agreement, report.first_place, report.unclear, report.ties) == (0.0, 0.0, 1.0, report.pairs)


def test_a_judge_reads_the_conversation():
    seen = []
    labels = JudgeLabels(Judge(lambda messages: seen.append(messages[0]["content"]) or "[[A]]", "be brief"))
    labels(Prompt((Turn("user", "hi"), Turn("assistant", "hello"), Turn("user", "more")), None), "yes", "no")
    for part in ("be brief", "user: hi\n\nassistant: hello\n\nuser: more", "yes", "no"):
        assert part in seen[0]
    labels(Prompt("plain", None), "yes", "no")
    labels(Prompt((Turn("user", "plain"),), None), "yes", "no")
    assert all("\nplain\n" in text for text in seen[2:])


@pytest.mark.parametrize("options", [{"num_generations": 3}, {"temperature": 0.0}, {"prompts": []}, {"seed": -1}])
def test_what_makes_no_pairs(tmp_path, options):
    prompts = options.get("prompts", PROMPTS)
    options = {name: value for name, value in options.items() if name != "prompts"}
    message = "seed must be in 0..2**31 - 1, got -1" if "seed" in options else "pairs take prompts"
    with pytest.raises(ValueError, match=re.escape(message)):
        make_pairs(llm_of(), prompts, tmp_path / "p", VerifierLabels([Letters()]), **options)


def test_the_verb(tmp_path, capsys):
    model = save_model(tmp_path / "model", init_std=0.3)
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"{d}?", "answer": d} for d in range(10)])
    out = tmp_path / "pairs.jsonl"
    command = ["align", "pairs", str(model), str(prompts), str(out), "--max-tokens", "3", "--device", "cpu"]
    assert main([*command, "--label", "characters"]) == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == 10
    assert read_preferences(out)
    assert main([*command, "--label", "judge", "--judge", "http://127.0.0.1:9/v1"]) == 2
    assert "the judge at http://127.0.0.1:9/v1 gave no answer" in capsys.readouterr().err
    for option in ("--judge", "--rubric"):
        assert main([*command, option, str(model)]) == 2
        assert "--judge and --rubric go with --label judge: math asks no judge" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["align", "pairs", "--help"])
    assert "MODEL PROMPTS OUT" in capsys.readouterr().out


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
