"""`cs336 train`, whose rank 1 dies in step 6 when it is started first."""

import os
import signal
import sys

from cs336.cli import main
from cs336.training import Trainer

update = Trainer._update


def faulty(self):
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"], self.step + 1) == ("1", "0", 6):
        os.kill(os.getpid(), signal.SIGKILL)
    update(self)


Trainer._update = faulty
sys.exit(main(["train", *sys.argv[1:]]))
