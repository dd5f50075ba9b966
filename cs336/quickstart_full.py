"""What `cs336 quickstart --full` does after pretraining: answers, a verified reward, int8, and a measure of each model.

The alignment demo goes on from the pretrained model; what comes of it is quantised; all of them are asked the same sums
and read the same held-out text.
"""

import json
import pathlib
import tempfile
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cs336.align_demo import AlignDemo, align_demo, split_sums, sums_right
from cs336.evaluation import evaluate
from cs336.inference.load import load_model, load_tokenizer
from cs336.inference.quantization import compress
from cs336.utils.files import write_json
from cs336.utils.stages import Outcome, Stage

ALIGN, INT8, MEASURED = "align", "int8", "full.json"


@dataclass(frozen=True)
class Full:
    """The stages after pretraining, of a run in run_dir."""

    run_dir: pathlib.Path
    device: str
    seed: int
    minutes: float
    """For SFT and GRPO together."""
    curated: str | None
    """The report of the text's cleaning, below run_dir; None where a corpus was given."""
    console: Console

    @property
    def demo(self) -> AlignDemo:
        return AlignDemo(
            self.run_dir / ALIGN, self.run_dir / "export", device=self.device, seed=self.seed, minutes=self.minutes
        )

    @property
    def models(self) -> dict[str, pathlib.Path]:
        """By what made them, in order."""
        places = {"pretraining": self.run_dir / "export"}
        places |= {stage: self.run_dir / ALIGN / stage / "export" for stage in ("sft", "dpo", "grpo")}
        return places | {"int8": self.run_dir / INT8}

    def stages(self) -> list[Stage]:
        models = self.models
        return [
            Stage(
                "align",
                "SFT, DPO and GRPO on sums, with a verifier",
                self.align,
                outputs=(f"{ALIGN}/grpo/export/model.safetensors", f"{ALIGN}/results.json"),
                inputs=(models["pretraining"],),
                settings={"seed": self.seed, "minutes": self.minutes},
            ),
            Stage(
                "int8",
                "a quarter of the bytes",
                self.int8,
                outputs=(f"{INT8}/config.json",),
                inputs=(models["grpo"],),
                kept=(INT8,),
            ),
            Stage(
                "compare",
                "measure every model",
                self.compare,
                outputs=(MEASURED,),
                inputs=(*models.values(), self.run_dir / "tokens" / "val"),
                settings={"seed": self.seed},
            ),
        ]

    def align(self) -> Outcome:
        report = align_demo(self.demo, Console(quiet=True))
        rows = json.loads((self.run_dir / ALIGN / "results.json").read_text(encoding="utf-8"))["rows"]
        right = {row["model"]: row["accuracy"] for row in rows}
        return Outcome(f"from {right['sft']:.1%} to {right['grpo']:.1%} of sums that it never saw: {report} says how")

    def int8(self) -> Outcome:
        out = self.run_dir / INT8
        if not out.exists():  # renamed when it is whole: one that is there was made of these inputs
            with tempfile.TemporaryDirectory(dir=self.run_dir, prefix=".int8-") as folder:
                compress(self.models["grpo"], pathlib.Path(folder) / INT8, "int8")
                (pathlib.Path(folder) / INT8).rename(out)
        before, after = (_mebibytes(model) for model in (self.models["grpo"], out))
        return Outcome(f"{before:.2f} MiB of weights -> {after:.2f} MiB")

    def compare(self) -> Outcome:
        tested, rows = split_sums(self.seed)[1], list[dict[str, Any]]()
        for name, place in self.models.items():
            model = load_model(place, self.device)
            bits = evaluate(model, load_tokenizer(place), self.run_dir / "tokens" / "val").bits_per_byte
            right, size = sums_right(place, tested, self.device), _mebibytes(place)
            where = str(place.relative_to(self.run_dir))
            rows.append({"after": name, "sums": right, "bits_per_byte": bits, "mebibytes": size, "where": where})
        reports = {stage: f"{ALIGN}/{stage}/report.html" for stage in ("sft", "dpo", "grpo")}
        if self.curated is not None:
            reports = {"cleaning": self.curated} | reports
        found = {"rows": rows, "tested": len(tested), "reports": reports, "rewarded": f"{ALIGN}/grpo"}
        write_json(self.run_dir / MEASURED, found)
        self.console.print(_table(rows))
        by_name = {row["after"]: row["sums"] for row in rows}
        return Outcome(f"sums that are right: {by_name['sft']:.1%} after SFT, {by_name['int8']:.1%} in int8")

    def say_what_is_next(self) -> None:
        commands = {
            f"cs336 chat {self.models['grpo']}": "ask it for 47+68",
            f"cs336 serve {self.models['int8']}": "an OpenAI-compatible server, and a page to chat on",
            f"cs336 plan run --data {self.run_dir / 'tokens' / 'train'} --time 24h --gpu H100": "a larger one",
        }
        self.console.print(Text("next", "bold"))
        for command, what in commands.items():
            self.console.print(Text.assemble(f"    {command}", (f"  # {what}", "dim")))


def _mebibytes(model: pathlib.Path) -> float:
    """Of the files with its weights."""
    return sum(path.stat().st_size for path in model.glob("*.safetensors")) / 2**20


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("after", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for head in ("sums that are right", "bits per byte", "MiB"):
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(row["after"], f"{row['sums']:.1%}", f"{row['bits_per_byte']:.3f}", f"{row['mebibytes']:.2f}")
    return table
