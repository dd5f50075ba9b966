"""The tokenizer alone: what CS336_TEXT_ONLY=1 installs asks for no torch, and works without it."""

import json
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
import setuptools

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def setup_arguments(monkeypatch):
    def arguments(text_only):
        given = {}
        monkeypatch.setenv("CS336_TEXT_ONLY", text_only)
        monkeypatch.setattr(setuptools, "setup", given.update)
        runpy.run_path(str(ROOT / "setup.py"))
        return given

    return arguments


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("g++ (Debian 10.2.1-6) 10.2.1 20210110\nCopyright (C) 2020", "g++ 11 or newer is needed"),
        ("c++ (GCC) 4.8.5 20150623 (Red Hat 4.8.5-44)", "g++ 11 or newer is needed"),
        ("g++-11 (Debian 11.3.0-12) 11.3.0", None),
        ("g++ (Debian 12.2.0-14+deb12u1) 12.2.0", None),
        ("Debian clang version 14.0.6\nTarget: x86_64-pc-linux-gnu", "clang++ 16 or newer is needed"),
        ("clang version 18.1.3", None),
        ("some other compiler", None),
    ],
)
def test_a_compiler_that_is_too_old_is_named(monkeypatch, version, reason):
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    said = runpy.run_path(str(ROOT / "setup.py"))["too_old"](version)
    if reason is None:
        assert said is None
    else:
        assert reason in said
        assert version.splitlines()[0] in said


@pytest.mark.skipif(shutil.which("g++-11") is None, reason="needs g++ 11")
def test_the_oldest_compiler_builds_the_kernels(tmp_path):
    for source in (ROOT / "csrc/cpu").glob("*.cpp"):
        command = ["g++-11", "-std=c++20", "-O2", "-fopenmp-simd", f"-I{ROOT / 'csrc'}", "-c", source]
        subprocess.run([*command, "-o", tmp_path / "object.o"], check=True)


def names(requirements):
    return {re.match(r"[\w.-]+", requirement)[0] for requirement in requirements}


def test_text_only_asks_for_no_torch(setup_arguments):
    text, everything = setup_arguments("1"), setup_arguments("")
    assert "torch" in names(everything["install_requires"]) & names(everything["setup_requires"])
    assert not text["setup_requires"]
    assert names(text["install_requires"]) < names(everything["install_requires"]) - {"torch"}


def test_the_tokenizer_works_with_what_text_only_installs(setup_arguments, tmp_path):
    left_out = names(setup_arguments("")["install_requires"]) - names(setup_arguments("1")["install_requires"])
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in {sorted(left_out)}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from cs336.tokenizer import Tokenizer
tokenizer = Tokenizer.train(["some text, some more text"], 260, ["<|endoftext|>"])
assert tokenizer.decode(tokenizer.encode("text")) == "text"
tokenizer.save("tokenizer.json")
from cs336.cli import main
assert main(["tokenizer", "inspect", "tokenizer.json"]) == 0
assert main(["tokenizer", "train", "documents.jsonl", "--vocab-size", "260"]) == 0
assert main(["tokenizer", "encode", "tokenizer.json", "documents.jsonl", "--shards", "tokens"]) == 0
assert main(["tokenizer", "decode", "tokenizer.json", "tokens/train/00000.bin"]) == 0
assert main(["env"]) == 0
"""
    lines = "".join(json.dumps({"text": f"some text {i}"}) + "\n" for i in range(200))
    (tmp_path / "documents.jsonl").write_text(lines)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "some text 1<|endoftext|>" in done.stdout
    assert "the tokenizer works without it" in " ".join(done.stdout.split())


@pytest.mark.slow
def test_a_first_build_puts_the_library_into_the_wheel(tmp_path):
    left_out = shutil.ignore_patterns(".*", "build", "runs", "*.so", "*.egg-info", "tests", "benchmarks")
    shutil.copytree(ROOT, tmp_path / "clone", ignore=left_out)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, "."]
    subprocess.run(command, check=True, cwd=tmp_path / "clone", env=os.environ | {"CS336_TEXT_ONLY": "1"})
    (wheel,) = tmp_path.glob("*.whl")
    libraries = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert [name.partition(".")[0] for name in libraries] == ["cs336/_text"]


@pytest.mark.slow
def test_a_compiler_of_cuda_that_came_later_is_found(tmp_path):
    """docs/install.md: CUDACXX=none leaves the kernels out."""
    configure = ["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    without = os.environ | {"CUDACXX": "none"}
    first = subprocess.run(configure, env=without, capture_output=True, text=True, check=True)
    assert "the CUDA kernels are not built" in " ".join(first.stderr.split())
    again = subprocess.run(configure, env=os.environ, capture_output=True, text=True, check=True)
    assert "Looking for a CUDA compiler" in again.stdout


def test_what_every_part_needs_is_an_extra_or_installed(setup_arguments):
    """matplotlib draws one chart, and pydantic reads every configuration."""
    core = names(setup_arguments("")["install_requires"])
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "pydantic" in core
    assert "matplotlib" not in core
    assert extras["plot"] == ["matplotlib"]
    assert not names(extras["peers"]) & (core | names(extras["dev"]))


def test_what_is_not_python_is_packed():
    packed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["cs336"]
    files = [p for p in (ROOT / "cs336").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")]
    assert {".html", ".css", ".toml"} <= {p.suffix for p in files}
    kept = {p for pattern in packed for p in (ROOT / "cs336").glob(pattern)}
    assert set(files) <= kept


def test_the_changelog_states_the_formats():
    from cs336.tokenizer import formats
    from cs336.training import checkpoint
    from cs336.utils.shards import TokenMeta

    stated = " ".join((ROOT / "CHANGELOG.md").read_text().split())
    assert f"token shards {TokenMeta.format} (" in stated
    assert f"checkpoints {checkpoint.FORMAT} (" in stated
    assert f"`tokenizer.json` {formats.FORMAT} ({formats.OF_CHARACTERS} for " in stated
