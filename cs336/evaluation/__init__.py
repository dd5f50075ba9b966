"""How good a model is: bits per byte of held-out text, beside what needs no neural network."""

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
from cs336.training.evaluators import bits_per_byte as bits_per_byte
