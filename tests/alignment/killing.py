"""Run a verb in a process of its own, and kill it once it has a checkpoint."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

from tiny_policy import rows_of, without_time

from cs336.alignment.run import StageRun
from cs336.cli.program import main
from cs336.utils import config as configs


def check_a_killed_run_repeats_itself(stage, settings):
    """Bit for bit, but for its times: `killed` beside the run that was not."""
    StageRun(settings, stage(settings)).train()
    killed = settings.run_dir.with_name("killed")
    path = settings.run_dir.with_name("config.toml")
    path.write_text(configs.dumps(dataclasses.replace(settings, run_dir=killed)))
    kill_once_saved(stage.verb, path, killed)
    assert main([stage.verb, "--config", str(path)]) == 0
    assert without_time(rows_of(killed)) == without_time(rows_of(settings.run_dir))


def kill_once_saved(verb, config, run_dir, most_seconds=120):
    command = [sys.executable, "-m", "cs336", verb, "--config", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    deadline = time.time() + most_seconds
    while not list((run_dir / "checkpoints").glob("step_*")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.time() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
