"""Training over several processes, started by torchrun: what splits the work, each piece usable on its own."""

from cs336.parallel.collectives import Traffic as Traffic
from cs336.parallel.collectives import count_traffic as count_traffic
from cs336.parallel.ddp import DDP as DDP
from cs336.parallel.sharded_optimizer import ShardedOptimizer as ShardedOptimizer
