"""Smaller models by pruning: weights set to zero, layers dropped, neurons and heads taken out."""

from cs336.compression.job import Pruned as Pruned
from cs336.compression.job import prune as prune
from cs336.compression.narrowing import block_influence as block_influence
from cs336.compression.narrowing import drop_layers as drop_layers
from cs336.compression.narrowing import prune_depth as prune_depth
from cs336.compression.narrowing import prune_width as prune_width
from cs336.compression.pruning import lowest as lowest
from cs336.compression.pruning import lowest_2_4 as lowest_2_4
from cs336.compression.pruning import prune_weights_ as prune_weights_
