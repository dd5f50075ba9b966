"""Rewrite the tables of README.md and docs/ from benchmarks/results/*.json:  python -m benchmarks.report

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`, where NAME is a run of the results, or `headline`:
a row for each.
"""

import itertools
import json
import math
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.alignment_tables import align_ladder, grpo_step, gsm8k, sft
from benchmarks.decoding_tables import decoding, quantization
from benchmarks.mixer_tables import mixers
from benchmarks.parallel_tables import collectives, parallel, parallel_engine, parallel_equal, parallel_plan
from benchmarks.scaling_tables import scaling_forecast
from benchmarks.training_tables import ladder, mfu, optimizers, overhead, recipes, train

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ("benchmarks", "architectures", "attention", "compression", "parallel")
PAGES = ("README.md", *(f"docs/{page}.md" for page in DOCS))
MARKED = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)
PEERS = {"eager": "eager", "compile": "torch.compile", "triton": "our Triton", "liger": "Liger", "quack": "QuACK"}
PEERS |= {"fused": "torch fused", "foreach": "torch foreach"}  # of the optimizer
PEERS |= {"cudnn": "cuDNN", "fa2": "FA2", "fa3": "FA3", "padded": "our dense kernel"}  # of attention
PEERS |= {"deterministic": "ours, deterministic"}
PEERS |= {"flashinfer": "FlashInfer", "cce": "CCE"}  # of inference; of a linear layer's losses
PEERS |= {"cublas": "cuBLAS, bf16", "torch": "torch"}  # of linear layers of few rows
PEERS |= {"grouped": "torch's grouped products"}  # of mixtures of experts
SIZES = (64, 256)  # MB of x that the README shows; the file has more
LOSSES_SHOWN = 12
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}

Row = dict[str, Any]
Results = dict[str, dict[str, Any]]  # machine -> {run name: {"header", "rows"}}


def load(folder: pathlib.Path = ROOT / "benchmarks/results") -> Results:
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def render(text: str, results: Results) -> str:
    """A page with every table written anew. Raises ValueError where a marker is missing or left open."""
    opened, whole = text.count("<!-- table: "), len(MARKED.findall(text))
    if not opened:
        raise ValueError("the page has no tables: write `<!-- table: NAME -->` and `<!-- /table -->` on two lines")
    if opened != whole or text.count("<!-- /table -->") != whole:
        raise ValueError(
            f"the page opens {opened} tables and {whole} are whole: each needs a NAME and `<!-- /table -->`"
        )
    return MARKED.sub(lambda m: m[1] + table(m[2], results) + m[4], text)


def table(name: str, results: Results) -> str:
    """Markdown for one run on every machine that has it."""
    if name == "headline":
        return "\n".join(headline(results)) + "\n"
    runs = [machine[name] for machine in results.values() if name in machine]
    if not runs:
        return f"Not measured yet: `{name}` is in no file of `benchmarks/results/`.\n"
    body = BODIES.get(name, op)
    return "\n".join("\n".join([*body(run["rows"]), "", where(run["header"])]) + "\n" for run in runs)


def where(header: dict[str, Any]) -> str:
    made = f"commit {header['commit'] or 'unknown'}, {header['date']}; `{header['command']}`"
    if "gpus" in header:
        made = f"{header['gpus']} GPUs, each run on one; {made}"
    if "beside" in header:
        made += f"; {header['beside']}"
    if "cpu" in header:
        peers = ", ".join(f"{name} {version}" for name, version in header["peers"].items())
        return f"<sub>{header['cpu']}, {header['cores']} cores, Python {header['python']}, {peers}; {made}</sub>"
    names = {"driver": "driver", "CUDA": "cuda", "torch": "torch", "triton": "triton"}
    versions = {name: header.get(key) for name, key in names.items()} | header["peers"]
    facts = [f"{name} {version}" for name, version in versions.items() if version]
    device = f"<sub>{header['gpu'] or 'CPU'}, {', '.join(facts)}"
    if "roofs" not in header:
        return f"{device}; {made}</sub>"
    roofs = [f"copy {header['roofs']['copy_gbps'] / 1e3:.2f} TB/s"]
    if header["roofs"]["matmul_bf16_tflops"]:
        roofs.append(f"bf16 matmul {header['roofs']['matmul_bf16_tflops']:.0f} TFLOP/s")
    return f"{device}; roofs measured in the same run: {', '.join(roofs)}; {made}</sub>"


# ---- ops ----


def op(rows: list[Row]) -> Iterator[str]:
    """A table a pass: N by percent of the roof and how many times longer each peer takes, at both sizes."""
    cases = [{row["variant"]: row for row in group} for _, group in itertools.groupby(rows, case)]
    timed = [c for c in cases if "seconds" in c.get("native", {})]
    present = [p for p in PEERS if any("seconds" in c.get(p, {}) for c in timed)]
    for name in dict.fromkeys(row["pass"] for row in rows if not row["pass"].startswith("host")):
        shown = {(c["native"]["shape"][-1], megabytes(c["native"])): c for c in timed if c["native"]["pass"] == name}
        yield f"`{rows[0]['op']}_{name}`, native: its share of the copy roof, and how many times as fast as each peer"
        yield ""
        yield "| N | % of roof | " + " | ".join(PEERS[p] for p in present) + " |"
        yield "| ---: " * (2 + len(present)) + "|"
        for width in sorted({n for n, _ in shown}):
            pair = [shown.get((width, size), {}) for size in SIZES]
            cells = [both(c.get("native", {}).get("percent_of_roof") for c in pair)]
            cells += [both((ratio(c, p) for c in pair), ".2f") for p in present]
            yield f"| {width} | " + " | ".join(cells) + " |"
        yield ""
    yield f"Two numbers: x of {SIZES[0]} MB / {SIZES[1]} MB. {losses(timed)}"
    yield from host(c for c in cases if "cs336" in c)


def optimizer(rows: list[Row]) -> Iterator[str]:
    """A row for each list of parameters: percent of the roof and how many times longer each peer takes."""
    cases = [{row["variant"]: row for row in group} for _, group in itertools.groupby(rows, case)]
    timed = [c for c in cases if "seconds" in c.get("native", {})]
    present = [p for p in PEERS if any("seconds" in c.get(p, {}) for c in timed)]
    yield "One step, native: its share of the copy roof, and how many times as fast as each peer"
    yield ""
    yield "| parameters | % of roof | " + " | ".join(PEERS[p] for p in present) + " |"
    yield "| --- | ---: " + "| ---: " * len(present) + "|"
    for c in timed:
        native = c["native"]
        cells = [both([native.get("percent_of_roof")]), *(both([ratio(c, p)], ".2f") for p in present)]
        yield f"| {native['shape'][0] / 1e6:.0f} M {native['dtype']} | " + " | ".join(cells) + " |"
    yield from host(c for c in cases if "cs336" in c)


def rated(rows: list[Row]) -> Iterator[str]:
    """A row for each case: native's rate, its share of the roof, and how many times as fast as each peer it is.

    A run of several ops names each in its rows. Where there is no native kernel the row is our Triton kernel's.
    """
    several = len({row["op"] for row in rows}) > 1
    cases = [{row["variant"]: row for row in group} for _, group in itertools.groupby(rows, case)]
    cases = [c if "seconds" in c.get("native", {}) else c | {"native": c.get("triton", {})} for c in cases]
    timed = [c for c in cases if "seconds" in c["native"]]
    present = [p for p in PEERS if any("seconds" in c.get(p, {}) for c in timed)]
    yield "Native: its rate, its share of the roof, and how many times as fast as each peer"
    yield ""
    yield "| " + " | ".join(["pass", "shape", "us", "rate", "% of roof", *(PEERS[p] for p in present)]) + " |"
    yield "| --- | --- | ---: | ---: | ---: " + "| ---: " * len(present) + "|"
    for c in timed:
        native = c["native"]
        rate = f"{native['tflops']:.0f} TFLOP/s" if "tflops" in native else f"{native['gbps']:.0f} GB/s"
        cells = [f"{1e6 * native['seconds']:.1f}", rate, both([native.get("percent_of_roof")])]
        cells += [both([ratio(c, p)], ".2f") for p in present]
        name = f"{native['op']} {native['pass']}" if several else native["pass"]
        name += ", Triton" if native["variant"] == "triton" else ""
        yield f"| {name} | {'x'.join(map(str, native['shape']))} | " + " | ".join(cells) + " |"
    yield ""
    yield losses(timed, sized=False) if present else "No peer ran."


def launches(rows: list[Row]) -> Iterator[str]:
    yield "| kernel, of bf16 | registers at launch | threads | shared memory, KiB |"
    yield "| --- | ---: | ---: | ---: |"
    for row in rows:
        shared = f"{row['shared_bytes'] / 1024:.1f}"
        yield f"| `{row['kernel']}` | {row['registers']} | {row['threads']} | {shared} |"


def case(row: Row) -> tuple:
    return row["op"], row["pass"], tuple(row["shape"]), row["dtype"]


def megabytes(row: Row) -> float:
    return math.prod(row["shape"]) * ITEMSIZE[row["dtype"]] / 2**20


def ratio(c: dict[str, Row], peer: str) -> float | None:
    """How many times as fast as the peer native is."""
    ours, theirs = (c.get(v, {}).get("seconds") for v in ("native", peer))
    return theirs / ours if ours and theirs else None


def both(values: Iterable[float | None], form: str = ".1f") -> str:
    cells = ["–" if value is None else format(value, form) for value in values]
    return "–" if set(cells) == {"–"} else " / ".join(cells)


def losses(cases: list[dict[str, Row]], sized: bool = True) -> str:
    """Where a peer is faster by more than the noise of both, in the whole sweep; sized: a shape is that of x, in MB."""
    found, close = [], 0
    several = len({c["native"]["op"] for c in cases}) > 1
    for c in cases:
        native = c["native"]
        name = f"{native['op']} {native['pass']}" if several else native["pass"]
        for peer in PEERS:
            faster = ratio(c, peer)
            if faster is not None and faster * (1 + native["spread"] + c[peer]["spread"]) < 1:
                shape = "x".join(map(str, native["shape"]))
                size = f" ({megabytes(native):g} MB)" if sized else ""
                found.append((faster, f"{PEERS[peer]} in {name} {shape}{size}: {faster:.2f}"))
            elif faster is not None and faster < 0.95:
                close += 1
    if not cases:
        return "Native did not run."
    sizes = [megabytes(c["native"]) for c in cases]
    sweep = f"the sweep's {len(cases)} cases" + (f", x of {min(sizes):g} MB to {max(sizes):g} MB" if sized else "")
    if not found:
        within = f"; in {close} by more than 5 %, which the noise there exceeds" if close else ""
        return f"In none of {sweep} is a peer faster by more than the noise{within}."
    shown = "; ".join(sentence for _, sentence in sorted(found)[:LOSSES_SHOWN])
    more = f"; and {len(found) - LOSSES_SHOWN} more in the file" if len(found) > LOSSES_SHOWN else ""
    return f"Of {sweep}, native loses to {shown}{more}."


def host(cases: Iterable[dict[str, Row]]) -> Iterator[str]:
    """Host time of the public call, where it was measured."""
    calls = []
    for c in cases:
        ours, torchs = (1e6 * c[variant]["seconds"] for variant in ("cs336", "eager"))
        calls.append(f"{c['cs336']['pass'].removeprefix('host ')} {ours:.1f} us (torch {torchs:.1f})")
    if calls:
        yield ""
        yield f"Host time of the public call: {'; '.join(calls)}."


# ---- end to end ----


def engine(rows: list[Row]) -> Iterator[str]:
    """Repeats of one piece of work are one row; peers were measured in another run on the same kind of card."""
    peers = list(dict.fromkeys(name for row in rows for name in row.get("peers_in_another_run", {})))
    yield (
        "| answers' tokens/s | ours | share of the read roof | "
        + " | ".join(f"{p}, in another run" for p in peers)
        + " |"
    )
    yield "| --- | ---: | ---: " + "| ---: " * len(peers) + "|"
    for work, group in itertools.groupby(rows, lambda row: row["work"]):
        found = list(group)
        speeds = " / ".join(f"{row['tokens_per_second']:,.0f}" for row in found)
        share = found[0].get("share_of_read_roof")
        theirs = [found[0].get("peers_in_another_run", {}).get(p) for p in peers]
        cells = [speeds, f"{share:.0%}" if share else "–", *(f"{n:,.0f}" if n else "–" for n in theirs)]
        yield f"| {work} | " + " | ".join(cells) + " |"


def variants(rows: list[Row]) -> Iterator[str]:
    """A row a kind of block, trained alike; its speed as a share of the plainest one's."""
    plain = next((row["tokens_per_second"] for row in rows if row["variant"] == "SwiGLU"), None)
    yield "| variant | parameters | loss, 95 % | tokens a second, of SwiGLU | state, bytes | decodes, error |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for row in rows:
        spread = "" if row["interval"] is None else f" ± {row['interval']:.3f}"
        speed = f"{row['tokens_per_second'] / plain:.2f}" if plain else "–"
        decodes = f"{'yes' if row['decodes'] else 'no'}, {row['decoding_error']:.0e}"
        cells = (f"{row['parameters']:,}", f"{row['loss']:.3f}{spread}", speed, f"{row['state_bytes']:,}", decodes)
        yield f"| {row['variant']} | " + " | ".join(cells) + " |"
    yield ""
    yield f"{rows[0]['tokens']:,} tokens each."


def tokenizer(rows: list[Row]) -> Iterator[str]:
    """Encoding and decoding, a table for each vocabulary; training; linear time; who is not there."""
    ran = [row for row in rows if "skipped" not in row]
    coded = [row for row in ran if row["job"] in ("encode", "decode")]
    for name in dict.fromkeys(row["tokenizer"] for row in coded):
        yield from coding(name, [row for row in coded if row["tokenizer"] == name])
        yield ""
    yield from training([row for row in ran if row["job"] == "train"])
    doubled = [row for row in ran if row["job"] == "double" and "seconds" in row]
    if doubled:
        worst = max(row["seconds"][-1] / row["seconds"][0] for row in doubled)
        texts = ", ".join(f"`{text}`" for text in dict.fromkeys(row["text"] for row in doubled))
        yield ""
        yield f"{texts}, repeated to 512 KB, take at most {worst:.1f} times as long to encode as repeated to 64 KB."
    if absent := ", ".join(row["tool"] for row in rows if "skipped" in row):
        yield ""
        yield f"Not installed here: {absent}."


def data(rows: list[Row]) -> Iterator[str]:
    """Pages a CPU second from a crawl to documents."""
    ran = [row for row in rows if "skipped" not in row]
    yield "| | pages kept | pages a CPU second | CPU time, ours = 1 |"
    yield "| --- | ---: | ---: | ---: |"
    for row in ran:
        kept = f"{row['kept']} of {row['pages']}"
        yield f"| {row['tool']} | {kept} | {row['pages_per_cpu_second']:.1f} | {row['to_ours']:.1f} |"
    if absent := ", ".join(row["tool"] for row in rows if "skipped" in row):
        yield ""
        yield f"Not installed here: {absent}."


def passages(rows: list[Row]) -> Iterator[str]:
    """MB a CPU second of each text, by each tool."""
    texts = list(dict.fromkeys((row["text"], row["megabytes"]) for row in rows))
    yield "| MB/s of one core | " + " | ".join(f"{text}, {size:g} MB" for text, size in texts) + " |"
    yield "| --- |" + " ---: |" * len(texts)
    for tool in dict.fromkeys(row["tool"] for row in rows):
        ran = [row for row in rows if row["tool"] == tool]
        cells = (f"{row['megabytes'] / row['seconds']:.1f}" if "seconds" in row else "–" for row in ran)
        yield f"| {tool} | " + " | ".join(cells) + " |"


def curation(rows: list[Row]) -> Iterator[str]:
    """Bits a byte of held-out books after equally many tokens of each side, and the gain over raw with its interval."""
    yield "| text | documents | MB | times read | bits a byte, a seed each | mean | gain over raw, 95 % |"
    yield "| --- | ---: | ---: | ---: | --- | ---: | ---: |"
    for row in rows:
        seeds = ", ".join(f"{bits:.3f}" for bits in row["bits_per_byte"])
        spread = "" if row["gain_half_width"] is None else f" ± {row['gain_half_width']:.3f}"
        gain = "–" if row is rows[0] else f"{row['gain']:+.3f}{spread}"
        size = f"{row['documents']:,} | {row['megabytes']:.1f} | {row['epochs']:.2f}"
        yield f"| {row['side']} | {size} | {seeds} | {row['mean']:.3f} | {gain} |"
    yield ""
    yield f"{rows[0]['tokens']:,} tokens each."


def coding(name: str, rows: list[Row]) -> Iterator[str]:
    columns = list(dict.fromkeys((row["text"], row["threads"]) for row in rows))
    yield (
        f"Vocabulary `{name}`: MB of text a second, cold / warm; a CPU second on one thread, else by the clock; and "
        "the most memory of the row at its peak, the library and the texts included"
    )
    yield ""
    heads = [f"{text}, {threads} thread{'s' * (threads > 1)}" for text, threads in columns]
    yield "| | | " + " | ".join([*heads, "peak MB"]) + " |"
    yield "| --- | --- " + "| ---: " * (len(columns) + 1) + "|"
    cells: dict[tuple, Row] = {}
    for row in rows:
        cells[row.get("output", row["job"]), row["tool"], row["text"], row["threads"]] = row
    behind = []
    for output, tool in dict.fromkeys(key[:2] for key in cells):
        found = [cells.get((output, tool, *column), {}) for column in columns]
        peak = max((row["peak_mb"] for row in found if "peak_mb" in row), default=None)
        yield f"| {output} | {tool} | " + " | ".join([*map(speeds, found), both([peak], ".0f")]) + " |"
        for row, column in zip(found, columns, strict=True):
            ours = cells.get((output, "cs336", *column), {})
            behind += [
                f"{tool} {output} {column[0]} x{column[1]} {which} {speed(row, which) / speed(ours, which):.2f}x"
                for which in ("cold", "warm")
                if speed(row, which) > speed(ours, which) > 0
            ]
    yield ""
    if other := {f"{row['tool']} on {row['text']}" for row in rows if row.get("ids") == "other"}:
        yield f"Other ids than ours, or another text: {', '.join(sorted(other))}."
    else:
        yield "All give the same ids and texts."
    yield ""
    yield f"Ahead of cs336: {'; '.join(behind)}." if behind else "Nothing is ahead of cs336."


def speed(row: Row, which: str) -> float:
    seconds = row.get(f"{which}_{'cpu' if row.get('threads') == 1 else 'wall'}")
    return row["megabytes"] / seconds if seconds else 0.0


def speeds(row: Row) -> str:
    if not speed(row, "cold"):
        return "–"
    mark = " (other ids)" if row.get("ids") == "other" else ""
    return f"{speed(row, 'cold'):.1f} / {speed(row, 'warm'):.1f}{mark}"


def training(rows: list[Row]) -> Iterator[str]:
    columns = list(dict.fromkeys((row["vocab_size"], row["threads"]) for row in rows))
    if not columns:
        return
    yield (
        f"Training on {rows[0]['megabytes']:.0f} MB: seconds (of CPU on one thread, else by the clock), and MB of "
        "memory at the peak, the library itself included"
    )
    yield ""
    yield "| | " + " | ".join(f"{size:,}, {n} thread{'s' * (n > 1)}" for size, n in columns) + " |"
    yield "| --- " + "| ---: " * len(columns) + "|"
    cells = {(row["tool"], row["vocab_size"], row["threads"]): row for row in rows}
    for tool in dict.fromkeys(row["tool"] for row in rows):
        found = [cells.get((tool, *column), {}) for column in columns]
        shown = [
            f"{row['cold_cpu' if row['threads'] == 1 else 'cold_wall']:.2f} s, {row['peak_mb']:.0f} MB"
            if "cold_cpu" in row
            else "–"
            for row in found
        ]
        yield f"| {tool} | " + " | ".join(shown) + " |"


# ---- a row a run ----


def headline(results: Results) -> Iterator[str]:
    yield "| | measured | beside | on |"
    yield "| --- | --- | --- | --- |"
    for machine in results.values():
        for name, row in HEADLINES.items():
            if name in machine:
                header = machine[name]["header"]
                device = header.get("gpu") or f"{header['cpu']}, {header['cores']} cores"
                yield f"| {' | '.join(row(machine[name]['rows']))} | {device} |"


def norm_headline(rows: list[Row]) -> tuple[str, str, str]:
    """Of the forward pass with the largest x of those that the tables show, at N = 4096."""
    same = [r for r in rows if r["pass"] == "fwd" and r["shape"][-1] == 4096 and megabytes(r) == SIZES[-1]]
    c = {r["variant"]: r for r in same}
    share = f"{c['native']['percent_of_roof']:.0f} % of what a copy reaches"
    return f"{rows[0]['op']}, bf16, N = 4096", share, beside(c, ("compile", "liger", "quack"))


def adamw_headline(rows: list[Row]) -> tuple[str, str, str]:
    cases = [r for r in rows if r["pass"] == "step" and r["shape"] == rows[0]["shape"] and r["dtype"] == "float32"]
    c = {r["variant"]: r for r in cases}
    share = f"{c['native']['percent_of_roof']:.0f} % of what a copy reaches"
    return f"AdamW, {c['native']['shape'][0] / 1e6:.0f} M parameters", share, beside(c, ("fused", "foreach"))


def beside(c: dict[str, Row], peers: Iterable[str]) -> str:
    return ", ".join(f"{faster:.2f}x {PEERS[p]}" for p in peers if (faster := ratio(c, p)))


def tokenizer_headline(rows: list[Row]) -> tuple[str, str, str]:
    """Of the first vocabulary and text, on one thread, as an array."""
    coded = [r for r in rows if r.get("output") == "numpy" and r.get("threads") == 1 and speed(r, "cold")]
    c = {r["tool"]: r for r in coded if (r["tokenizer"], r["text"]) == (coded[0]["tokenizer"], coded[0]["text"])}
    tool = max((t for t in c if t != "cs336"), key=lambda t: speed(c[t], "cold"))
    what = f"encode {coded[0]['text']}, {coded[0]['tokenizer']}, one thread"
    return what, f"{speeds(c['cs336'])} MB/s, cold / warm", f"{tool}, the fastest peer: {speeds(c[tool])}"


def train_headline(rows: list[Row]) -> tuple[str, str, str]:
    c = {row["variant"]: row for row in rows if row["model"] == rows[0]["model"]}
    ours, plain = c["cs336"]["tokens_per_second"], c["plain"]["tokens_per_second"]
    what = f"train a GPT-2 of {rows[0]['model']}"
    return what, f"{ours / 1e3:.0f}k tokens/s{mfu(c['cs336'])}", f"{ours / plain:.2f}x PyTorch, compiled by layers too"


def fp8_headline(rows: list[Row]) -> tuple[str, str, str]:
    """Of the largest GPT-2."""
    c = {row["variant"]: row for row in rows if row["model"] == "1.5B"}
    ours, plain = c["cs336 fp8"]["tokens_per_second"], c["plain"]["tokens_per_second"]
    what = "train a GPT-2 of 1.5B, layers' products in fp8"
    return what, f"{ours / 1e3:.0f}k tokens/s{mfu(c['cs336 fp8'])}", f"{ours / plain:.2f}x PyTorch in bf16"


def engine_headline(rows: list[Row]) -> tuple[str, str, str]:
    """Of the first work, beside the fastest engine of another run."""
    best = max((row for row in rows if row["work"] == rows[0]["work"]), key=lambda row: row["tokens_per_second"])
    peer, speed = max(best["peers_in_another_run"].items(), key=lambda item: item[1])
    ours = best["tokens_per_second"]
    return best["work"], f"{ours / 1e3:.1f}k tokens/s", f"{ours / speed:.2f}x {peer}, in another run"


def attention_headline(rows: list[Row]) -> tuple[str, str, str]:
    """Of the forward with the most FLOPs that is causal."""
    causal = [r for r in rows if r["pass"] == "fwd causal" and "seconds" in r]
    most = max(r["flops"] for r in causal)
    c = {r["variant"]: r for r in causal if r["flops"] == most}
    _, S, heads, kv_heads, D = c["native"]["shape"]
    what = f"causal attention, {S} tokens, {heads}/{kv_heads} heads of {D}, forward"
    return what, f"{c['native']['tflops']:.0f} TFLOP/s", beside(c, ("cudnn", "fa3"))


BODIES = {
    **dict.fromkeys(("train", "train_deterministic", "train_bf16_weights", "train_fp8"), train),
    "ladder": ladder,
    "recipes": recipes,
    "overhead": overhead,
    "engine": engine,
    "mixers": mixers,
    "collectives": collectives,
    **dict.fromkeys([f"parallel_{name}" for name in ("step", "zero", "gpt", "ring", "large")], parallel),
    "parallel_equal": parallel_equal,
    "parallel_plan": parallel_plan,
    "parallel_engine": parallel_engine,
    "adamw": optimizer,
    "data": data,
    "curation": curation,
    "passages": passages,
    "scaling_forecast": scaling_forecast,
    "scaling_forecast_ladder_4": scaling_forecast,
    "scaling_forecast_ladder_5": scaling_forecast,
    "align_ladder": align_ladder,
    "sft": sft,
    "gsm8k": gsm8k,
    "grpo_step": grpo_step,
    "tokenizer": tokenizer,
    "optimizers": optimizers,
    "variants": variants,
    "attention_launches": launches,
    "quantization": quantization,
    "quantization_ours": quantization,
    "decoding": decoding,
    "decoding_8b": decoding,
    "decoding_real": decoding,
}
BODIES |= dict.fromkeys(("activation", "attention", "attention_varlen", "cross_entropy"), rated)
BODIES |= dict.fromkeys(
    (
        "expert_swiglu",
        "gram",
        "linear_cross_entropy",
        "linear_few_rows",
        "paged_attention",
        "recurrent_step",
        "rope",
        "sample",
    ),
    rated,
)
HEADLINES = {
    "tokenizer": tokenizer_headline,
    "train": train_headline,
    "train_fp8": fp8_headline,
    "engine": engine_headline,
    "attention": attention_headline,
    "rms_norm": norm_headline,
    "adamw": adamw_headline,
}


def main() -> None:
    for name in PAGES:
        page = ROOT / name
        try:
            text = render(page.read_text(), load())
        except ValueError as error:
            raise SystemExit(f"benchmarks.report: {name}: {error}") from None
        page.write_text(text)
        print(f"{name}: {', '.join(m[1] for m in MARKED.findall(text))}")


if __name__ == "__main__":
    main()
