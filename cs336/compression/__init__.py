"""Smaller models: weights set to zero, layers dropped, neurons and heads taken out; and students of larger ones."""

from cs336.compression.distill_job import DistillConfig as DistillConfig
from cs336.compression.distill_job import Distilled as Distilled
from cs336.compression.distill_job import distill as distill
from cs336.compression.distillation import Distill as Distill
from cs336.compression.distillation import TopLogits as TopLogits
from cs336.compression.distillation import kl_of_top as kl_of_top
from cs336.compression.job import Pruned as Pruned
from cs336.compression.job import prune as prune
from cs336.compression.narrowing import block_influence as block_influence
from cs336.compression.narrowing import drop_layers as drop_layers
from cs336.compression.narrowing import prune_depth as prune_depth
from cs336.compression.narrowing import prune_width as prune_width
from cs336.compression.pareto import Row as Row
from cs336.compression.pareto import front as front
from cs336.compression.pareto import pareto as pareto
from cs336.compression.pruning import lowest as lowest
from cs336.compression.pruning import lowest_2_4 as lowest_2_4
from cs336.compression.pruning import prune_weights_ as prune_weights_
