"""Studies: many training runs with one question, each trained once, under one budget, by any number of processes."""

from cs336.experiments.ledger import Entry as Entry
from cs336.experiments.ledger import Ledger as Ledger
from cs336.experiments.runner import run_study as run_study
from cs336.experiments.study import Cost as Cost
from cs336.experiments.study import Study as Study
from cs336.experiments.study import Trial as Trial
from cs336.experiments.train import train_run as train_run
