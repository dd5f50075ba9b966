"""The tokenizer alone: what CS336_TEXT_ONLY=1 installs asks for no torch, and works without it."""

import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
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
tokenizer = Tokenizer.train(["some text, some more text"], 260)
assert tokenizer.decode(tokenizer.encode("text")) == "text"
tokenizer.save({str(tmp_path / "tokenizer.json")!r})
from cs336.cli import main
assert main(["tokenizer", "inspect", {str(tmp_path / "tokenizer.json")!r}]) == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_first_build_puts_the_library_into_the_wheel(tmp_path):
    left_out = shutil.ignore_patterns(".*", "build", "runs", "*.so", "*.egg-info", "tests", "benchmarks")
    shutil.copytree(ROOT, tmp_path / "clone", ignore=left_out)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, "."]
    subprocess.run(command, check=True, cwd=tmp_path / "clone", env=os.environ | {"CS336_TEXT_ONLY": "1"})
    (wheel,) = tmp_path.glob("*.whl")
    libraries = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert [name.partition(".")[0] for name in libraries] == ["cs336/_text"]
