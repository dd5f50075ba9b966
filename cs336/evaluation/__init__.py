"""How good a model is: bits per byte of held-out text, beside what needs no neural network."""

from typing import Any

from cs336.evaluation.baseline import Baseline as Baseline
from cs336.evaluation.baseline import baselines as baselines
from cs336.evaluation.evaluation import MOST_TOKENS as MOST_TOKENS
from cs336.evaluation.evaluation import Evaluation as Evaluation
from cs336.evaluation.evaluation import evaluate as evaluate
from cs336.evaluation.evaluation import evaluate_text as evaluate_text
from cs336.evaluation.evaluation import last_step as last_step
from cs336.evaluation.evaluation import last_validation as last_validation
from cs336.evaluation.held_out import mean_loss as mean_loss
from cs336.evaluation.saved import evaluate_saved as evaluate_saved
from cs336.evaluation.tasks import Options as Options
from cs336.evaluation.tasks import Results as Results
from cs336.evaluation.tasks import Task as Task
from cs336.evaluation.tasks import pass_at_k as pass_at_k
from cs336.evaluation.tasks import read_task as read_task
from cs336.evaluation.tasks import run_tasks as run_tasks
from cs336.evaluation.tasks import save_results as save_results
from cs336.training.evaluators import bits_per_byte as bits_per_byte


def __getattr__(name: str) -> Any:
    if name == "LMEvalModel":  # needs lm-evaluation-harness
        from cs336.evaluation.lm_eval_model import LMEvalModel

        return LMEvalModel
    raise AttributeError(f"module 'cs336.evaluation' has no attribute {name!r}")
