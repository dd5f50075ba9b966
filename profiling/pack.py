"""Pack what a run on a GPU machine needs, built here, where no GPU is: sources, compiled libraries, missing wheels.

    python profiling/pack.py cs336-run.tar.gz --python python3.12 --wheels tyro nvtx liger-kernel

There: tar xf cs336-run.tar.gz && cd cs336-run && . ./activate && pytest tests/ops

`_C.so` and `_C_cuda.so` use the stable LibTorch ABI and load under any Python and any torch >= 2.11. `_text` belongs to
one Python version: --python names an interpreter of the target's version to build it for. --wheels are fetched for that
version, each without its dependencies: a GPU machine has torch, triton and numpy, so name just what it lacks.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import sysconfig
import tarfile
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
ACTIVATE = 'export PYTHONPATH="$PWD:$PWD/wheels${PYTHONPATH:+:$PYTHONPATH}"\n'


def version_of(python: str) -> str:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    return subprocess.check_output([python, "-c", code], text=True).strip()


def build_text(python: str, out: pathlib.Path) -> pathlib.Path:
    """Build `_text` for another interpreter; pybind11's headers come from this one."""
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
    configure = ["cmake", "-S", ROOT, "-B", out, "-G", "Ninja", "-DCS336_TEXT_ONLY=ON", f"-DCS336_OUTPUT={out}"]
    subprocess.check_call([*configure, f"-DPython_EXECUTABLE={python}"], env=environment, stdout=subprocess.DEVNULL)
    subprocess.check_call(["cmake", "--build", out], env=environment, stdout=subprocess.DEVNULL)
    return next(out.glob("_text*.so"))


def fetch_wheels(names: list[str], version: str, out: pathlib.Path) -> None:
    """Unpack the wheels of `names` into one importable folder."""
    platforms = [f"--platform=manylinux_2_{n}_x86_64" for n in (17, 24, 26, 27, 28, 31, 34, 35)]
    target = ["--only-binary=:all:", f"--python-version={version}", "--implementation=cp", *platforms]
    with tempfile.TemporaryDirectory() as wheels:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", wheels]
        subprocess.check_call([*pip, *target, *names])
        for wheel in pathlib.Path(wheels).glob("*.whl"):
            subprocess.check_call([sys.executable, "-m", "zipfile", "-e", wheel, out])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, help="the .tar.gz to write")
    parser.add_argument("--python", default=sys.executable, help="an interpreter of the target's version")
    parser.add_argument("--wheels", nargs="*", default=[], help="packages the target lacks")
    parser.add_argument("--data", nargs="*", default=[], type=pathlib.Path, help="files to put under data/")
    options = parser.parse_args()

    libraries = [ROOT / "cs336" / name for name in ("_C.so", "_C_cuda.so")]
    if missing := [p.name for p in libraries if not p.exists()]:
        raise SystemExit(f"{', '.join(missing)} not built: run `pip install -e .` where nvcc is on PATH")
    tracked = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True).split("\n")
    with tempfile.TemporaryDirectory() as scratch, tarfile.open(options.out, "w:gz") as tar:
        here = pathlib.Path(scratch)
        for name in filter(None, tracked):
            if (ROOT / name).exists():
                tar.add(ROOT / name, f"cs336-run/{name}")
        for library in [*libraries, build_text(options.python, here / "text")]:
            tar.add(library, f"cs336-run/cs336/{library.name}")
        if options.wheels:
            fetch_wheels(options.wheels, version_of(options.python), here / "wheels")
            tar.add(here / "wheels", "cs336-run/wheels")
        for path in options.data:
            tar.add(path, f"cs336-run/data/{path.name}")
        (here / "activate").write_text(ACTIVATE)
        tar.add(here / "activate", "cs336-run/activate")
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
