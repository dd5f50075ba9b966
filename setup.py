"""`pip install -e .` runs CMake. Sources, flags and architectures live in CMakeLists.txt, and only there.

With CS336_TEXT_ONLY=1 the tokenizer alone is built: torch is then needed neither to build it nor to run it.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

from setuptools import Distribution, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent
TEXT_ONLY = os.environ.get("CS336_TEXT_ONLY") == "1"
DEPENDENCIES = ["numpy", "regex", "rich", "tyro>=1.0"]
if not TEXT_ONLY:
    DEPENDENCIES += ["torch>=2.11", "safetensors", "nvtx", "jinja2", "pydantic>=2.8"]


def require(program: str, *candidates: str, install: str) -> None:
    if not any(shutil.which(c) for c in candidates if c):
        raise SystemExit(f"cs336 needs {program} and found none of: {', '.join(c for c in candidates if c)}. {install}")


OLDEST = {"g++": 11, "clang++": 16}  # of C++20: bit_cast, template lambdas, captured structured bindings


def too_old(version: str) -> str | None:
    """Why the compiler that prints this for --version does not do, or None."""
    name = "clang++" if "clang" in version else "g++"
    found = re.search(r"(\d+)\.\d+", version)
    if found is None or int(found[1]) >= OLDEST[name]:
        return None
    return (
        f"cs336 is C++20, and {version.splitlines()[0]} is too old for it: {name} {OLDEST[name]} or newer is needed. "
        f"Install one and name it, e.g. CXX={name}-{OLDEST[name] + 1} pip install -e ."
    )


class CMakeBuild(build_ext):
    def run(self):
        cxx = os.environ.get("CXX", "")
        compilers = [c for c in (cxx, "c++", "g++", "clang++") if c]
        require("a C++20 compiler", *compilers, install="On Debian or Ubuntu: apt install g++")
        compiler = next(c for c in compilers if shutil.which(c))
        if reason := too_old(subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout):
            raise SystemExit(reason)
        require("cmake", "cmake", install="pip install cmake")
        require("ninja", "ninja", install="pip install ninja")
        build = ROOT / "build"
        configure = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
        # An isolated build's interpreter and ninja live in a folder that is gone afterwards: never trust the cache.
        here = [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}"]
        what = f"-DCS336_TEXT_ONLY={'ON' if TEXT_ONLY else 'OFF'}"
        try:
            subprocess.check_call([*configure, *here, what])
            subprocess.check_call(["cmake", "--build", build, "-j", os.environ.get("MAX_JOBS", str(os.cpu_count()))])
        except subprocess.CalledProcessError as error:
            command = " ".join(map(str, error.cmd))
            raise SystemExit(f"building cs336 failed in `{command}`; the compiler's message is above") from None


class Build(build):
    """Libraries first: they are built into cs336/, of which build_py then copies them."""

    sub_commands = sorted(build.sub_commands, key=lambda command: command[0] != "build_ext")


class BinaryDistribution(Distribution):
    def has_ext_modules(self):
        return True


setup(
    cmdclass={"build": Build, "build_ext": CMakeBuild},
    distclass=BinaryDistribution,
    setup_requires=[] if TEXT_ONLY else ["torch==2.13.0"],  # pip installs these for an isolated build
    install_requires=DEPENDENCIES,
    exclude_package_data={"cs336": ["_C*.so"]} if TEXT_ONLY else {},  # of an earlier build
)
