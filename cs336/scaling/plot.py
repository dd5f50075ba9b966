"""Runs, valleys and residuals, and coordinate checks, as pictures."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from cs336.scaling.coordinates import Coordinates
from cs336.scaling.fit import fit_chinchilla
from cs336.scaling.isoflop import fit_isoflop
from cs336.scaling.points import Points


def draw(points: Points, path: pathlib.Path) -> None:
    """Loss by size, a colour a budget, with the valleys where the runs have some; residuals of the Chinchilla law.

    Raises ImportError without matplotlib.
    """
    pyplot = _pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    shown = left.scatter(points.parameters, points.loss, c=np.log10(points.flops), s=14)
    figure.colorbar(shown, ax=left, label="log10 FLOPs")
    try:
        valleys = fit_isoflop(points)
        left.plot(valleys.parameters, valleys.loss, "k.-", label=f"N = C^{valleys.parameter_law.exponent:.3f}")
        left.legend()
    except ValueError as error:
        left.set_title(f"no valleys: {error}", fontsize=7, wrap=True)
    left.set(xscale="log", xlabel="parameters", ylabel="loss (nats a token)")
    fit = fit_chinchilla(points, bootstrap=0)
    right.axhline(0, color="grey", linewidth=0.8)
    right.scatter(points.flops, 100 * fit.residuals, c=np.log10(points.parameters), s=14)
    law = fit.law
    right.set(
        xscale="log",
        xlabel="FLOPs",
        ylabel="loss above the law, %",
        title=f"{law.E:.3f} + {law.A:.4g} / N^{law.alpha:.3f} + {law.B:.4g} / D^{law.beta:.3f}",
    )
    figure.savefig(path)
    pyplot.close(figure)


def draw_coordinates(checks: Mapping[str, Coordinates], path: pathlib.Path) -> None:
    """How far each activation has moved after the last step, against the width: a panel a parametrisation.

    Raises ImportError without matplotlib.
    """
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(1, len(checks), figsize=(6 * len(checks), 5), sharey=True, layout="constrained")
    for panel, (title, check) in zip(np.atleast_1d(panels), checks.items(), strict=True):
        for name, slope in check.slopes().items():
            panel.plot(check.widths, check.moved[name][:, -1], ".-", label=f"{name}: width^{slope:.2f}")
        panel.set_xscale("log", base=2)
        panel.set(yscale="log", xlabel="width", ylabel="RMS of the change", title=title)
        panel.legend(fontsize=8)
    figure.savefig(path)
    pyplot.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ImportError("drawing needs matplotlib: pip install 'cs336[plot]'") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot
