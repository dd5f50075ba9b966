"""Tasks: data files, a small reader for each kind, and scores of what a model says."""

from cs336.evaluation.tasks.run import KINDS as KINDS
from cs336.evaluation.tasks.run import Results as Results
from cs336.evaluation.tasks.run import Task as Task
from cs336.evaluation.tasks.run import read_task as read_task
from cs336.evaluation.tasks.run import run_tasks as run_tasks
from cs336.evaluation.tasks.run import save_results as save_results
from cs336.evaluation.tasks.task import Item as Item
from cs336.evaluation.tasks.task import Metric as Metric
from cs336.evaluation.tasks.task import Options as Options
from cs336.evaluation.tasks.task import metrics as metrics
from cs336.evaluation.tasks.task import pass_at_k as pass_at_k
