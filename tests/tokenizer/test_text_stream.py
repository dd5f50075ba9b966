import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cs336.tokenizer.text_stream import TextStream


class Pieces:
    """A tokenizer whose token i is the i-th of these byte strings."""

    def __init__(self, pieces):
        self.pieces = pieces

    def token_bytes(self, i):
        return self.pieces[i]


def run(pieces, stop=()):
    """What push returned, with close's text last."""
    text = TextStream(Pieces(pieces), stop)
    out = []
    for i in range(len(pieces)):
        out.append(text.push(i))
        if text.stopped:
            break
    return [*out, text.close()], text.stopped


def test_whole_characters_only():
    assert run([b"a\xc3", b"\xa9", b"\xf0\x9f", b"\x98", b"\x80!"]) == (["a", "é", "", "", "😀!", ""], False)
    assert run([b"a\xf0\x9f"]) == (["a", "�"], False)


@pytest.mark.parametrize(
    ("pieces", "stop", "out"),
    [
        ([b"one END", b" two"], ["END"], ["one ", ""]),
        ([b"one E", b"N", b"D", b" two"], ["END"], ["one ", "", "", ""]),
        ([b"one E", b"N", b"T"], ["END"], ["one ", "", "ENT", ""]),
        ([b"one EN"], ["END"], ["one ", "EN"]),
        ([b"aab", b"aac"], ["aac"], ["aab", "", ""]),
        ([b"aa", b"a", b"b"], ["aab"], ["", "a", "", ""]),
        ([b"x\n", b"\n", b"y"], ["\n\n"], ["x", "", ""]),
        ([b"ab", b"cd"], ["bcd", "c"], ["a", "b", ""]),  # the first to be complete
        ([b"abcd"], ["cd", "bc"], ["a", ""]),
        ([b"abcd"], ["bc", "abc"], ["", ""]),  # complete at once: the longer
        ([b"x\xe2\x82", b"\xac y"], ["€"], ["x", "", ""]),
        ([b"E"], ["E"], ["", ""]),
    ],
)
def test_stop_strings(pieces, stop, out):
    assert run([bytes(piece) for piece in pieces], stop)[0] == out


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=4), max_size=12))
def test_joined_it_is_what_decoding_gives(pieces):
    assert "".join(run(pieces)[0]) == b"".join(pieces).decode("utf-8", "replace")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("abc", max_size=3), max_size=10),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_never_leaks_a_stop_string(pieces, stop):
    out, stopped = run([piece.encode() for piece in pieces], stop)
    whole, seen = "".join(pieces), "".join(out)
    assert whole.startswith(seen)
    assert not any(s in seen for s in stop)
    assert run([c.encode() for c in whole], stop)[1] == stopped
    assert "".join(run([c.encode() for c in whole], stop)[0]) == seen  # however it is cut into tokens
    assert stopped == (re.search("|".join(map(re.escape, stop)), whole) is not None)
    if not stopped:
        assert seen == whole
