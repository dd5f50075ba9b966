"""What `cs336 train`, and verbs like it, say of settings that were not given or cannot be."""

import pytest
import tiny_run

from cs336.cli import main


def fails(arguments, capsys):
    """The sentence on stderr of a user's error."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("cs336: ")
    return err


def saved(root, name, **changes):
    file = root / f"{name}.toml"
    tiny_run.config(root, name, **changes).save(file)
    return ["train", "--config", str(file)]


@pytest.mark.parametrize("verb", ["train", "sft"])
def test_nothing_given_says_how_to_give_it(verb, capsys):
    said = fails([verb], capsys)
    assert "missing: " in said
    assert "give a file, --config FILE, or options, which --help lists" in said
    assert "--config mine.toml reads a file" in fails([verb, "mine.toml"], capsys)
    assert "give a file" not in fails([verb, "--run-dir", "run"], capsys)


def test_a_prompt_without_a_tokenizer(tmp_path, capsys):
    assert "give --tokenizer FILE" in fails([*saved(tmp_path, "run"), "--prompt", "Hello"], capsys)
    assert not (tmp_path / "run").exists()


def test_a_run_directory_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "is a file: name a directory" in fails(saved(tmp_path, "file"), capsys)
