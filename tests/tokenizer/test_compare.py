import pytest

from cs336.tokenizer import Tokenizer, compare


@pytest.fixture(scope="module")
def rows(text, tokenizer):
    return compare.compare({"large": tokenizer, "bytes": Tokenizer.train([], 256)}, [text])


def test_rows(rows, text, tokenizer):
    large, small = rows
    assert (large.name, large.vocab_size, large.text_bytes) == ("large", 1500, len(text.encode()))
    assert large.tokens == len(tokenizer.encode_ordinary(text))
    assert small.bytes_per_token == 1 < large.bytes_per_token
    assert min(large.first, large.again, small.first, small.again) > 0


@pytest.mark.parametrize(("name", "begins"), [("c.png", b"\x89PNG"), ("c.svg", b"<?xml"), ("c.pdf", b"%PDF")])
def test_plot(rows, name, begins, tmp_path):
    compare.plot(rows, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(begins)


def test_errors(rows, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no text"):
        compare.compare({"x": tokenizer}, [b"", ""])
    with pytest.raises(ValueError, match="expected a list of texts"):
        compare.compare({"x": tokenizer}, b"text")
    with pytest.raises(ValueError, match=r"is a \.png, \.svg or \.pdf file"):
        compare.plot(rows, tmp_path / "c.txt")
