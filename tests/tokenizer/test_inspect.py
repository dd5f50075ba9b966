import io
import itertools

from rich.console import Console

from cs336.tokenizer import Tokenizer
from cs336.tokenizer.inspect import SPECIAL, STYLES, render, usage


def test_render(tokenizer):
    text = "def f():\n\treturn [b]\U0001f600[/b]<|end|>"
    rendered = render(tokenizer, text)
    ids = tokenizer.encode(text, allowed_special="all")
    assert len(rendered.spans) == len(ids)
    assert rendered.spans[-1].style == SPECIAL
    assert all(a.style != b.style for a, b in itertools.pairwise(rendered.spans))
    assert {span.style for span in rendered.spans[:-1]} <= set(STYLES)
    assert "\u21b5\n\u21e5\t" in rendered.plain
    assert "[b]" in rendered.plain
    assert "\\xf0" in rendered.plain  # an emoji the vocabulary has no token for
    Console(file=io.StringIO(), force_terminal=True).print(rendered)
    assert render(tokenizer, "").plain == ""


def test_usage():
    vocab = {i: bytes([i]) for i in range(256)} | {256: b"ab", 257: b"<e>"}
    tokenizer = Tokenizer(vocab, [(b"a", b"b")], ["<e>"])
    used = usage(tokenizer, ["abab c", b"\xff"] * 1500 + ["<e>"], top=2)
    assert (used.num_texts, used.num_bytes, used.num_tokens) == (3001, 7 * 1500 + 3, 5 * 1500 + 3)
    assert used.bytes_per_token == used.num_bytes / used.num_tokens
    assert used.num_distinct == 7  # ab, space, c, \xff, <, e, >
    assert used.longest == [b"ab", b" "]
    assert used.most_frequent[0] == (b"ab", 3000)
    assert usage(tokenizer, []).bytes_per_token == 0.0
