"""What README.md tells people to type does what it says."""

import contextlib
import itertools
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import venv

import pytest

from cs336.training import TrainConfig

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"<!-- snippet: (\w+) ?(\S*) -->\n```\w+\n(.*?)\n```", README, re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """An empty directory but for the README's files, where its commands are typed in order."""
    directory = tmp_path_factory.mktemp("readme")
    for kind, name, text in SNIPPETS:
        if kind == "toml":
            (directory / name).write_text(text)
    return directory


def commands():
    (text,) = (text for kind, _, text in SNIPPETS if kind == "sh")
    return text.replace("--megabytes 1 ", "--megabytes 0.3 ").splitlines()


def test_the_configuration_is_one(workplace):
    config = TrainConfig.from_toml(workplace / "train.toml")
    assert config.data.val == pathlib.Path("tokens/val")


def test_every_command_and_program_runs(workplace):
    config = workplace / "train.toml"
    config.write_text(config.read_text().replace("200steps", "20steps"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for line in commands():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "cs336"
        command = [sys.executable, "-m", "cs336", *arguments]
        done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert (workplace / "comparison.html").exists()
    assert (workplace / "corpus.jsonl").stat().st_size < 400_000
    programs = [text for kind, _, text in SNIPPETS if kind == "python"]
    assert len(programs) == README.count("```python")  # every program is tried
    for text in programs:
        with contextlib.chdir(workplace):
            exec(compile(text.replace("101", "5"), "README.md", "exec"), {})


def test_the_first_screen_has_every_verb():
    from cs336.cli.program import verb_paths

    table = README[README.index("## What you can do") : README.index("### From text to a model")]
    typed = set()
    for command in re.findall(r"`cs336 ([^`]*)`", table):
        typed |= {" ".join(words) for words in itertools.product(*(w.split(r"\|") for w in command.split()))}
    for path in verb_paths():
        verb = " ".join(path)
        if path[:2] != ("scaling", "api"):  # of the training API the first steps
            assert any(f"{command} ".startswith(f"{verb} ") for command in typed), verb
    assert README[: README.index(table)].count("\n") < 50


def test_every_page_is_linked_and_every_link_leads_somewhere():
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")}
    links = [link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", README)]
    assert pages <= {page for page, _, _ in links}
    for page, _, part in links:
        text = (ROOT / page).read_text() if page else README
        headings = [re.sub(r"[^\w\s-]", "", line.lstrip("# ")) for line in text.splitlines() if line.startswith("#")]
        assert not part or part in [heading.lower().replace(" ", "-") for heading in headings], (page, part)


def test_the_index_has_every_page_once():
    text = (ROOT / "docs/README.md").read_text()
    listed = re.findall(r"^- \[[^]]+\]\(([^)]+)\): .", text, re.MULTILINE)
    docs = ROOT / "docs"
    pages = [path.relative_to(docs).as_posix() for kind in ("*.md", "*.html") for path in docs.rglob(kind)]
    assert sorted(listed) == sorted(set(pages) - {"README.md"})


def test_the_readme_is_short():
    assert README.count("\n") < 300


def command(name):
    (found,) = re.findall(rf"<!-- command: {name} -->\n```sh\n(.+?)\n```", README)
    return found


def test_the_commands_differ_only_in_what_they_must():
    keep = command("keep torch")
    assert "torch" not in keep.replace("--no-build-isolation", "")
    assert command("quickstart").replace("torch==2.13.0 ", "") == f"{keep} && cs336 quickstart"
    assert command("test").startswith(command("quickstart").partition("-e .")[0])


@pytest.mark.slow
@pytest.mark.parametrize("version", ["2.11.0", "2.12.1+cu130", "2.14.1"])
def test_a_torch_that_is_there_is_kept(tmp_path, version):
    """pip, in an environment that has another torch, would install nothing but cs336."""
    venv.create(tmp_path / "env")
    (packages,) = tmp_path.glob("env/lib/*/site-packages")
    mine = [path for path in sys.path if path.endswith("site-packages")]
    packages.joinpath("mine.pth").write_text("\n".join(mine))
    packages.joinpath(f"torch-{version}.dist-info").mkdir()
    packages.joinpath(f"torch-{version}.dist-info/METADATA").write_text(f"Name: torch\nVersion: {version}\n")
    install = shlex.split(command("keep torch").rpartition("&& ")[2])
    assert install[:2] == ["pip", "install"]
    dry = [tmp_path / "env/bin/python", "-m", "pip", *install[1:], "--dry-run", "--quiet", "--report", "-"]
    done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True)
    installed = {found["metadata"]["name"] for found in json.loads(done.stdout)["install"]}
    assert installed == {"cs336"}
