"""The licence of a source file, where it says so: an SPDX line at its head, or the licence file of its tree."""

import functools
import pathlib
import re

SPDX = re.compile(rb"SPDX-License-Identifier:\s*([A-Za-z0-9.+() -]{2,80}?)\s*(?:\*/|-->|[\r\n]|$)")
NAMES = ("LICENSE", "LICENCE", "COPYING", "LICENSE.txt", "LICENSE.md", "LICENCE.txt", "LICENCE.md", "COPYING.txt")
HEAD = 4096
PHRASES = (  # the first that stands in a licence's beginning, white space apart
    ("Apache License Version 2.0", "Apache-2.0"),
    ("GNU AFFERO GENERAL PUBLIC LICENSE", "AGPL-3.0"),
    ("GNU LESSER GENERAL PUBLIC LICENSE", "LGPL"),
    ("GNU GENERAL PUBLIC LICENSE Version 3", "GPL-3.0"),
    ("GNU GENERAL PUBLIC LICENSE Version 2", "GPL-2.0"),
    ("Mozilla Public License Version 2.0", "MPL-2.0"),
    ("PYTHON SOFTWARE FOUNDATION LICENSE", "PSF-2.0"),
    ("Permission is hereby granted, free of charge", "MIT"),
    ("Neither the name", "BSD-3-Clause"),
    ("Redistributions of source code must retain", "BSD-2-Clause"),
    ("Permission to use, copy, modify, and/or distribute", "ISC"),
    ("This is free and unencumbered software", "Unlicense"),
)


def licence_of(path: pathlib.Path, content: bytes, root: pathlib.Path) -> str | None:
    """An SPDX expression; None where neither the file nor a folder of it up to `root` names one that is known."""
    if found := SPDX.search(content[:HEAD]):
        return found[1].decode()
    return _of_folder(path.parent, root)


@functools.lru_cache(4096)
def _of_folder(folder: pathlib.Path, root: pathlib.Path) -> str | None:
    for name in NAMES:
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                text = " ".join(file.read(HEAD).decode("utf-8", "replace").split())
            return next((licence for phrase, licence in PHRASES if phrase.lower() in text.lower()), None)
    above = folder != root and root in folder.parents
    return _of_folder(folder.parent, root) if above else None
