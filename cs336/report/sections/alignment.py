"""How a model was aligned: what its answers are worth, by what it learned from and by what it did not."""

from typing import Any

from cs336.report.chart import Series, line_chart, smooth
from cs336.report.run import Run, listing, mapping, number
from cs336.report.section import section

STEPS: dict[str, Any] = {"x_label": "steps"}
Spec = tuple[str, str, list[Series], dict[str, Any]]


@section("Alignment", order=15)
def alignment(run: Run) -> dict[str, Any] | None:
    """None for a run of `cs336 train`."""
    stage = str(run.facts.get("stage", ""))
    if not stage:
        return None
    return {"charts": charts_of(run)}


def charts_of(run: Run, most: int | None = None) -> list[dict[str, Any]]:
    """The first charts of an aligned run that have something to show; all of them if None."""
    charts = [
        {
            "title": title,
            "note": note,
            "keys": [s for s in series if len(series) > 1 and s.label and len(s.xs)],
            "svg": line_chart(series, title=title, **(STEPS | options)),
        }
        for title, note, series, options in _specs(run)
    ]
    return [chart for chart in charts if chart["svg"]][:most]


def _specs(run: Run) -> list[Spec]:
    def line(name: str, label: str = "", style: str = "main", dots: bool = False) -> Series:
        return Series(label, *run.column(name), style, dots)

    def both(name: str) -> list[Series]:
        xs, ys = run.column(name)
        return [Series("as logged", xs, ys, "faint"), Series("smoothed", xs, smooth(ys, len(ys) // 30), "main")]

    zero: dict[str, Any] = {"from_zero": True}
    kl = both("kl") if run.column("kl")[0] else both("objective/kl")
    return [
        ("Reward", "Of the answers that are learned from, and of the likeliest ones to held-out prompts.",
         [line("reward", "drawn", "faint"), line("eval/reward", "held out", "second", dots=True)], {}),
        ("Each verifier", "One that was not learned from (weight 0) and falls while the others rise is being "
         "deceived: reward hacking.", _verifiers(run), zero),
        ("Entropy", "Nats a token. Near 0 nothing new is tried.", both("entropy"), zero),
        ("Divergence from the reference", "KL in nats.", kl, zero),
        ("Length of answers", "Tokens.", both("completions/mean_length"), zero),
        ("Answers that were cut", "Share that max_tokens ended.", both("completions/clipped_ratio"), zero),
        ("Clipped", "Share of tokens whose ratio left the range: upwards, downwards.",
         [line("clip_ratio/high_mean", "upwards"), line("clip_ratio/low_mean", "downwards", "second")], zero),
        ("Prompts that teach nothing", "Share whose answers are worth the same.", both("frac_reward_zero_std"), zero),
        ("Engine against training", "Largest difference of a token's log-probability between the two.",
         [line("sampling/sampling_logp_difference/max")], zero),
        ("Accuracy", "Share of pairs whose chosen answer has the higher reward; of kto, of answers whose reward is on "
         "their label's side of the reference point.",
         [line("rewards/accuracies", "training", "faint"), line("accuracy", "training", "faint"),
          line("val/rewards/accuracies", "validation", "second", dots=True),
          line("val/accuracy", "validation", "second", dots=True)], zero),
        ("Implicit rewards", "beta times how much likelier an answer became than the reference finds it.",
         [line("rewards/chosen", "chosen"), line("rewards/rejected", "rejected", "second")], {}),
        ("Calibration error", "How far the probability of a choice is from how often it was made.",
         [line("val/calibration_error", dots=True)], zero),
        ("Calibration", "How often the first answer was chosen, by how likely the rewards of the last evaluation find "
         "it.", _calibration(run), zero | {"x_label": "said to be likely"}),
        ("Over-optimisation", "Of drawn answers, over how far the model is from the reference: where what it does not "
         "learn from turns down while the reward goes up, the reward is deceived (arXiv:2210.10760).",
         _over_divergence(run), {"x_label": "KL, nats"}),
        ("The critic", "Share of the returns' variance that it explains.", both("explained_variance"), {}),
    ]  # fmt: skip


def _verifiers(run: Run) -> list[Series]:
    """The held-out means of each; those of the drawn answers where there is no evaluation."""
    names = {name for row in run.metrics for name in row if name.startswith("eval/rewards/")}
    names = names or {
        name for row in run.metrics for name in row if name.startswith("rewards/") and name.endswith("/mean")
    }
    weights = _weights(run)
    series = []
    for i, name in enumerate(sorted(names)[:6]):
        short = name.removeprefix("eval/").removeprefix("rewards/").removesuffix("/mean")
        label = f"{short} (not learned from)" if weights.get(short) == 0 else short
        series.append(Series(label, *run.column(name), f"run{i}", dots=len(names) > 0))
    return series


def _calibration(run: Run) -> list[Series]:
    bins = [mapping(b) for b in listing(run.calibration.get("bins"))]
    pairs = [(number(b.get("said")), number(b.get("came_true"))) for b in bins]
    points = [(x, y) for x, y in pairs if x is not None and y is not None]
    if not points:
        return []
    xs, ys = zip(*points, strict=True)
    return [Series("rewards", xs, ys, dots=True), Series("as sure as right", (0, 1), (0, 1), "faint")]


def _over_divergence(run: Run) -> list[Series]:
    """Empty where everything is learned from, or no divergence is measured."""
    kept = [name for name, weight in _weights(run).items() if weight == 0]
    names = {"reward": "learned from"} | {f"rewards/{name}/mean": f"{name} (not learned from)" for name in kept[:5]}
    against = "kl" if run.column("kl")[0] else "objective/kl"
    series = []
    for i, (name, label) in enumerate(names.items()):
        points = sorted(zip(*run.column(name, against), strict=True))
        ys = smooth([y for _, y in points], len(points) // 10)
        series.append(Series(label, [x for x, _ in points], ys, f"run{i}"))
    return series if any(len(s.xs) for s in series[1:]) else []


def _weights(run: Run) -> dict[str, float]:
    """Of the verifiers by their names: two of a kind are told apart by their place."""
    rewards = [reward for reward in listing(run.config.get("rewards")) if isinstance(reward, dict)]
    kinds = [reward.get("kind") for reward in rewards]
    named = [str(k) if kinds.count(k) == 1 else f"{k}.{i}" for i, k in enumerate(kinds)]
    return {name: number(reward.get("weight", 1.0)) or 0.0 for name, reward in zip(named, rewards, strict=True)}
