"""`pip install -e .` runs CMake. Sources, flags and architectures live in CMakeLists.txt, and only there."""

import os
import pathlib
import shutil
import subprocess
import sys

from setuptools import Distribution, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent


def require(program: str, *candidates: str, install: str) -> None:
    if not any(shutil.which(c) for c in candidates if c):
        raise SystemExit(f"cs336 needs {program} and found none of: {', '.join(c for c in candidates if c)}. {install}")


class CMakeBuild(build_ext):
    def run(self):
        require("a C++20 compiler", os.environ.get("CXX", ""), "c++", "g++", "clang++", install="Debian/Ubuntu: apt install g++")
        require("cmake", "cmake", install="pip install cmake")
        require("ninja", "ninja", install="pip install ninja")
        build = ROOT / "build"
        python = f"-DPython_EXECUTABLE={sys.executable}"
        try:
            subprocess.check_call(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", python])
            subprocess.check_call(["cmake", "--build", build, "-j", os.environ.get("MAX_JOBS", str(os.cpu_count()))])
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"building cs336 failed: `{' '.join(map(str, error.cmd))}`; the compiler's message is above") from None


class BinaryDistribution(Distribution):
    def has_ext_modules(self):
        return True


setup(cmdclass={"build_ext": CMakeBuild}, distclass=BinaryDistribution)
