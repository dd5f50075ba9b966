"""Training over several processes, started by torchrun: what splits the work, each piece usable on its own."""

from cs336.parallel.collectives import Traffic as Traffic
from cs336.parallel.collectives import count_traffic as count_traffic
from cs336.parallel.context import all_to_all_attention as all_to_all_attention
from cs336.parallel.context import context_parallel as context_parallel
from cs336.parallel.context import own_positions as own_positions
from cs336.parallel.context import own_tokens as own_tokens
from cs336.parallel.context import ring_attention as ring_attention
from cs336.parallel.ddp import DDP as DDP
from cs336.parallel.expert import expert_parallel as expert_parallel
from cs336.parallel.expert import expert_parameters as expert_parameters
from cs336.parallel.fsdp import FSDP as FSDP
from cs336.parallel.launch import RankError as RankError
from cs336.parallel.launch import connect as connect
from cs336.parallel.layout import ParallelConfig as ParallelConfig
from cs336.parallel.mesh import Mesh as Mesh
from cs336.parallel.pipeline import Pipeline as Pipeline
from cs336.parallel.pipeline import pipeline_stage as pipeline_stage
from cs336.parallel.sharded_optimizer import ShardedOptimizer as ShardedOptimizer
from cs336.parallel.tensor import ColumnLinear as ColumnLinear
from cs336.parallel.tensor import Region as Region
from cs336.parallel.tensor import RowLinear as RowLinear
from cs336.parallel.tensor import tensor_parallel as tensor_parallel
from cs336.parallel.vocabulary import VocabularyEmbedding as VocabularyEmbedding
from cs336.parallel.vocabulary import vocabulary_cross_entropy as vocabulary_cross_entropy
