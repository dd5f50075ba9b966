"""Pre-training: configuration, objectives, budgets, the trainer, checkpoints, metrics."""

from cs336.optim.config import AdamWConfig as AdamWConfig
from cs336.optim.config import ConstantConfig as ConstantConfig
from cs336.optim.config import CosineConfig as CosineConfig
from cs336.optim.config import LinearConfig as LinearConfig
from cs336.optim.config import LionConfig as LionConfig
from cs336.optim.config import MuonConfig as MuonConfig
from cs336.optim.config import OptimizerConfig as OptimizerConfig
from cs336.optim.config import ScheduleConfig as ScheduleConfig
from cs336.optim.config import SGDConfig as SGDConfig
from cs336.optim.config import SOAPConfig as SOAPConfig
from cs336.optim.config import WSDConfig as WSDConfig
from cs336.optim.config import WSDSConfig as WSDSConfig
from cs336.training.budget import Budget as Budget
from cs336.training.checkpoint import load_checkpoint as load_checkpoint
from cs336.training.checkpoint import save_checkpoint as save_checkpoint
from cs336.training.config import DataConfig as DataConfig
from cs336.training.config import TrainConfig as TrainConfig
from cs336.training.guard import GuardConfig as GuardConfig
from cs336.training.guard import NonFiniteError as NonFiniteError
from cs336.training.guard import SpikeError as SpikeError
from cs336.training.guard import StepError as StepError
from cs336.training.objectives import NextToken as NextToken
from cs336.training.objectives import Objective as Objective
from cs336.training.trainer import Trainer as Trainer
from cs336.training.trainer import TrainResult as TrainResult
