"""The report of a run: whole, partial, torn and hostile run directories, parsed as a browser would."""

import html.parser
import itertools
import json
import math
import re
import shutil

import pytest

from cs336.cli import main
from cs336.report import write_comparison, write_report
from cs336.report.chart import (
    Series,
    bar_chart,
    compact,
    line_chart,
    linear_ticks,
    log_ticks,
    smooth,
    thin,
    time_ticks,
)
from cs336.utils.duration import duration

SECTIONS = {"evaluation", "training", "samples", "tokenizer", "stages", "config"}
VOID = {"meta", "link", "br", "img", "input", "hr"}
HOSTILE = '</pre><script>alert("x")</script><img src=http://example.com/x.png onerror=alert(1)>&amp;'


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.ids, self.text, self.open = [], [], set(), [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids |= {value for name, value in attrs if name == "id"}
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def report(run_dir):
    path = write_report(run_dir)
    assert path == run_dir.resolve() / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert not {"link", "iframe", "img", "object", "embed"} & set(page.tags)
    for name, value in page.attributes:
        assert name not in ("src", "href", "srcset", "action", "data"), (name, value)
        assert not name.startswith("on"), (name, value)
    style = path.read_text().split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert page.ids >= SECTIONS
    return page, " ".join(" ".join(page.text).split())


@pytest.fixture
def run_dir(tmp_path):
    """A finished run whose every free text is hostile."""
    d = tmp_path / "a<b>&run"
    d.mkdir()
    d.joinpath("config.toml").write_text(f"seed = 7\n[optimizer]\nlr = 0.003\nnote = {json.dumps(HOSTILE)}\n")
    d.joinpath("run.json").write_text(
        json.dumps({"parameters": 5_802_240, "device": HOSTILE, "versions": {"torch": "2.11"}})
    )
    lines = [
        {"step": s, "tokens": s * 4096, "seconds": s / 4, "train/loss": 8 / s + 2, "train/grad_norm": 1 / s, "lr": 1e-3}
        | {"train/tok_per_sec": 16000 + s, "train/mfu": 0.25}
        for s in range(1, 1001)
    ]
    lines += [{"step": s, "tokens": s * 4096, "val/loss": 8 / s + 2.1, "val/bpb": 8 / s + 1} for s in (1, 500, 1000)]
    d.joinpath("metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = [{"step": s, "prompt": HOSTILE, "text": f"{HOSTILE} at {s}\0\x1b"} for s in (0, 500, 1000)]
    d.joinpath("samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    d.joinpath("generated.jsonl").write_text(json.dumps({"prompt": HOSTILE, "text": HOSTILE}) + "\n")
    baselines = [{"name": HOSTILE, "bits_per_byte": 2.0, "how": HOSTILE}, {"name": "gzip", "bits_per_byte": 2.5}]
    d.joinpath("evaluation.json").write_text(
        json.dumps({"loss": 2.25, "bits_per_byte": 1.5, "how": HOSTILE, "baselines": baselines})
    )
    stats = {"vocab_size": 4096, "pattern": HOSTILE, "length_histogram": {"1": 256, "2": 99, "70": 3}}
    d.joinpath("tokenizer_stats.json").write_text(json.dumps(stats | {"longest_tokens": [HOSTILE, " \n\t", "\ud800"]}))
    d.joinpath("stages.json").write_text(json.dumps({"pretrain": {"seconds": 241.2, "summary": HOSTILE}}))
    return d


def test_whole_run(run_dir):
    page, text = report(run_dir)
    assert "missing" not in page.ids
    assert page.tags.count("svg") == 8
    for number in ("1.500", "2.250", "5.8M", "4.1M", "4 min 10 s", "16.5k", "25.0%", "4 min 01 s", "4,096", "0.003"):
        assert number in text, number
    assert "1.50 bits for each byte of text it has never seen: 25% fewer than" in text
    assert text.count(HOSTILE) == 16  # shown everywhere, as text
    assert "1 more between" in text
    raw = run_dir.joinpath("report.html").read_text()
    assert "\0" not in raw
    assert "\x1b" not in raw
    assert "␀␛" in raw


def test_phone_first(run_dir):
    page, _ = report(run_dir)
    assert ("content", "width=device-width, initial-scale=1") in page.attributes
    assert not [v for name, v in page.attributes if name == "width" and float(v) > 100]  # svg scales with the page


def test_same_input_same_page(run_dir):
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first


def test_the_page_of_one_run_goes_where_it_is_asked_to(run_dir, tmp_path):
    page = tmp_path / "page.html"
    assert main(["report", str(run_dir), "--output", str(page)]) == 0
    assert not (run_dir / "report.html").exists()
    assert page.read_bytes() == write_report(run_dir).read_bytes()
    assert main(["report", str(run_dir), "--output", str(tmp_path / "none" / "page.html")]) == 2


@pytest.mark.parametrize("kept", ["config.toml", "metrics.jsonl", "samples.jsonl", "evaluation.json", "stages.json"])
def test_partial_run_says_what_is_missing(run_dir, kept):
    names = {path.name for path in run_dir.iterdir()}
    for name in names - {kept}:
        run_dir.joinpath(name).unlink()
    page, text = report(run_dir)
    assert "missing" in page.ids
    for name in names - {kept}:
        assert f"{name} is not there yet" in text
    assert f"{kept} is not" not in text


def test_torn_and_wrong_lines(run_dir):
    with run_dir.joinpath("metrics.jsonl").open("a") as file:
        file.write('[1]\n{"step": null}\n{"step": 1001, "train/loss": NaN}\n{"step": 1002, "train/lo')
    run_dir.joinpath("evaluation.json").write_text("{")
    run_dir.joinpath("stages.json").write_text('["a list"]')
    run_dir.joinpath("tokenizer_stats.json").write_text('{"length_histogram": 3, "longest_tokens": null}')
    _, text = report(run_dir)
    assert "1 line of metrics.jsonl cannot be read" in text
    assert "evaluation.json cannot be read" in text
    assert "not evaluated yet" not in text.lower()  # there is what validation found
    assert "This model" in text


@pytest.mark.parametrize(
    "odd", [None, True, "Infinity", 10**400, 1e-320, -1e308, {"²": "x"}], ids=lambda odd: repr(odd)[:9]
)
def test_a_value_of_any_kind_spoils_no_page(run_dir, odd):
    """Each value of each file, in turn."""
    rows = run_dir.joinpath("metrics.jsonl").read_text().splitlines(keepends=True)
    run_dir.joinpath("metrics.jsonl").write_text("".join(rows[:3] + rows[-3:]))
    for file in sorted(run_dir.glob("*.json*")):
        whole = file.read_text()
        last = json.loads(whole.splitlines()[-1])
        for key in last:
            changed = json.dumps(last | {key: odd})
            file.write_text("\n".join([*whole.splitlines()[:-1], changed]))
            assert write_report(run_dir).stat().st_size > 10_000
        file.write_text(whole)


def test_resumed_run_counts_each_step_once(tmp_path):
    lines = [{"step": s, "train/loss": 9.0} for s in (1, 2, 3, 4)] + [{"step": s, "train/loss": 5.0} for s in (3, 4, 5)]
    tmp_path.joinpath("metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    from cs336.report.run import read_run

    assert read_run(tmp_path).column("train/loss") == ([1, 2, 3, 4, 5], [9, 9, 5, 5, 5])


def test_not_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a directory"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="not a run directory"):
        write_report(tmp_path)


def test_ticks_lie_inside():
    for low, high in ((0, 1), (-3, 17.5), (1e-9, 2e-9), (0, 3.69e6), (2.4, 2.41)):
        ticks = linear_ticks(low, high)
        assert 2 <= len(ticks) <= 6
        assert all(low - 1e-9 * (high - low) <= t <= high + 1e-9 * (high - low) for t in ticks)
    for low, high in ((2.1, 9.5), (1e-5, 3e2), (0.4, 4.5), (1, 1e9)):
        ticks = log_ticks(low, high)
        assert 2 <= len(ticks) <= 7, (low, high, ticks)
        assert ticks == sorted(ticks)


def test_compact():
    shown = {0: "0", 0.25: "0.25", 3e-4: "3e-4", 999: "999", 999_950: "1M", 15_400: "15.4k", 2e9: "2B", -0.5: "-0.5"}
    assert {value: compact(value) for value in shown} == shown
    assert compact(math.nan) == "nan"


def test_curves_survive_what_training_does():
    assert line_chart([Series("a", [], [])], title="t", x_label="x") == ""
    assert line_chart([Series("a", [1, 2], [math.nan, math.inf])], title="t", x_label="x") == ""
    for ys in ([3.0], [0.0, 0.0], [-1.0, 2.0], [1e-30, 1e30], [1.0, math.nan, 2.0]):
        chart = line_chart([Series("a", list(range(len(ys))), ys)], title="t", x_label="x", log_y=True)
        assert "nan" not in chart
        assert "inf" not in chart
    assert bar_chart([], [], title="t", x_label="x") == ""


def test_thin_and_smooth():
    points = thin(list(range(10_000)), [5.0] * 10_000)
    assert len(points) <= 360
    assert {y for _, y in points} == {5.0}
    assert smooth([4.0] * 50, 10) == [4.0] * 50
    noisy = smooth([1.0, -1.0] * 200, 10)
    assert abs(noisy[-1]) < 0.2  # the end, too
    assert max(map(abs, noisy[100:300])) < 0.1


def test_how_a_run_stands(run_dir):
    from cs336.utils.locks import locked

    assert "Stopped after step 1,000; the same command goes on" in report(run_dir)[1]
    with run_dir.joinpath(".lock").open("w"), locked(run_dir):
        assert "Running when this page was written, after step 1,000." in report(run_dir)[1]
    run_dir.joinpath("export").mkdir()
    run_dir.joinpath("export/config.json").write_text("{}")
    assert "Done after step 1,000." in report(run_dir)[1]
    failure = {"step": 1001, "cause": f"the output of layers.0 {HOSTILE}", "checkpoint": "step_1000", "time": "today"}
    run_dir.joinpath("failure.json").write_text(json.dumps(failure))
    text = report(run_dir)[1]
    assert f"Failed at step 1,001. the output of layers.0 {HOSTILE}" in text
    assert "Last good checkpoint: step_1000. (today)" in text
    failure |= {"message": "step 1001: loss nan. Last good checkpoint: step_1000."}
    run_dir.joinpath("failure.json").write_text(json.dumps(failure))
    assert "Failed at step 1,001. loss nan. Last good checkpoint: step_1000. (today)" in report(run_dir)[1]


def test_where_a_run_came_from_and_what_it_cost(run_dir):
    facts = {"parameters": 2_048_000, "flops_per_token": 1e7, "train_tokens": 1_024_000, "peak_memory_bytes": 3 << 30}
    facts |= {"predicted_memory_bytes": 5 << 29}
    facts |= {
        "command": "/usr/lib/cs336/__main__.py train --seed 7",
        "commit": "abc1234",
        "started": "2026-01-02T03:04:05+00:00",
    }
    run_dir.joinpath("run.json").write_text(json.dumps(facts | {"data": {"train": "f" * 64, "val": None}}))
    _, text = report(run_dir)
    for fact in ("cs336 train --seed 7", "commit abc1234", "2026-01-02T03:04:05", "train data ffffffffffff"):
        assert fact in text, fact
    for label, value in {
        "Epochs": "4",
        "Tokens per parameter": "2",
        "Total FLOPs": "4.10e+13",
        "Peak memory": "3.00 GiB 2.50 GiB predicted for a step",
    }.items():
        assert f"{label} {value} " in text, label


def test_one_validation_loss_a_report(run_dir):
    """Validation while training reads a part of the text; at the end the evaluation takes its place in the curve."""
    from cs336.report.run import read_run

    run = read_run(run_dir)
    assert run.column("val/loss")[1][-1] == run.last("val/loss") == 2.25
    assert run.last("val/bpb") == run.bits_per_byte == 1.5
    evaluation = json.loads(run_dir.joinpath("evaluation.json").read_text())
    for other in ({"text": "other.txt"}, {"step": 500}):  # another text, an earlier model: another number
        run_dir.joinpath("evaluation.json").write_text(json.dumps(evaluation | other))
        assert read_run(run_dir).last("val/loss") == 8 / 1000 + 2.1
    run_dir.joinpath("evaluation.json").write_text(json.dumps(evaluation | {"text": "other.txt"}))
    assert "1.50 bits for each byte of other.txt" in report(run_dir)[1]


def test_a_run_that_was_only_validated_is_not_called_unevaluated(run_dir):
    run_dir.joinpath("evaluation.json").unlink()
    _, text = report(run_dir)
    assert "not evaluated yet" not in text.lower()
    assert "1.008" in text


def elements(svg, tag, style):
    return [
        dict(re.findall(r'([\w-]+)="([^"]*)"', found))
        for found in re.findall(rf"<{tag} ([^>]*)>", svg)
        if f'class="{style}"' in found
    ]


def test_no_name_is_printed_across_a_curve():
    """Of four rules within the reach of the curve, two a hair apart."""
    curve = Series("validation", list(range(100)), [5 - i / 25 for i in range(100)], "second", dots=True)
    rules = [("gzip -9", 2.31), ("xz -9e", 2.30), ("byte unigram", 4.77), ("token unigram", 3.2)]
    svg = line_chart([curve], title="t", x_label="x", rules=rules, from_zero=True)
    names = elements(svg, "text", "rule-name")
    reach = max(float(x) for x in re.findall(r"([\d.]+),[\d.]+", re.search(r'points="([^"]*)"', svg)[1]))
    assert len(names) == 4
    assert all(float(name["x"]) > reach for name in names)
    assert all(name["text-anchor"] == "start" for name in names)
    heights = sorted(float(name["y"]) for name in names)
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 11
    assert all(float(name["x"]) + 5.8 * len("token unigram 3.20") <= 360 for name in names)


def test_values_are_shown_under_the_pointer():
    steps = list(range(0, 5000, 10))
    series = [Series("train", steps, [9 - s / 1000 for s in steps]), Series("validation", [0, 4000], [9.5, 5.5])]
    svg = line_chart(series, title="t", x_label="tokens")
    strips = elements(svg, "rect", "hover")
    assert 50 < len(strips) <= 90
    ends = [float(s["x"]) + float(s["width"]) for s in strips]
    assert ends == pytest.approx([*(float(s["x"]) for s in strips[1:]), 352], abs=0.2)  # without a gap
    titles = re.findall(r"<title>([^<]*)</title>", svg)
    assert titles[0].startswith("tokens ")
    middle = titles[len(titles) // 2]
    assert re.search(r"train: 6\.\d+", middle)
    assert re.search(r"validation: [59]\.5 \(at ", middle)


def test_a_time_axis_has_round_times():
    svg = line_chart([Series("a", [0, 245], [3, 2])], title="t", x_label="time", x_text=duration)
    assert "2 min 00 s</text>" in svg
    assert len(time_ticks(0, 245)) <= 5
    for high in (0.5, 7, 61, 1000, 9000, 1e6):
        ticks = time_ticks(0, high)
        assert 2 <= len(ticks) <= 5, (high, ticks)
        assert all(0 <= t <= high for t in ticks)


def test_runs_side_by_side(run_dir, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    other.joinpath("config.toml").write_text(run_dir.joinpath("config.toml").read_text().replace("0.003", "0.001"))
    evaluation = json.loads(run_dir.joinpath("evaluation.json").read_text())
    other.joinpath("evaluation.json").write_text(json.dumps(evaluation | {"bits_per_byte": 1.25}))
    path = write_comparison([run_dir, other], tmp_path / "both.html")
    page = Page(path.read_text())
    text = " ".join(" ".join(page.text).split())
    assert "other needs the fewest bits for each byte: 1.250" in text
    assert "optimizer.lr 0.001 0.003" in text
    assert page.tags.count("svg") == 5
    assert "a<b>&run" in text
    assert not {"script", "link", "img"} & set(page.tags)
    other.joinpath("evaluation.json").write_text(json.dumps(evaluation | {"text": "books.txt"}))
    page = Page(write_comparison([run_dir, other], path).read_text())
    assert "of different texts" in " ".join(page.text)
    assert "fewest bits" not in " ".join(page.text)
    layers = '[[model.layers]]\nmlp = {kind = "%s"}\n[[model.layers]]\nmlp = {kind = "mlp"}\n'
    for directory, kind in ((run_dir, "mlp"), (other, "moe")):
        directory.joinpath("config.toml").write_text(layers % kind)
    text = " ".join(" ".join(Page(write_comparison([run_dir, other], path).read_text()).text).split())
    assert "model.layers.1.mlp.kind mlp moe" in text
    assert "model.layers.2" not in text
    with pytest.raises(ValueError, match="takes 2 to 6 runs, got 7"):
        write_comparison([run_dir] * 7, path)


def test_a_section_registers_itself():
    from cs336.report.section import all_sections, section

    titles = [found.title for found in all_sections()]
    assert titles[0] == "What was learned"

    @section("Mine", order=1)
    def mine(run):
        return None

    assert all_sections()[0].build is mine
    from cs336.report import section as registry

    del registry._SECTIONS["mine"]


def aligned(tmp_path, rows, config="[[rewards]]\nkind = 'exact'\n[[rewards]]\nkind = 'math'\nweight = 0.0\n"):
    (tmp_path / "config.toml").write_text(config)
    (tmp_path / "run.json").write_text(json.dumps({"stage": "grpo"}))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_report(tmp_path).read_text()


def test_alignment_shows_rewards_beside_what_was_not_learned_from(tmp_path):
    rows = [
        {"step": i, "train/loss": 0.1, "reward": i / 10, "eval/reward": i / 9, "eval/rewards/exact/mean": i / 9,
         "eval/rewards/math/mean": 0.5, "entropy": 1.0, "kl": 0.1, "completions/mean_length": 4.0,
         "clip_ratio/high_mean": 0.1, "clip_ratio/low_mean": 0.2}
        for i in range(1, 9)
    ]  # fmt: skip
    text = aligned(tmp_path, rows)
    assert 'id="alignment"' in text
    assert 'id="evaluation"' not in text  # there are no bits per byte
    for title in (
        "Reward",
        "Each verifier",
        "Entropy",
        "Divergence from the reference",
        "Length of answers",
        "Clipped",
    ):
        assert title in text
    assert "math (not learned from)" in text
    assert "exact (not learned from)" not in text
    assert "The critic" not in text  # nothing of it was recorded
    assert "Over-optimisation" not in text  # nothing is known of the drawn answers' other rewards
    assert "are worth 0.889" in text


def test_alignment_shows_where_a_reward_is_deceived(tmp_path):
    rows = [
        {"step": i, "reward": i, "rewards/math/mean": 1 - i / 10, "rewards/exact/mean": 0.5, "objective/kl": 3.0 * i}
        for i in range(1, 9)
    ]  # fmt: skip
    text = aligned(tmp_path, rows)
    chart = text[text.index("Over-optimisation") :].split("</figure>")[0]
    assert "learned from" in chart
    assert "math (not learned from)" in chart
    assert "KL, nats 24" in chart
    assert "exact" not in chart
    everything = aligned(tmp_path, rows, "[[rewards]]\nkind = 'exact'\n")
    assert "Over-optimisation" not in everything


def test_alignment_shows_how_sure_a_reward_model_is(tmp_path):
    rows = [{"step": i, "val/accuracy": 0.5, "val/calibration_error": 0.1} for i in range(3)]
    assert "said to be likely" not in aligned(tmp_path, rows)
    bins = [{"said": 0.25, "came_true": 0.375, "size": 8}, {"said": 0.75, "came_true": 0.5, "size": 8}, {"said": "?"}]
    (tmp_path / "calibration.json").write_text(json.dumps({"bins": bins}))
    text = aligned(tmp_path, rows)
    assert "as sure as right" in text
    assert "0.375" in text
    (tmp_path / "calibration.json").write_text("{torn")
    assert "calibration.json cannot be read" in aligned(tmp_path, rows)


def test_a_run_of_train_has_no_alignment(run_dir):
    page, _ = report(run_dir)
    assert "alignment" not in page.ids


def test_samples_mark_what_is_new(tmp_path):
    texts = ["abc", "abd", "xbd", "end"]
    rows = [{"step": i, "prompt": "p", "text": text} for i, text in enumerate(texts)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n')
    report(tmp_path)
    raw = (tmp_path / "report.html").read_text()
    assert "ab<mark>d</mark>" in raw
    assert "<mark>x</mark>bd" in raw
