"""`cs336 scaling`: fit a law to finished runs, look at how they fit together, ask it about others, draw it."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from cs336.cli.common import MaybePath, Path, check_output

if TYPE_CHECKING:
    from cs336.scaling import ComputeFit, Counting, Fit, Points, PowerFit

Law = Literal["chinchilla", "compute", "isoflop", "isoflop-lowest", "envelope", "step", "critical-batch", "repeats"]
LOG = Path("forecasts.jsonl")


def fit(
    points: Positional[Path],
    law: Law = "chinchilla",
    bootstrap: int = 400,
    huber_delta: float | None = None,
    least_tokens: float | None = None,
    flops: Literal["exact", "6nd"] = "exact",
    embeddings: bool = True,
    base: MaybePath = None,
    out: MaybePath = None,
) -> None:
    """Fit a scaling law to runs, and print it with its 95 % intervals.

    Args:
        points: CSV with a header or JSON: loss, and two of parameters, tokens and flops, a run a row; or the directory
            of a study. Of critical-batch: tokens and critical_batch; or the directory of a `cs336 batch-size`, or of
            several.
        law: chinchilla (approach 3: L = E + A / N^alpha + B / D^beta), compute (L = E + A / C^gamma, of runs that spend
            each budget in one way, as a ladder of one ratio does), isoflop (2: parabolas), isoflop-lowest (2: the
            lowest run a budget), envelope (1: training curves), step (the Step Law: lr = c N^a D^b and batch = c D^b,
            of runs with the columns parameters, tokens, lr and batch_tokens, each a size's and length's best),
            critical-batch (B_crit = B_0 D^beta, in tokens), repeats (what tokens are worth that are read again: of runs
            with the column unique_tokens too, over --base).
        bootstrap: resamples of the runs, for the intervals of approach 3, of compute, of step, of critical-batch and
            of repeats.
        huber_delta: of approach 3: relative residuals beyond it count by their size, not its square. None: the paper's
            0.001, for noise of that size; runs of tiny models have more.
        least_tokens: of approaches 1 to 3 and compute: runs on fewer are left out, since the first tokens teach by
            another law.
        flops: as the model counts them, with attention and the head, or as a column says; 6nd: 6 parameters * tokens.
        embeddings: whether the token embedding and the head are among the parameters. Without them a file has a column
            non_embedding_parameters.
        base: of repeats: what `fit --out` wrote of runs that do not repeat. What is written has both.
        out: write it here, for `cs336 scaling predict`.
    """
    from cs336.scaling import Counting, read_points

    check_output(out, points)
    if (law == "repeats") != (base is not None):
        raise ValueError("--law repeats takes --base, a law of runs that do not repeat, and no other law does")
    if huber_delta is not None and law != "chinchilla":
        raise ValueError(f"--huber-delta is of --law chinchilla, and --law {law} has none")
    counting = Counting(embeddings, flops)
    if law in ("step", "critical-batch", "repeats"):
        if least_tokens is not None or counting != Counting():
            raise ValueError(
                f"--law {law} takes no --least-tokens, --flops and --no-embeddings: {points} has the runs that it is "
                "fitted to, and their numbers as they are to be counted"
            )
        if base is not None:
            _write(_fit_repeats(points, base, bootstrap), out)
        else:
            _write((_fit_step if law == "step" else _fit_critical_batch)(points, bootstrap), out)
        return
    runs = read_points(points, counting)
    least_tokens = least_tokens or 0.0
    enough = runs.tokens >= least_tokens
    if not enough.any():
        raise ValueError(f"{points} has no run on {least_tokens:,.0f} tokens or more: lower --least-tokens")
    runs = runs.take(enough)
    found: dict[str, Any] = {"law": law, "points": str(points), "least_tokens": least_tokens, "runs": len(runs)}
    found["counting"] = asdict(counting)
    match law:
        case "chinchilla":
            found |= _fit_chinchilla(runs, 1e-3 if huber_delta is None else huber_delta, bootstrap)
        case "compute":
            found |= _fit_compute(runs, bootstrap)
        case _:
            found |= _fit_optimum(runs, law)
    _write(found, out)


def _fit_chinchilla(runs: "Points", huber_delta: float, bootstrap: int) -> dict[str, Any]:
    from cs336.scaling import fit_chinchilla

    fitted = fit_chinchilla(runs, huber_delta=huber_delta, bootstrap=bootstrap)
    return _told(fitted, ("E", "A", "B", "alpha", "beta", "parameter_exponent"))


def _fit_compute(runs: "Points", bootstrap: int) -> dict[str, Any]:
    from cs336.scaling import fit_compute

    return _told(fit_compute(runs, bootstrap=bootstrap), ("E", "A", "gamma"))


def _told(fitted: "Fit | ComputeFit", names: tuple[str, ...]) -> dict[str, Any]:
    """A law's numbers, printed with their intervals, and what `predict` needs of it."""
    found: dict[str, Any] = {}
    for name in names:
        found[name] = getattr(fitted.law, name)
        found[f"{name}_interval"] = interval = fitted.interval(name) if fitted.resampled else None
        _tell(f"{name:18}", found[name], interval)
    found["residual_rms"] = float((fitted.residuals**2).mean() ** 0.5)
    found["residuals"] = fitted.residuals.tolist()
    found["resampled"] = [list(asdict(law).values()) for law in fitted.resampled]
    print(f"{'residual':18} {100 * found['residual_rms']:.2f} % of the loss, root mean square")
    return found


def _tell(name: str, value: float, interval: tuple[float, float] | None) -> None:
    print(f"{name} {value:.5g}" + (f"   [{interval[0]:.5g}, {interval[1]:.5g}]" if interval else ""))


def _fit_optimum(runs: "Points", law: Law) -> dict[str, Any]:
    from cs336.scaling import fit_envelope, fit_isoflop

    lowest = law == "isoflop-lowest"
    through = fit_envelope(runs) if law == "envelope" else fit_isoflop(runs, "lowest" if lowest else "parabola")
    if law != "envelope":
        for C, N, loss in zip(through.flops, through.parameters, through.loss, strict=True):
            print(f"{C:.3g} FLOPs: {N:.4g} parameters, {C / (6 * N):.4g} tokens, loss {loss:.4f}")
    found = {}
    for name, power in (("parameters", through.parameter_law), ("tokens", through.token_law)):
        found[name] = {"coefficient": power.coefficient, "exponent": power.exponent}
        print(f"{name:10} = {power.coefficient:.4g} C^{power.exponent:.4f}")
    return found


def _fit_step(points: Path, bootstrap: int) -> dict[str, Any]:
    from cs336.scaling.rates import fit_step_law, read_step_points

    columns = read_step_points(points)
    rate, batch = fit_step_law(**columns, bootstrap=bootstrap)
    found: dict[str, Any] = {"law": "step", "points": str(points), "runs": len(columns["lr"])}
    for name, power in (("lr", rate), ("batch_tokens", batch)):
        found[name] = _told_power(name, power)
    return found


def _fit_critical_batch(points: Path, bootstrap: int) -> dict[str, Any]:
    from cs336.scaling.rates import fit_critical_batch, read_critical_batches

    columns = read_critical_batches(points)
    law, sized = fit_critical_batch(**columns, bootstrap=bootstrap)
    found: dict[str, Any] = {"law": "critical-batch", "points": str(points), "runs": len(columns["tokens"])}
    found["critical_batch"] = _told_power("critical_batch", law)
    found["residuals"] = law.residuals.tolist()
    found["resampled"] = [list(numbers.values()) for numbers in law.resampled]
    if sized is not None:
        print("with parameters too, whose exponent is about 0 where the law needs none:")
        found["with_parameters"] = _told_power("with_parameters", sized)
    return found


def _told_power(name: str, power: "PowerFit") -> dict[str, Any]:
    """A power law's numbers, printed with their intervals."""
    numbers = {"coefficient": power.coefficient, **power.exponents}
    intervals = {key: power.interval(key) if power.resampled else None for key in numbers}
    for key, value in numbers.items():
        _tell(f"{name + ' ' + key:26}", value, intervals[key])
    return numbers | {f"{key}_interval": interval for key, interval in intervals.items()}


def _fit_repeats(points: Path, base: Path, bootstrap: int) -> dict[str, Any]:
    from cs336.scaling import fit_repeats, read_points
    from cs336.scaling.points import read_columns
    from cs336.scaling.saved import load_fit

    columns, have = read_columns(points, {"unique_tokens": ("unique_tokens", "unique tokens", "u")})
    if not columns:
        raise ValueError(f"{points} must have unique_tokens as a column; it has {have}")
    repeats = fit_repeats(read_points(points), columns["unique_tokens"], load_fit(base).law, bootstrap=bootstrap)
    found = json.loads(base.read_text(encoding="utf-8"))
    for name in ("repeat_decay", "excess_decay"):
        found[name] = getattr(repeats, name)
        told = name == "repeat_decay" or repeats.excess
        found[f"{name}_interval"] = interval = repeats.interval(name) if bootstrap and told else None
        _tell(f"{name:18}", found[name], interval)
    if not repeats.excess:
        print("excess_decay is the published one: no run has more parameters than its unique tokens deserve")
    return found


def _write(found: dict[str, Any], out: MaybePath) -> None:
    from cs336.utils.files import write_text

    if out is not None:
        write_text(out, json.dumps(found, indent=1) + "\n")


def collapse(study: Positional[Path], law: Path, parts: int = 20) -> None:
    """Whether the training curves of a study's runs have one shape: a run that leaves it was set otherwise than others.

    Args:
        study: the directory of a study, which `cs336 sweep` trained.
        law: what `fit --out` wrote of it, for its E.
        parts: of a run, over each of which the training loss is averaged.
    """
    import numpy as np

    from cs336.experiments import Ledger
    from cs336.scaling.collapse import collapse as normalized
    from cs336.scaling.collapse import curve
    from cs336.scaling.saved import load_fit

    if not (study / "ledger.sqlite").exists():
        raise ValueError(f"{study} holds no study: expected what `cs336 sweep` writes")
    entries = [entry for entry in Ledger(study).entries() if entry.state == "done"]
    if not entries:
        raise ValueError(f"{study} holds a study without a finished run")
    curves = [curve(study / "runs" / entry.folder / "metrics.jsonl", parts) for entry in entries]
    found = normalized(np.array(curves), load_fit(law).law.E)
    for entry, off in zip(entries, found.off_R, strict=True):
        options = ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in entry.options.items())
        print(f"{100 * off:6.2f} %  seed {entry.seed}, {options}")
    later = found.deviation_P[parts // 2 :]
    print(f"deviation over the later half: {100 * later.mean():.2f} %, {100 * later.max():.2f} % at most")


def predict(
    law: Annotated[Positional[str], arg(metavar="FIT.json|epoch")],
    flops: float | None = None,
    parameters: float | None = None,
    tokens: float | None = None,
    inference_tokens: float = 0.0,
    unique_tokens: float | None = None,
) -> None:
    """What a budget buys: the best size and tokens for --flops, the loss of --parameters on --tokens, or the critical
    batch of --tokens.

    Args:
        law: what `fit --out` wrote, or epoch for the published law of arXiv:2404.10102.
        flops: a training budget.
        parameters: of a run that is planned.
        tokens: of that run.
        inference_tokens: tokens that the model will serve: the budget's loss is then reached by the size that is
            cheapest over both (arXiv:2401.00448).
        unique_tokens: as many exist; those that are read again are worth less (arXiv:2305.16264).
    """
    import pathlib

    from cs336.scaling import EPOCH, EPOCH_FIT, DataConstrainedLaw
    from cs336.scaling.laws import check_positive
    from cs336.scaling.saved import load_compute_fit, load_critical_batch, load_fit

    check_positive(flops=flops, parameters=parameters, tokens=tokens)
    if law != "epoch" and (compute := load_compute_fit(pathlib.Path(law))) is not None:
        if flops is None or parameters or tokens or inference_tokens or unique_tokens is not None:
            raise ValueError(f"{law} is a law of compute alone: it takes --flops, and says the loss")
        print(f"loss {float(compute.law.loss(flops)):.4f}")
        if compute.resampled:
            low, high = compute.predict(flops)[1]
            print(f"95 % of such runs between {low:.4f} and {high:.4f}")
        return
    if law != "epoch" and (batch := load_critical_batch(pathlib.Path(law))) is not None:
        if tokens is None or flops or parameters or inference_tokens or unique_tokens is not None:
            raise ValueError(f"{law} is a law of the critical batch: it takes --tokens alone")
        print(f"critical batch {float(batch(tokens=tokens)):.4g} tokens")
        if batch.resampled:
            low, high = batch.predict(tokens=tokens)[1]
            print(f"95 % of such runs between {low:.4g} and {high:.4g}")
        return
    fitted = None if law == "epoch" else load_fit(pathlib.Path(law))
    base = EPOCH if fitted is None else fitted.law
    decays = EPOCH_FIT.decays if fitted is None else fitted.decays
    constrained = base if unique_tokens is None else DataConstrainedLaw(base, unique_tokens, *decays)
    if (flops is None) == (parameters is None) or (parameters is None) != (tokens is None):
        raise ValueError("say --flops, or --parameters and --tokens")
    if inference_tokens and flops is None:
        raise ValueError("--inference-tokens go with --flops: they choose a size, and --parameters says one")
    if parameters is not None and tokens is not None:
        print(f"loss {float(constrained.loss(parameters, tokens)):.4f}")
        if fitted is not None and fitted.resampled and unique_tokens is None:
            low, high = fitted.predict(parameters, tokens)[1]
            print(f"95 % of such runs between {low:.4f} and {high:.4f}")
        return
    assert flops is not None
    best = constrained.optimum(flops)
    print(f"{best.parameters:.4g} parameters, {best.tokens:.4g} tokens ({best.tokens / best.parameters:.1f} each)")
    print(f"loss {best.loss:.4f}")
    if fitted is not None and fitted.resampled and unique_tokens is None:
        low, high = fitted.optimum(flops)[1]
        print(f"95 % interval of the parameters: {low:.4g} to {high:.4g}")
    if inference_tokens:
        cheap = base.cheapest(best.loss, inference_tokens)
        both = 6 * best.parameters * best.tokens + 2 * best.parameters * inference_tokens
        print(
            f"with {inference_tokens:.3g} tokens served: {cheap.parameters:.4g} parameters, {cheap.tokens:.4g} tokens "
            f"for the same loss, {100 * (1 - cheap.flops / both):.0f} % fewer FLOPs in all"
        )


def plot(points: Positional[Path], out: Path) -> None:
    """Draw runs by budget with approach 2's valleys, and approach 3's residuals, as one picture (png, svg, pdf).

    Args:
        points: as for `fit`.
        out: the picture. Needs matplotlib: pip install 'cs336[plot]'.
    """
    from cs336.scaling import read_points
    from cs336.scaling.plot import draw

    draw(read_points(points), out)
    print(out)


def forecast(
    law: Annotated[Positional[str], arg(metavar="FIT.json|epoch")],
    name: str,
    parameters: float | None = None,
    tokens: float | None = None,
    flops: float | None = None,
    study: MaybePath = None,
    unique_tokens: float | None = None,
    log: Path = LOG,
) -> None:
    """Write down what a run will reach, with its 95 % interval, before it is made.

    Args:
        law: as for `predict`.
        name: of the run, for its grade.
        parameters: of the run.
        tokens: of the run.
        flops: of the run, for a law of compute; 6 parameters * tokens if not given.
        study: in place of these, the TOML of a study of one run, such as `cs336 scaling design best` writes, or of
            several seeds of it.
        unique_tokens: as many exist.
        log: JSON lines, a forecast each.
    """
    import pathlib

    from cs336.scaling import EPOCH_FIT, Counting
    from cs336.scaling import forecast as forecasts
    from cs336.scaling.saved import load_compute_fit, load_counting, load_fit

    if (parameters is None) != (tokens is None) or (parameters is None) == (study is None):
        raise ValueError("say --parameters and --tokens, or --study")
    path = pathlib.Path(law)
    compute = None if law == "epoch" else load_compute_fit(path)
    fit = compute or (EPOCH_FIT if law == "epoch" else load_fit(path))
    if flops is not None and (compute is None or study is not None):
        raise ValueError("--flops go with --parameters and --tokens, and a law of compute")
    if study is not None:
        counting = Counting() if law == "epoch" else load_counting(path)
        parameters, tokens, flops = _run_of(study, counting)
    assert parameters is not None
    assert tokens is not None
    made = forecasts.forecast(log, fit, name, parameters, tokens, flops=flops, unique_tokens=unique_tokens)
    print(f"{name}: loss {made.loss:.4f}, 95 % of such runs between {made.low:.4f} and {made.high:.4f}; kept in {log}")


def grade(
    name: Annotated[Positional[str], arg(metavar="NAME")],
    loss: Annotated[float | None, Positional, arg(metavar="LOSS")] = None,
    study: MaybePath = None,
    log: Path = LOG,
) -> None:
    """Write down what a run reached beside its forecast, once, and score all that are graded.

    Args:
        name: as it was forecast.
        loss: that was measured, in nats a token.
        study: in its place, the directory of a study of one run that is done, or of several seeds, whose mean counts;
            or a file of such runs, as for `fit`.
        log: JSON lines, a forecast each.
    """
    from cs336.scaling import forecast as forecasts

    if (loss is None) == (study is None):
        raise ValueError("say the loss, or --study")
    if study is not None:
        loss = _measured(study)
    assert loss is not None
    graded = forecasts.grade(log, name, loss)
    assert graded.error is not None
    held = "within" if graded.covered else "outside"
    print(f"{name}: error {100 * graded.error:+.2f} %, {held} {graded.low:.4f} to {graded.high:.4f}")
    everything = forecasts.read(log)
    scored = forecasts.score(everything)
    assert scored is not None
    count = sum(f.measured is not None for f in everything)
    print(f"{count} graded: mean error {100 * scored[0]:.2f} %, {100 * scored[1]:.0f} % within their intervals")


def _measured(study: Path) -> float:
    """The mean loss of its runs, which are seeds of one."""
    from cs336.experiments import Ledger
    from cs336.scaling import read_points

    runs = read_points(study)
    if study.is_dir():
        _same({_but_its_seed(entry.config) for entry in Ledger(study).entries() if entry.state == "done"}, study)
    else:  # a file says no more of a run than its size and length
        _same({f"{n} {d}" for n, d in zip(runs.parameters, runs.tokens, strict=True)}, study)
    return float(runs.loss.mean())


def _run_of(study: Path, counting: "Counting") -> tuple[float, float, float]:
    """Parameters, tokens and FLOPs of its one run."""
    from cs336.experiments import Study
    from cs336.training import TrainConfig

    trials = Study.load(study).trials()
    if any(trial.planned.tokens is None for trial in trials):
        raise ValueError(f"{study}: a run under a budget of time has as many tokens as there is time for: give steps")
    _same({_but_its_seed(trial.table) for trial in trials}, study)
    model, tokens = TrainConfig.from_table(trials[0].table | {"run_dir": "."}).model, trials[0].planned.tokens
    assert tokens is not None
    parameters, flops = counting.of(model, tokens)
    return parameters, tokens, flops


def _but_its_seed(table: dict[str, Any]) -> str:
    """What a run is, in words."""
    return json.dumps(table | {"seed": None}, sort_keys=True, default=str)


def _same(runs: set[str], study: Path) -> None:
    if len(runs) != 1:
        raise ValueError(f"{study} has {len(runs)} runs: a forecast is of one, or of several seeds of it")
