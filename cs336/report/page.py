"""write_report: one page of a run directory; how it looks is page.html and style.css beside this file."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from cs336.report.headline import banner, origin, tiles, verdict
from cs336.report.run import read_run
from cs336.report.section import all_sections
from cs336.utils.files import write_text

HERE = Path(__file__).parent
# C0 controls, which HTML forbids, as their pictures; text keeps its newlines and tabs.
CONTROLS = {c: chr(0x2400 + c) for c in range(32) if chr(c) not in "\n\t"} | {0x7F: "␡"}


def write_report(run_dir: str | Path, path: str | Path | None = None) -> Path:
    """Write run_dir/report.html, or another file: one self-contained page without scripts. Returns its path.

    Reads config.toml, run.json, metrics.jsonl, samples.jsonl, generated.jsonl, evaluation.json, tokenizer_stats.json,
    stages.json and failure.json, as many as are there; the page names the others.
    Raises FileNotFoundError or ValueError if run_dir is not a run directory.
    """
    run = read_run(run_dir)
    parts = [Part(s.id, s.title, content) for s in all_sections() if (content := s.build(run)) is not None]
    return write_page(
        run.path / "report.html" if path is None else Path(path),
        eyebrow="Training report",
        name=run.path.name,
        verdict=verdict(run),
        banners=[b for b in (banner(run), origin(run)) if b],
        tiles=tiles(run),
        parts=parts,
    )


class Part(NamedTuple):
    """A section of a page."""

    id: str
    title: str
    content: Mapping[str, Any]
    """What its template is filled with."""
    template: str = ""
    """Of sections/. Empty: the id's."""


def filled(parts: Iterable[Part]) -> list[Part]:
    """Those that hold more than a note."""
    return [part for part in parts if any(value for key, value in part.content.items() if key != "note")]


def write_page(
    path: Path, *, parts: Iterable[Part], banners: Sequence[Any] = (), tiles: Sequence[Any] = (), **content: Any
) -> Path:
    """Fill page.html, and return the path. content: its eyebrow, name and verdict."""
    content["sections"] = [
        {
            "id": p.id,
            "title": p.title,
            "body": render(f"sections/{p.template or p.id.replace('-', '_')}.html", **p.content),
        }
        for p in parts
    ]
    style = Markup((HERE / "style.css").read_text(encoding="utf-8"))
    html = render("page.html", style=style, banners=banners, tiles=tiles, **content)
    write_text(path, html.translate(CONTROLS).encode("utf-8", "replace").decode())
    return path


def render(template: str, **content: Any) -> Markup:
    return Markup(_environment().get_template(template).render(content))


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
