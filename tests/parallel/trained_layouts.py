"""`cs336 train` of several configurations, one after the other, in processes that torchrun started once.

arguments: configurations. What each refuses or returns is printed by rank 0.
"""

import sys

from cs336.cli import main
from cs336.parallel import connect
from cs336.parallel.launch import rank

connect("cpu")
for path in sys.argv[1:]:
    status = main(["train", "--config", path])
    if rank() == 0:
        print(f"{path}: {status}", flush=True)
