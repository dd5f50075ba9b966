"""`cs336 data VERB`."""

from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from cs336.cli.common import Device, MaybePath, Path, Stopped, check_output

if TYPE_CHECKING:
    from cs336.data.recipe import Recipe


def build(
    recipe: Positional[Path],
    output: MaybePath = None,
    engine: Literal["local", "ray"] = "local",
    address: Annotated[str, arg(metavar="HOST:PORT")] = "",
    workers: int = 0,
    dry_run: bool = False,
) -> None:
    """From sources to token shards, as a recipe says.

    Reads the sources, filters, deduplicates, tokenizes, and writes report.html. What is done is not done again: after
    Ctrl-C, a crash or a change of the recipe the same command goes on.

    Args:
        recipe: a TOML file; docs/data.md names its keys.
        output: the directory of the build, in place of the recipe's.
        engine: local (processes of this machine) or ray.
        address: of a Ray cluster that runs; without one, Ray is started here.
        workers: processes of the engine local; 0: one a core.
        dry_run: print the plan and an estimate from a sample, and build nothing.
    """
    from cs336.data.build.estimate import estimate
    from cs336.data.build.job import Build
    from cs336.report import write_build_report
    from cs336.utils.config import parse, to_table

    found = _recipe(recipe)
    if output is not None:
        found = parse(type(found), to_table(found) | {"output": str(output)})
    job = Build(found, engine=engine, address=address or None, workers=workers or None)
    if dry_run:
        for line in estimate(job):
            print(line)
        return
    job.run()
    print(f"open {write_build_report(found.output)} in a browser")


def _recipe(path: Path) -> "Recipe":
    """With the steps that run language models only where it is no recipe without them: these load torch."""
    from cs336.data.recipe import Recipe
    from cs336.utils.config import load

    try:
        return load(Recipe, path)
    except ValueError:
        from cs336.inference.stages import ModelRecipe

        return load(ModelRecipe, path)


def demo(
    run_dir: Path = Path("runs/data-demo"),  # noqa: B008 (immutable)
    pages: int = 500,
    tokens: int = 300_000,
    seeds: int = 1,
    device: Device = "auto",
) -> None:
    """The whole recipe on any machine, without a network: a crawl, two builds of it, a model on each, a report.

    The crawl is made of the running Python's documentation, with copies, foreign text, spam and broken records planted.

    Args:
        run_dir: where everything is written; the same command goes on with what is there.
        pages: of documentation.
        tokens: that each model is trained on.
        seeds: models of each kind; 0: no models.
    """
    from cs336.data_demo import DataDemo, data_demo
    from cs336.utils.stages import Interrupted

    try:
        data_demo(DataDemo(run_dir, pages=pages, tokens=tokens, seeds=seeds, device=device))
    except Interrupted:
        raise Stopped from None


def stdlib(output: Annotated[Positional[Path], arg(metavar="OUTPUT")], megabytes: float = 0.0) -> None:
    """Write the running Python's standard library as JSON lines, a corpus that every machine has.

    A line a module, {"text": its source}, then the topics of help(): 10 to 30 MB.

    Args:
        output: the file, for `cs336 tokenizer` and `--text`.
        megabytes: the first documents, up to so much text; 0: all.
    """
    from cs336.data.stdlib import stdlib_documents, stdlib_name
    from cs336.utils.counted import counted
    from cs336.utils.files import write_json_lines

    if not 0 <= megabytes < float("inf"):
        raise ValueError(f"megabytes must be finite and at least 0, got {megabytes}: 0 is all")
    check_output(output)
    documents, size = list[str](), 0
    for text in stdlib_documents():
        size += len(text.encode())
        if megabytes and size > megabytes * 1e6 and documents:
            break
        documents.append(text)
    if not documents:
        raise ValueError(f"{stdlib_name()} holds no sources, as an embedded one does: use a whole Python")
    write_json_lines(output, ({"text": text} for text in documents))
    print(f"wrote {counted(len(documents), 'document')} of {stdlib_name()} to {output}")
