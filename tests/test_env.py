import importlib.metadata
import io
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from cs336 import _load, env
from cs336.cli import main
from cs336.ops import registry
from cs336.utils import device as devices
from cs336.utils.device import Gpu

H200 = Gpu("NVIDIA H200", (9, 0), 132, 1980e6, 3201e6, 6144, 60 << 20, 141 << 30)


def printed():
    console = Console(file=io.StringIO(), width=100)
    env.print_env(console)
    return console.file.getvalue()


def find(lines, what):
    return next((here, sentence) for name, here, sentence in lines if what in name)


def test_one_screen_names_every_op():
    """In a process of its own, for other tests define ops."""
    script = """
from rich.console import Console
from cs336 import env
from cs336.ops import registry
env.print_env(Console(width=100))
print(*registry.OPS)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    *lines, names = ran.stdout.splitlines()
    assert len(lines) <= 50
    words = " ".join(lines).split()
    assert all(name in words for name in names.split())
    assert torch.__version__ in " ".join(lines)


def test_a_gpu_is_described(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(devices, "gpu", lambda index: H200)
    here, sentence = find(env.gpus(), "NVIDIA H200")
    assert here
    assert all(fact in sentence for fact in ("9.0", "132 SMs", "141 GiB", "4.92 TB/s", "60 MiB L2", "989 TFLOP/s"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu_is_said():
    here, sentence = find(env.gpus(), "none")
    assert not here
    assert "torch sees no CUDA device" in sentence


def test_a_library_that_is_not_built_says_how(monkeypatch, tmp_path):
    monkeypatch.setattr(env, "HERE", tmp_path)
    install = "pip install --no-build-isolation -e ."
    not_built = f"_C_cuda.so is not built: run `{install}` where nvcc is on PATH and CUDACXX is not none"
    monkeypatch.setattr(_load, "missing", lambda kind: not_built if kind == "cuda" else None)
    monkeypatch.setattr(env.shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "cs336._text", None)
    here, sentence = find(env.compiled(), "_C_cuda")
    assert not here
    assert "nvcc is not on PATH" in sentence
    here, sentence = find(env.compiled(), "_text")
    assert not here
    assert "pip install --no-build-isolation -e ." in sentence


def test_extras_come_from_the_package_metadata(monkeypatch):
    wanted = ["torch>=2.11", 'pytest; extra == "dev"', 'no-such-package-xyz>=1; extra == "serve"']
    wanted += ['no-such-package-abc; extra == "lm-eval"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    lines = list(env.extras())
    assert find(lines, "core")[0]
    assert find(lines, "dev")[0]
    here, sentence = find(lines, "serve")
    assert not here
    assert sentence == "missing no-such-package-xyz: pip install 'cs336[serve]'"
    assert find(lines, "lm-eval")[1] == "missing no-such-package-abc: pip install 'cs336[lm-eval]'"


def test_a_source_tree_without_metadata(monkeypatch):
    def requires(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    here, sentence = find(env.extras(), "cs336")
    assert not here
    assert "pip install --no-build-isolation -e ." in sentence


def test_an_op_that_only_ref_serves_is_marked_on_a_gpu(monkeypatch):
    """On a CPU plain torch is no failure."""
    on = {torch.device("cpu"): ("ref",), torch.device("cuda", 0): ("ref",)}
    only_ref = registry.Op("f(Tensor x) -> Tensor", {}, {}, {}, None, False, (), on)
    monkeypatch.setattr(registry, "OPS", {"f": only_ref})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert list(env.variants()) == [("cpu: ref (plain torch), cuda: ref (plain torch)", False, "f")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert list(env.variants()) == [("cpu: ref (plain torch)", True, "f")]


@pytest.mark.parametrize(
    ("missing", "asked", "said"),
    [
        ("cs336._text", "tokenizer inspect nothing.json", "cs336 is not compiled for Python 3"),
        ("cs336._text", "quickstart", "cs336 is not compiled for Python 3"),
        ("tyro", "env", "No module named 'tyro'"),
        ("regex", "tokenizer inspect nothing.json", "No module named 'regex'"),
    ],
)
def test_an_install_that_was_cut_says_what_to_run(tmp_path, missing, asked, said):
    ran = without(missing, asked, tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith(f"cs336: {said}")
    assert "`pip install --no-build-isolation -e .`" in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_interrupt_while_the_program_loads(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "cs336.cli.program", raising=False)
    monkeypatch.delattr("cs336.cli.program", raising=False)
    monkeypatch.setattr("importlib.machinery.PathFinder.find_spec", interrupted)
    assert main(["--version"]) == 130
    assert capsys.readouterr() == ("", "")


def test_the_help_of_serve_needs_no_extra(tmp_path):
    assert "--max-requests" in without("fastapi", "serve --help", tmp_path).stdout
    ran = without("fastapi", "serve model", tmp_path)
    assert ran.returncode == 2
    assert "pip install 'cs336[serve]'" in ran.stderr


def without(missing, asked, place):
    """What the command line says in a process that cannot import a module."""
    code = f"""
import importlib.machinery, sys
from cs336.cli import main
find = importlib.machinery.PathFinder.find_spec
def without(name, path=None, target=None):
    return None if name == {missing!r} else find(name, path, target)
importlib.machinery.PathFinder.find_spec = without
sys.exit(main({asked.split()!r}))
"""
    return subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True, check=False)
