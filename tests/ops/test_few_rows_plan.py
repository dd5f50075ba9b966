"""How weights of linear layers of few rows are dealt to blocks, where there is a C++ compiler."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_every_tile_is_one_teams(tmp_path):
    source = pathlib.Path(__file__).with_name("few_rows_plan.cpp")
    flags = ["-std=c++20", "-O1", "-fsanitize=address", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([COMPILER, *flags, "-I", ROOT / "csrc", source, "-o", tmp_path / "few_rows_plan"], check=True)
    done = subprocess.run([tmp_path / "few_rows_plan"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
