"""Training over several processes, started by torchrun: what splits the work, each piece usable on its own."""

from cs336.parallel.collectives import Traffic as Traffic
from cs336.parallel.collectives import count_traffic as count_traffic
from cs336.parallel.ddp import DDP as DDP
from cs336.parallel.fsdp import FSDP as FSDP
from cs336.parallel.launch import RankError as RankError
from cs336.parallel.launch import connect as connect
from cs336.parallel.layout import ParallelConfig as ParallelConfig
from cs336.parallel.sharded_optimizer import ShardedOptimizer as ShardedOptimizer
