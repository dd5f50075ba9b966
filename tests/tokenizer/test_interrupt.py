"""Ctrl-C while the core is at work: acted on at once, and nothing is broken by it."""

import signal
import subprocess
import sys
import time

import pytest

PREPARE = """
import time
import numpy as np
from cs336.tokenizer import Tokenizer
tokenizer = Tokenizer.train(["the quick brown fox "] * 2, 270, ["<|a|>", "|b|"])
letters = np.frombuffer(b"abcdefghijklmnop  ", np.uint8)
text = np.random.default_rng(0).choice(letters, 80_000_000).tobytes()
documents = [text[i : i + 5000] for i in range(0, len(text), 5000)]
by_expression = Tokenizer(tokenizer.vocab, tokenizer.merges, pattern=r"\\p{L}+|\\P{L}+")
expected = tokenizer.encode("the quick")
given = GIVEN  # here: Python's own work on so much text is not interrupted
print("ready", flush=True)
try:
    while True:
        WORK
except KeyboardInterrupt:
    print(time.process_time(), flush=True)
assert tokenizer.encode("the quick") == expected
assert tokenizer.encode_batch(["the quick"] * 9, 2) == [expected] * 9
print("good", flush=True)
"""
LIMIT = 0.2  # seconds of the processor, of all threads: those in which other programs hold it do not count


def processor_seconds(pid):
    return time.clock_gettime(~pid << 3 | 2)  # the clock of a process: clock_getcpuclockid(3)


@pytest.mark.parametrize(
    ("work", "given"),
    [
        ("tokenizer.encode(given)", "text"),
        ("tokenizer.encode(given, num_threads=2)", "text"),
        ("tokenizer.encode(given)", "text.decode() + '\\u4e2d'"),
        ("tokenizer.encode_ordinary(given)", "text.replace(b' ', b'x')[:20_000_000]"),  # one piece
        ("tokenizer.encode_batch(given, 2)", "documents"),
        ("tokenizer.encode_batch_numpy(given, 1)", "documents"),
        ("list(tokenizer.encode_iterable(iter([given])))", "text"),
        ("by_expression.encode_batch(given, 2)", "documents"),
        ("Tokenizer.train(given, 50_000, num_threads=2)", "documents"),
        ("tokenizer.decode(given)", "np.full(50_000_000, 97, np.uint16)"),
    ],
)
def test_work_stops_at_once(work, given):
    code = PREPARE.replace("WORK", work).replace("GIVEN", given)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        ready = processor_seconds(process.pid)
        while (begin := processor_seconds(process.pid)) < ready + 0.4:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert float(process.stdout.readline()) - begin < LIMIT
        assert process.stdout.readline() == "good\n"
    assert process.returncode == 0
