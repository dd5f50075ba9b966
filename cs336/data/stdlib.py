"""The Python standard library of the running interpreter as a corpus: real text, on every machine, no download.

About 30 MB where Python was built with its tests, 10 MB in a distribution's package, almost nothing in an embedded one.
"""

import os
import pathlib
import sys
import sysconfig
import zipfile
from collections.abc import Iterator

# Installed packages are not Python's own; encodings and pydoc_data are generated tables.
LEFT_OUT = {"site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}


def stdlib_documents() -> Iterator[str]:
    """Every module's source in the order of their paths, then the reference topics of `help()`, one document each.

    Sources that are not UTF-8, or empty, are left out.
    """
    for source in _sources():
        try:
            text = source.decode("utf-8")
        except UnicodeDecodeError:
            continue  # test data for the decoders
        if text.strip() and "\0" not in text:
            yield text
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name in sorted(topics):
        yield topics[name]


def stdlib_name() -> str:
    """Names this standard library: another version of Python is another corpus."""
    return f"Python {sys.version.split()[0]} at {_root()}"


def _root() -> pathlib.Path:
    return pathlib.Path(sysconfig.get_path("stdlib"))


def _sources() -> Iterator[bytes]:
    for directory, folders, names in os.walk(_root()):
        folders[:] = sorted(set(folders) - LEFT_OUT)
        for path in (pathlib.Path(directory, name) for name in sorted(names) if name.endswith(".py")):
            if path.is_file():  # Debian links some to /etc, which an image may lack
                yield path.read_bytes()
    for archive in (p for p in sys.path if p.endswith(".zip") and zipfile.is_zipfile(p)):
        with zipfile.ZipFile(archive) as file:
            for name in sorted(file.namelist()):
                if name.endswith(".py") and not LEFT_OUT & set(pathlib.PurePosixPath(name).parts):
                    yield file.read(name)
