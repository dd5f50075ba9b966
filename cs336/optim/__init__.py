"""Optimizers, clipping, and schedules as pure functions of the step."""

from cs336.optim.adamw import AdamW as AdamW
from cs336.optim.adamw import param_groups as param_groups
from cs336.optim.clipping import clip_grad_norm_ as clip_grad_norm_
from cs336.optim.clipping import clip_scale as clip_scale
from cs336.optim.clipping import grad_norm as grad_norm
from cs336.optim.config import AdamWConfig as AdamWConfig
from cs336.optim.config import ConstantConfig as ConstantConfig
from cs336.optim.config import CosineConfig as CosineConfig
from cs336.optim.config import LinearConfig as LinearConfig
from cs336.optim.config import OptimizerConfig as OptimizerConfig
from cs336.optim.config import ScheduleConfig as ScheduleConfig
from cs336.optim.config import WSDConfig as WSDConfig
from cs336.optim.muon import Muon as Muon
from cs336.optim.muon import muon_param_groups as muon_param_groups
from cs336.optim.muon import orthogonalize as orthogonalize
from cs336.optim.rounding import join as join
from cs336.optim.rounding import split as split
from cs336.optim.rounding import stochastic_round as stochastic_round
from cs336.optim.schedules import constant_schedule as constant_schedule
from cs336.optim.schedules import cosine_schedule as cosine_schedule
from cs336.optim.schedules import linear_schedule as linear_schedule
from cs336.optim.schedules import wsd_schedule as wsd_schedule
from cs336.optim.sgd import SGD as SGD
from cs336.optim.soap import SOAP as SOAP
