"""Run a verb in a process of its own that is killed as it puts its second checkpoint in place."""

import dataclasses
import signal
import subprocess
import sys

from tiny_policy import rows_of, without_time

from cs336.alignment.run import StageRun
from cs336.cli.program import main
from cs336.utils import config as configs

CHILD = """
import os, signal, sys
from cs336.cli.program import main
from cs336.training import checkpoint
put, done = checkpoint._put_in_place, []
def put_or_die(temporary, path):
    if done:
        os.kill(os.getpid(), signal.SIGKILL)
    put(temporary, path)
    done.append(path)
checkpoint._put_in_place = put_or_die
sys.exit(main(sys.argv[1:]))
"""


def check_a_killed_run_repeats_itself(stage, settings):
    """Bit for bit, but for its times: `killed` beside the run that was not."""
    StageRun(settings, stage(settings)).train()
    killed = settings.run_dir.with_name("killed")
    path = settings.run_dir.with_name("config.toml")
    path.write_text(configs.dumps(dataclasses.replace(settings, run_dir=killed)))
    command = [stage.verb, "--config", str(path)]
    done = subprocess.run([sys.executable, "-c", CHILD, *command], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((killed / "checkpoints").glob("step_*"))) == 1
    assert main(command) == 0
    assert without_time(rows_of(killed)) == without_time(rows_of(settings.run_dir))
