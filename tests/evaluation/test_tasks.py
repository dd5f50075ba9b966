"""Tasks of each kind: what is read, what is asked, and the scores of what comes back."""
# ruff: noqa: E501 (a row a line)

import dataclasses
import json
import math
from statistics import stdev

import pytest
import torch

from cs336.evaluation.tasks import KINDS, Metric, Options, pass_at_k, read_task, run_tasks, save_results
from cs336.evaluation.tasks.likelihood import loglikelihoods
from cs336.evaluation.tasks.task import Answered, metrics
from cs336.inference import LLM, CompletionOutput, RequestOutput
from cs336.models import Transformer, TransformerConfig
from cs336.tokenizer import Tokenizer
from cs336.verifiers import sandbox

TOKENIZER = Tokenizer({i: bytes([i]) for i in range(256)}, [], ["<|endoftext|>"])
CONFIG = TransformerConfig(272, 96, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, init_std=0.3)
kept_in = pytest.mark.skipif(sandbox.isolation().level != "namespaces", reason=f"not kept in: {sandbox.isolation()}")


@pytest.fixture(scope="module")
def llm():
    torch.manual_seed(5)
    return LLM(Transformer(CONFIG), TOKENIZER, quiet=True, page_size=16, max_seqs=8)


class Scripted:
    """Answers by a function of the prompt, and keeps what it was asked."""

    def __init__(self, say):
        self.say, self.asked, self.params = say, [], None

    def generate(self, prompts, params=None):
        self.asked, self.params = list(prompts), params
        texts = [[self.say(p)] * params.n if isinstance(self.say(p), str) else self.say(p) for p in prompts]
        return [
            RequestOutput(None, [], [CompletionOutput(i, t, [], "stop", None) for i, t in enumerate(row)])
            for row in texts
        ]

    chat = generate


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def logprobs(llm, prompt, continuation):
    """By one plain forward."""
    ids = torch.tensor([llm.encode([prompt])[0] + TOKENIZER.encode(continuation)])
    n = len(TOKENIZER.encode(continuation))
    with torch.no_grad():
        table = llm.model(ids).log_softmax(-1)[0, -n - 1 : -1]
    chosen = table.gather(1, ids[0, -n:, None]).sum().item()
    return chosen, bool((table.argmax(1) == ids[0, -n:]).all())


def test_loglikelihoods_are_those_of_a_forward(llm):
    pairs = [("the cat", " sat"), ("the cat ", "sat"), ("", "begin"), ("naïve", " é"), ("x", "y")]
    found = loglikelihoods(llm, pairs)
    for (prompt, continuation), (logprob, greedy) in zip(pairs, found, strict=True):
        if prompt.endswith(" "):
            prompt, continuation = prompt[:-1], " " + continuation
        expected, likeliest = logprobs(llm, prompt, continuation)
        assert logprob == pytest.approx(expected, abs=1e-4)
        assert greedy is likeliest
    with torch.no_grad():
        likeliest = {c: llm.model(torch.tensor([[ord(c)]]))[0, -1].argmax().item() for c in "abcdefghijklmnop"}
    prompt, token = next((c, t) for c, t in likeliest.items() if 32 < t < 127)
    assert loglikelihoods(llm, [(prompt, chr(token)), (prompt, chr(token) + "\x01")])[0].greedy
    long = "a" * 200 + "the cat"
    (cut,) = loglikelihoods(llm, [(long, " sat")])
    assert cut.logprob == pytest.approx(logprobs(llm, long[-91:], " sat")[0], abs=1e-4)
    with pytest.raises(ValueError, match="empty continuation"):
        loglikelihoods(llm, [("a", "")])
    with pytest.raises(ValueError, match="99 tokens"):
        loglikelihoods(llm, [("a", "b" * 99)])


def test_choice(llm, tmp_path):
    rows = [
        {"query": "Q: a?\nA:", "choices": ["yes", "no, never"], "gold": 1},
        {"question": "Q?", "choices": {"text": ["one", "two", "three"], "label": ["A", "B", "C"]}, "answerKey": "C"},
        {"context_options": ["The cat", "The dog"], "continuation": "barked.", "gold": 1},
    ]
    task = read_task(f"choice:{write(tmp_path / 'c.jsonl', *rows)}")
    assert [item.target for item in task.items] == [" no, never", " three", "The dog barked."]
    (result,) = run_tasks(llm, [task])
    listed = [
        [("Q: a?\nA:", " yes"), ("Q: a?\nA:", " no, never")],
        [("Q?", " one"), ("Q?", " two"), ("Q?", " three")],
        [("The cat", " barked."), ("The dog", " barked.")],
    ]
    for row, pairs, gold in zip(result.rows, listed, (1, 2, 1), strict=True):
        sums = [logprobs(llm, *pair)[0] for pair in pairs]
        norms = [value / len(c[1:]) for value, (_, c) in zip(sums, pairs, strict=True)]
        assert [a["logprob"] for a in row.answers] == pytest.approx(sums, abs=1e-4)
        assert row.scores == {"acc": sums.index(max(sums)) == gold, "acc_norm": norms.index(max(norms)) == gold}
    accs = [row.scores["acc"] for row in result.rows]
    assert result.metrics["acc"].stderr == pytest.approx(stdev(accs) / math.sqrt(3))
    (shown,) = run_tasks(llm, [read_task(f"choice:{tmp_path / 'c.jsonl'}", limit=2)], shots=1)
    assert shown.rows[0].prompt == "Q? three\n\nQ: a?\nA:"
    with pytest.raises(ValueError, match="2 examples with an answer to show, fewer than 3"):
        run_tasks(llm, [task], shots=3)


def test_continuation_and_text(llm, tmp_path):
    path = write(tmp_path / "l.jsonl", {"context": "the cat", "continuation": "sat"}, {"context": "a ", "answer": "b"})
    (result,) = run_tasks(llm, [read_task(f"continuation:{path}")])
    expected = [logprobs(llm, "the cat", " sat"), logprobs(llm, "a", " b")]
    assert [r.scores["logprob"] for r in result.rows] == pytest.approx([e[0] for e in expected], abs=1e-4)
    assert [r.scores["acc"] for r in result.rows] == [float(e[1]) for e in expected]
    texts = ["naïve texts, " * 20, "short"]
    (result,) = run_tasks(llm, [read_task(f"text:{write(tmp_path / 't.jsonl', *({'text': t} for t in texts))}")])
    nats = []
    for text in texts:
        ids = text.encode()
        total, window = 0.0, 94
        for at in range(0, len(ids), window):
            before = [ids[at - 1]] if at else llm.encode([""])[0]
            row = torch.tensor([[*before, *ids[at : at + window]]])
            with torch.no_grad():
                total -= llm.model(row).log_softmax(-1)[0, :-1].gather(1, row[0, 1:, None]).sum().item()
        nats.append(total)
    sizes = [len(t.encode()) for t in texts]
    assert result.metrics["bits_per_byte"].mean == pytest.approx(sum(nats) / math.log(2) / sum(sizes), rel=1e-5)


def test_gsm8k_and_math(tmp_path):
    rows = [{"question": f"{a} + 1?", "answer": f"{a} + 1 = {a + 1}\n#### {a + 1}"} for a in range(4)]
    task = read_task(f"gsm8k:{write(tmp_path / 'g.jsonl', *rows)}")
    model = Scripted(lambda prompt: " it is 3" if prompt.endswith("2 + 1?\nAnswer:") else "no idea")
    (result,) = run_tasks(model, [task], shots=2)
    assert result.metrics["acc"] == Metric(0.25, pytest.approx(stdev([0, 0, 1, 0]) / 2), 4)
    assert result.rows[2].reasons == ["3 equals 3"]
    assert model.params.temperature == 0
    for i, prompt in enumerate(model.asked):
        assert prompt.count("Question:") == 3
        assert prompt.count(f"{i} + 1?") == 1  # never its own example
        assert prompt.endswith(f"\n\nQuestion: {i} + 1?\nAnswer:")
    assert model.asked == [r.prompt for r in run_tasks(model, [task], shots=2)[0].rows]
    other = run_tasks(model, [task], Options(seed=1), shots=2)
    assert [r.prompt for r in other[0].rows] != [r.prompt for r in result.rows]
    rows = [{"problem": "1/2?", "solution": "so \\boxed{\\frac12}"}, {"problem": "2?", "answer": 2}]
    task = read_task(f"math:{write(tmp_path / 'm.jsonl', *rows)}")
    (result,) = run_tasks(Scripted(lambda _: [r"\boxed{0.5}", "9"]), [task], Options(samples=2))
    assert [r.scores["acc"] for r in result.rows] == [0.5, 0.0]


def test_chat_asks_in_turns(tmp_path):
    rows = [{"question": f"{a}?", "answer": f"#### {a}"} for a in range(2)]
    model = Scripted(lambda messages: "1")
    run_tasks(model, [read_task(f"gsm8k:{write(tmp_path / 'g.jsonl', *rows)}")], Options(chat=True), shots=1)
    assert model.asked[0] == [
        {"role": "user", "content": "Question: 1?\nAnswer:"},
        {"role": "assistant", "content": "#### 1"},
        {"role": "user", "content": "Question: 0?\nAnswer:"},
    ]
    assert model.params.stop == ()


@kept_in
def test_programs(tmp_path):
    mbpp = {"text": "Double it.", "code": "def double(x):\r\n  return 2 * x", "test_setup_code": "", "test_list": ["assert double(2) == 4"]}  # fmt: skip
    shadow = {"prompt": "Add.", "code": "def sum(a, b): return a + b", "test_imports": ["import math"], "test_list": ["assert math.isclose(sum(1, 2), 3)"]}  # fmt: skip
    task = read_task(f"mbpp:{write(tmp_path / 'm.jsonl', mbpp, shadow)}")
    right = {"Double": "def double(x): return x + x", "Add": "```python\ndef sum(a, b): return a + b\n```"}
    model = Scripted(lambda p: [next(v for k, v in right.items() if k in p), "import os; os._exit(0)"])
    (result,) = run_tasks(model, [task], Options(samples=2, temperature=0.5))
    assert [r.scores for r in result.rows] == [{"acc": 0.5, "pass@1": 0.5}] * 2
    assert model.params.n == 2
    human = {
        "prompt": 'def helper(x):\n    return x + 1\n\ndef inc(x):\n    """Add one."""\n',
        "entry_point": "inc",
        "test": "def check(candidate):\n    assert candidate(1) == helper(1)\n",
        "canonical_solution": "    return x + 1\n",
    }
    task = read_task(f"humaneval:{write(tmp_path / 'h.jsonl', human)}")
    cheat = "    return 0\ndef helper(x): return 0\n"
    whole = "```python\ndef inc(x):\n    return x + 1\n```"
    again = "```python\ndef inc(x: int) -> int:\n    return helper(x)\n```"  # of a chat: what the prompt has is there
    answers = (task.items[0].target, 1.0), (cheat, 0.0), (whole, 1.0), (again, 1.0), ("    return helper(x)", 1.0)
    for text, score in answers:
        (result,) = run_tasks(Scripted(lambda _, text=text: text), [task])
        assert result.metrics["acc"].mean == score, text


def test_instructions_refusals_and_pairs(tmp_path):
    row = {
        "prompt": "p",
        "instruction_id_list": ["punctuation:no_comma", "detectable_format:title"],
        "kwargs": [{}, {"num_words": None}],
    }
    task = read_task(f"ifeval:{write(tmp_path / 'i.jsonl', row)}")
    (result,) = run_tasks(Scripted(lambda _: "Sure, here:\n<<title>>\nbody"), [task])
    assert {name: m.mean for name, m in result.metrics.items()} == {
        "prompt_strict": 0, "instruction_strict": 0.5, "prompt_loose": 1, "instruction_loose": 1,
    }  # fmt: skip
    assert result.rows[0].reasons == ["not followed: punctuation:no_comma"]
    rows = [{"prompt": f"{i}", "harmful": i < 3} for i in range(5)]
    task = read_task(f"refusal:{write(tmp_path / 'r.jsonl', *rows)}")
    (result,) = run_tasks(Scripted(lambda p: "I can't help with that." if p in "034" else "Sure"), [task])
    assert (result.metrics["refusal"].mean, result.metrics["refusal"].count) == (pytest.approx(1 / 3), 3)
    assert (result.metrics["over_refusal"].mean, result.metrics["over_refusal"].count) == (1, 2)
    task = read_task(f"pairs:{write(tmp_path / 'p.jsonl', {'instruction': 'hi', 'output': 'abcd'})}")
    asked = []
    options = Options(judge=lambda *texts: asked.append(texts) or 0.5)
    (result,) = run_tasks(Scripted(lambda _: "ab"), [task], options)
    assert {name: m.mean for name, m in result.metrics.items()} == {"win_rate": 0.5, "length_ratio": 0.5}
    assert asked == [("hi", "ab", "abcd")]
    with pytest.raises(ValueError, match="takes a judge"):
        run_tasks(Scripted(lambda _: "ab"), [task])


def test_contamination(tmp_path):
    words = " ".join(f"word{i}" for i in range(20))
    rows = [{"question": words, "answer": "#### 1"}, {"question": "other", "answer": "#### 1"}]
    rows.append({"question": f"Again {words.upper()}!", "answer": "#### 2"})
    task = read_task(f"gsm8k:{write(tmp_path / 'g.jsonl', *rows)}")
    (result,) = run_tasks(Scripted(lambda _: "1"), [task], training_text=["nothing", f"In a page: {words}.", "x"])
    assert set(result.contaminated) == {0, 2}
    assert result.contaminated[0].startswith("word0 word1 ")
    assert (result.clean["acc"].mean, result.clean["acc"].count) == (1, 1)
    (result,) = run_tasks(Scripted(lambda _: "1"), [task], training_text=["nothing"])
    assert (result.contaminated, result.clean) == ({}, {})


def test_a_toml_file(tmp_path):
    write(tmp_path / "d.jsonl", {"question": "1?", "answer": "#### 1", "hint": "one"})
    write(tmp_path / "s.jsonl", {"question": "2?", "answer": "#### 2", "hint": "two"}, {"question": "1?", "answer": "#### 1", "hint": "one"})  # fmt: skip
    (tmp_path / "t.toml").write_text(
        'kind = "gsm8k"\ndata = "d.jsonl"\nshots = "s.jsonl"\nprompt = "{hint}: {question}"'
    )
    model = Scripted(lambda _: "1")
    (result,) = run_tasks(model, [read_task(tmp_path / "t.toml")], shots=1)
    assert model.asked == ["two: 2? #### 2\n\none: 1?"]
    assert (result.task, result.metrics["acc"].stderr) == ("d", None)


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("choice", {"query": "q", "choices": ["a"], "gold": 1}, "d.jsonl:1: this is no row of choice: the right choice is 1"),
        ("choice", {"query": "q"}, "d.jsonl:1: a row of choice has no 'choices'"),
        ("choice", {"query": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"}, "d.jsonl:1: this is no row"),
        ("gsm8k", {"question": "q", "answer": "x\n####"}, "holds no answer"),
        ("ifeval", {"prompt": "p", "instruction_id_list": ["x:y"], "kwargs": [{}]}, "there is no instruction 'x:y'"),
        ("ifeval", {"prompt": "p", "instruction_id_list": [], "kwargs": []}, "one entry an instruction"),
        ("refusal", {"prompt": "p", "harmful": "yes"}, "harmful must be true or false"),
        ("text", {"text": ""}, "the text is empty"),
        ("mbpp", [1], "this is no row of mbpp"),
    ],
)  # fmt: skip
def test_rows_that_are_none(tmp_path, kind, row, message):
    with pytest.raises(ValueError, match=message):
        read_task(f"{kind}:{write(tmp_path / 'd.jsonl', row)}")


def test_specs_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=", ".join(KINDS)):
        read_task("arc.jsonl")
    (tmp_path / "t.toml").write_text('kind = "x"\ndata = "d.jsonl"')
    with pytest.raises(ValueError, match="no kind 'x'"):
        read_task(tmp_path / "t.toml")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="has no items"):
        read_task(f"text:{tmp_path / 'empty.jsonl'}")
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.jsonl:1"):
        read_task(f"text:{tmp_path / 'bad.jsonl'}")
    with pytest.raises(ValueError, match="samples must be 1 or more"):
        Options(samples=0)


def test_pass_at_k_is_unbiased():
    """Against the mean over all choices of k of n."""
    from itertools import combinations

    for n in range(1, 6):
        for right in range(n + 1):
            for k in range(1, n + 1):
                draws = [any(i < right for i in chosen) for chosen in combinations(range(n), k)]
                assert pass_at_k(n, right, k) == pytest.approx(sum(draws) / len(draws))
    for bad in ((3, 4, 1), (3, 1, 4), (3, 1, 0)):
        with pytest.raises(ValueError, match="expected 0 <= right"):
            pass_at_k(*bad)


def test_weighted_metrics():
    rows = [
        Answered("", [], {"x": 1.0}, weight=3.0),
        Answered("", [], {"x": 0.0}, weight=1.0),
        Answered("", [], {"y": 2.0}),
    ]
    found = metrics(rows)
    assert found["x"].mean == 0.75
    assert found["y"] == Metric(2.0, None, 1)


def test_results_hold_every_prompt_and_answer(tmp_path):
    task = read_task(f"gsm8k:{write(tmp_path / 'g.jsonl', {'question': 'q', 'answer': '#### 1'})}")
    results = run_tasks(Scripted(lambda _: "it is 1"), [task])
    saved = json.loads(save_results(tmp_path / "results.json", results, model="m", odd=math.nan).read_text())
    assert (saved["model"], saved["odd"]) == ("m", None)
    (row,) = saved["tasks"][0]["rows"]
    assert row == {"prompt": "Question: q\nAnswer:", "answers": ["it is 1"], "scores": {"acc": 1.0}, "reasons": ["1 equals 1"], "weight": 1.0}  # fmt: skip
    assert saved["tasks"][0]["metrics"]["acc"] == {"mean": 1.0, "stderr": None, "count": 1}


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n')
    assert len(read_task(f"text:{path}").items) == 2


def test_letters_of_mmlu_and_chats_are_scored_after_what_stands_before(tmp_path):
    torch.manual_seed(5)
    llm = LLM(Transformer(dataclasses.replace(CONFIG, context_length=512)), TOKENIZER, quiet=True, max_seqs=8)
    rows = [
        {
            "question": f"what is {i}?",
            "choices": ["one", "two", "three", "four"],
            "answer": "ABCD"[i] if i % 2 else i,
            "subject": "high_school",
        }
        for i in range(4)
    ]
    file = write(tmp_path / "m.jsonl", *rows)
    task = read_task(f"mmlu:{file}")
    heading = "The following are multiple choice questions (with answers) about high school.\n\n"
    asked = "what is 0?\nA. one\nB. two\nC. three\nD. four\nAnswer:"
    (found,) = run_tasks(llm, [task], Options())
    expected = {x: logprobs(llm, heading + asked, f" {x}")[0] for x in "ABCD"}
    assert found.rows[0].answers == [pytest.approx(expected, abs=1e-4)]
    for place, row in enumerate(found.rows):
        (said,) = row.answers
        assert row.prompt == heading + asked.replace("what is 0", f"what is {place}")
        assert row.scores["acc"] == float(max(said, key=said.get) == "ABCD"[place])
    (few,) = run_tasks(llm, [task], Options(), shots=2)
    assert few.rows[0].prompt.startswith(heading + "what is ")
    assert few.rows[0].prompt.count("The following") == 1
    (_, before, _) = few.rows[0].prompt.split("\n\n", 2)
    assert before.split("Answer: ")[1] in "ABCD"
    (chat,) = run_tasks(llm, [task], Options(chat=True))
    assert chat.rows[0].prompt == llm.chat_template.render([{"role": "user", "content": heading + asked}])
    choice = read_task(
        f"choice:{write(tmp_path / 'c.jsonl', {'question': 'Q', 'choices': ['x', 'yy'], 'answer': 'B'})}"
    )
    (chat,) = run_tasks(llm, [choice], Options(chat=True))
    text = llm.chat_template.render([{"role": "user", "content": "Q"}])
    assert [one["choice"] for one in chat.rows[0].answers] == ["x", "yy"]
    assert chat.rows[0].answers[1]["logprob"] == pytest.approx(
        logprobs(llm, text, "yy")[0] + logprobs(llm, text.rstrip(), "\n")[0], abs=1e-3
    )
    winograd = {"context_options": ["a", "b"], "continuation": "c", "gold": 0}
    with pytest.raises(ValueError, match="leave chat out"):
        run_tasks(llm, [read_task(f"choice:{write(tmp_path / 'w.jsonl', winograd)}")], Options(chat=True))
    many = {"question": "Q", "choices": [f"c{i}" for i in range(30)], "answer": "29"}
    assert read_task(f"choice:{write(tmp_path / 'many.jsonl', many)}").items[0].target == " c29"
    with pytest.raises(ValueError, match="30 choices, expected at most 26"):
        read_task(f"mmlu:{tmp_path / 'many.jsonl'}")
    (tmp_path / "own.toml").write_text('kind = "mmlu"\ndata = "m.jsonl"\nprompt = "{question} {choices[1]}"\n')
    (own,) = run_tasks(llm, [read_task(tmp_path / "own.toml")], Options())
    assert own.rows[0].prompt == "what is 0? two"
    with pytest.raises(ValueError, match="choice is 'Z', which is none of 0 to 3"):
        read_task(f"mmlu:{write(tmp_path / 'z.jsonl', rows[0] | {'answer': 'Z'})}")
