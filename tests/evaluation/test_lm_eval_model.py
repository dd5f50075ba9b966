"""Our models in lm-evaluation-harness, on a task made here."""

import json
import math

import pytest
import torch

from cs336.evaluation.tasks import read_task, run_tasks
from cs336.inference import LLM, SamplingParams
from cs336.models import Transformer, TransformerConfig
from cs336.tokenizer import Tokenizer

lm_eval = pytest.importorskip("lm_eval")
TOKENIZER = Tokenizer({i: bytes([i]) for i in range(256)}, [], ["<|endoftext|>"])
CONFIG = TransformerConfig(272, 96, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, init_std=0.3)
ROWS = [
    {"query": "Q: sky?\nA:", "choices": ["blue", "green, mostly"], "gold": 0},
    {"query": "Q: grass?\nA:", "choices": ["blue", "green, mostly", "grey"], "gold": 1},
    {"query": "Q: snow?\nA:", "choices": ["white", "black"], "gold": 0},
]


@pytest.fixture(scope="module")
def model():
    from cs336.evaluation import LMEvalModel

    torch.manual_seed(5)
    return LMEvalModel(LLM(Transformer(CONFIG), TOKENIZER, quiet=True, page_size=16, max_seqs=8))


def test_the_harness_finds_what_our_own_task_finds(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "choices.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = {
        "task": "ours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    found = lm_eval.simple_evaluate(model, tasks=[config], bootstrap_iters=0)["results"]["ours"]
    (ours,) = run_tasks(model.llm, [read_task(f"choice:{data}")])
    assert found["acc,none"] == ours.metrics["acc"].mean
    assert found["acc_norm,none"] == ours.metrics["acc_norm"].mean


def test_requests(model):
    from lm_eval.api.instance import Instance

    def ask(kind, *arguments):
        return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]

    (text,) = model.generate_until(ask("generate_until", ("abc", {"until": ["\n"], "max_gen_toks": 5})))
    assert text == model.llm.generate("abc", SamplingParams(temperature=0, max_tokens=5, stop="\n"))[0].text
    (cut,) = model.generate_until(ask("generate_until", ("x" * 200 + "abc", {"max_gen_toks": 6})))
    assert cut == model.llm.generate("x" * 87 + "abc", SamplingParams(temperature=0, max_tokens=6))[0].text
    assert model.generate_until([]) == []
    (rolled,) = model.loglikelihood_rolling(ask("loglikelihood_rolling", ("naïve " * 30,)))
    windows = [*TOKENIZER.encode("naïve " * 30)]
    begin = model.llm.encode([""])[0]
    total = 0.0
    for at in range(0, len(windows), 94):
        ids = torch.tensor([[*(windows[at - 1 : at] or begin), *windows[at : at + 94]]])
        with torch.no_grad():
            total += model.llm.model(ids).log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).sum().item()
    assert math.isclose(rolled, total, rel_tol=1e-5)
    assert "abc" in model.apply_chat_template([{"role": "user", "content": "abc"}])
