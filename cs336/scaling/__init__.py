"""Scaling laws: what loss a budget buys, fitted to runs that were made and asked about runs that were not."""

from cs336.scaling.collapse import Collapse, collapse
from cs336.scaling.compute import ComputeFit, ComputeLaw, fit_compute
from cs336.scaling.fit import EPOCH_FIT, Fit, fit_chinchilla
from cs336.scaling.isoflop import IsoFlopFit, PowerLaw, fit_envelope, fit_isoflop
from cs336.scaling.laws import EPOCH, Allocation, ChinchillaLaw, DataConstrainedLaw, step_law
from cs336.scaling.points import Counting, Points, read_points
from cs336.scaling.rates import PowerFit, fit_critical_batch, fit_power, fit_step_law
from cs336.scaling.repeats import Repeats, fit_repeats

__all__ = [
    "EPOCH",
    "EPOCH_FIT",
    "Allocation",
    "ChinchillaLaw",
    "Collapse",
    "ComputeFit",
    "ComputeLaw",
    "Counting",
    "DataConstrainedLaw",
    "Fit",
    "IsoFlopFit",
    "Points",
    "PowerFit",
    "PowerLaw",
    "Repeats",
    "collapse",
    "fit_chinchilla",
    "fit_compute",
    "fit_critical_batch",
    "fit_envelope",
    "fit_isoflop",
    "fit_power",
    "fit_repeats",
    "fit_step_law",
    "read_points",
    "step_law",
]
