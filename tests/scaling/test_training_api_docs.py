"""The worked example of docs/scaling.md does what it says."""

import contextlib
import re
import shlex

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from scaling.api_server import ROOT, program

from cs336.cli import main
from cs336.scaling import EPOCH
from cs336.scaling.api import Store
from cs336.scaling.api.contest import Contest

TEXT = (ROOT / "docs/scaling.md").read_text()
SNIPPETS = dict(re.findall(r"<!-- snippet: api (\w+) -->\n```\w+\n(.*?)\n```", TEXT, re.DOTALL))


def test_the_example(tmp_path, capsys):
    add, serve = (shlex.split(line, comments=True) for line in SNIPPETS["sh"].splitlines())
    with contextlib.chdir(tmp_path):
        assert main(add[1:]) == 0
        assert serve[:5] == ["cs336", "scaling", "api", "serve", "lab"]
        process, url = program(tmp_path / "lab", *serve[5:])
        try:
            names = {}
            exec(compile(SNIPPETS["python"].replace("http://127.0.0.1:8336", url), "scaling.md", "exec"), names)
            account = names["client"].account()
            reveal = re.search(r"`cs336 (scaling api reveal lab [^`]*)`", TEXT)[1]
            assert main(shlex.split(reveal)) == 0
        finally:
            process.terminate()
            assert process.wait(60) == 0
            process.stdout.close()
    assert len(names["runs"]) == 28
    assert account.reserved == 0
    assert account.charged == pytest.approx(sum(run.flops for run in names["runs"]))
    best = EPOCH.optimum(1e21)
    assert names["best"].loss == pytest.approx(best.loss, rel=0.02)
    assert names["best"].parameters == pytest.approx(best.parameters, rel=0.3)
    (row,) = Contest(Store(tmp_path / "lab")).board().rows
    assert row.final
    assert row.error < 0.02
    assert float(reveal.rpartition(" ")[2]) == pytest.approx(best.loss, abs=0.005)
