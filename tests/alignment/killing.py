"""Run a verb in a process of its own, and kill it once it has a checkpoint."""

import os
import signal
import subprocess
import sys
import time


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
