"""A tiny model in a directory, with a tokenizer of characters and a template of plain turns, for the stages' tests."""

import json

import torch

from cs336.models import Transformer, TransformerConfig, save_pretrained
from cs336.tokenizer import Tokenizer
from cs336.utils.special_tokens import END_OF_TEXT

CHARACTERS = "0123456789+=?: abcdefghijklmnopqrstuvwxyz\n"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}={{ m.content }}<|endoftext|>{% else %}{{ m.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}={% endif %}"
)


def tokenizer():
    return Tokenizer({i: bytes([c]) for i, c in enumerate(CHARACTERS.encode())}, [], [END_OF_TEXT])


def save_model(directory, seed=0, init_std=0.1, **options):
    """A model of 2,000 weights at `directory`, which every verb takes."""
    torch.manual_seed(seed)
    shape = {"context_length": 24, "num_layers": 1, "d_model": 16, "num_heads": 2} | options
    model = Transformer(TransformerConfig(vocab_size=44, init_std=init_std, **shape))
    model.chat_template = TEMPLATE
    save_pretrained(model, directory, tokenizer=tokenizer())
    return directory


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def digits(path, count=10):
    """Conversations: a digit, and that digit."""
    return write_rows(
        path,
        [
            {"messages": [{"role": "user", "content": str(d)}, {"role": "assistant", "content": str(d)}]}
            for d in range(count)
        ],
    )


def outcomes(path):
    """A digit is right after itself, the next one is wrong; as messages and as the text that they are written as."""
    rows = []
    for d in range(10):
        for answer in (d, (d + 1) % 10):
            prompt = [{"role": "user", "content": str(d)}] if d % 2 else f"{d}="
            rows.append({"prompt": prompt, "completion": str(answer), "label": answer == d})
    return write_rows(path, rows)


def rows_of(run_dir, name="metrics.jsonl"):
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def without_time(rows):
    """What must repeat bit for bit."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "train/tok_per_sec")} for row in rows]


class Recorder(torch.optim.SGD):
    """Keeps the gradients of each step, and the weights as they are."""

    def __init__(self, module):
        super().__init__(module.parameters(), lr=0.0)
        self.grads = []

    def step(self, *, grad_scale):
        given = [p.grad for group in self.param_groups for p in group["params"]]
        self.grads.append([grad * grad_scale for grad in given if grad is not None])
