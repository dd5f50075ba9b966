import inspect
import json
import random

import pytest

from cs336.tokenizer import Tokenizer


def mixed_text():
    """Code, English, several scripts, emoji, runs and odd white space: about 200 KB."""
    rng = random.Random(0)
    code = "".join(inspect.getsource(module) for module in (inspect, json, random))
    scripts = [(0x4E00, 0x4F00), (0x3041, 0x3097), (0x410, 0x450), (0x5D0, 0x5EB), (0xE01, 0xE3B), (0x1F600, 0x1F650)]
    foreign = "".join(
        "".join(chr(rng.randrange(*script)) for _ in range(rng.randrange(1, 30)))
        + rng.choice([" ", "。", "\n", ", ", "1 "])
        for script in scripts
        for _ in range(150)
    )
    spaces = "".join(rng.choice([" ", "  ", "\n", "\r\n", "\t", "\u3000", "a", "I'm", "7", "--"]) for _ in range(5000))
    return code + foreign + spaces + "ab" * 1000 + " " * 3000 + "x" * 3000


@pytest.fixture(scope="session")
def text():
    return mixed_text()


@pytest.fixture(scope="session")
def tokenizer(text):
    return Tokenizer.train([text], 1500, ["<|endoftext|>", "<|end|>", "<|end|><|of|>"])
