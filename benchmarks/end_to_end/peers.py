"""The tokenizer libraries that the benchmark compares, each behind the same few calls, and the process that times one.

    python -m benchmarks.end_to_end.peers '{"tool": "cs336", "job": "encode", ...}'

prints one JSON object. A process does one job of one tool, so that its first pass is cold and its memory is its own.
"""

import hashlib
import importlib
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

WARM = 3  # passes after the first

Call = Callable[..., Any]
# As Hugging Face writes the pattern of GPT-4: some libraries know it by its letters alone.
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def flat(result: tuple) -> Any:
    """(ids, offsets) as an array of ids."""
    import numpy as np

    ids = result[0]
    return np.frombuffer(ids, np.uint32) if isinstance(ids, (bytes, bytearray, memoryview)) else np.asarray(ids)


# ---- encode and decode: path of a tokenizer.json -> {"numpy", "list": (documents, threads) -> ids; "decode"} ----


def cs336(path: str) -> dict[str, Call]:
    from cs336.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(path)
    return {
        "numpy": lambda documents, threads: tokenizer.encode_batch_numpy(documents, threads)[0],
        "list": lambda documents, threads: tokenizer.encode_batch(documents, threads),
        "decode": tokenizer.decode,
    }


def gigatoken(path: str) -> dict[str, Call]:
    from gigatoken import Tokenizer

    tokenizer = Tokenizer(path)

    def numpy(documents, threads):
        import awkward

        return awkward.to_numpy(awkward.flatten(tokenizer.encode_batch(documents, parallel=threads > 1)))

    return {
        "numpy": numpy,
        "list": lambda documents, threads: tokenizer.encode_batch_list(documents, parallel=threads > 1),
        "decode": lambda ids: tokenizer.decode(ids).decode(),
    }


def snaptokens(path: str) -> dict[str, Call]:
    from snaptokens import Tokenizer

    return fast(Tokenizer.from_file(path))


def fastokens(path: str) -> dict[str, Call]:
    from fastokens import Tokenizer

    return fast(Tokenizer.from_file(path))


def fast(tokenizer: Any) -> dict[str, Call]:
    return {
        "numpy": lambda documents, threads: flat(tokenizer.encode_batch_flat(documents)),
        "list": lambda documents, threads: [getattr(e, "ids", e) for e in tokenizer.encode_batch(documents)],
        "decode": lambda ids: tokenizer.decode(ids.tolist()),
    }


def splintr(path: str) -> dict[str, Call]:
    from splintr import from_json

    tokenizer = from_json(path)
    return {
        "numpy": lambda documents, threads: flat(tokenizer.encode_batch_flat(documents)),
        "list": lambda documents, threads: tokenizer.encode_batch(documents),
        "decode": lambda ids: tokenizer.decode(ids.tolist()),
    }


def tuetoken(path: str) -> dict[str, Call]:
    from tuetoken import Tokenizer

    tokenizer = Tokenizer(path)
    return {
        "list": lambda documents, threads: tokenizer.encode_ordinary_batch(documents, threads),
        "decode": lambda ids: tokenizer.decode(ids.tolist()),
    }


def tiktoken(path: str) -> dict[str, Call]:
    import base64

    from tiktoken import Encoding

    lines = (line.split() for line in pathlib.Path(path).with_suffix(".tiktoken").read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    pattern = GPT2 if pathlib.Path(path).with_suffix(".pattern").read_text() == "gpt2" else CL100K
    encoding = Encoding("same", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return {
        "list": lambda documents, threads: encoding.encode_ordinary_batch(documents, num_threads=threads),
        "decode": lambda ids: encoding.decode(ids.tolist()),
    }


def tokenizers(path: str) -> dict[str, Call]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    return {
        "list": lambda documents, threads: [e.ids for e in tokenizer.encode_batch(documents, add_special_tokens=False)],
        "decode": lambda ids: tokenizer.decode(ids.tolist(), skip_special_tokens=False),
    }


# ---- train: (path of a text, size, threads) -> None ----


def train_cs336(path: str, vocab_size: int, threads: int) -> None:
    from cs336.tokenizer import Tokenizer

    Tokenizer.train([pathlib.Path(path)], vocab_size, num_threads=threads)


def train_gigabpe(path: str, vocab_size: int, threads: int) -> None:
    import gigabpe

    gigabpe.train_bpe([path], vocab_size, special_tokens=[], pretokenizer="bytelevel", threads=threads)


def train_gigatoken(path: str, vocab_size: int, threads: int) -> None:
    import gigatoken

    gigatoken.train_bpe(path, vocab_size, special_tokens=[])


def train_rustbpe(path: str, vocab_size: int, threads: int) -> None:
    import rustbpe

    with open(path, encoding="utf-8", newline="") as lines:
        rustbpe.Tokenizer().train_from_iterator(lines, vocab_size, pattern=GPT2)


def train_bpeasy(path: str, vocab_size: int, threads: int) -> None:
    import bpeasy

    with open(path, encoding="utf-8", newline="") as lines:
        bpeasy.train_bpe(lines, GPT2, 128, vocab_size)


def train_tokenizers(path: str, vocab_size: int, threads: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train([path], trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, initial_alphabet=alphabet))


CODERS = {f.__name__: f for f in (cs336, gigatoken, snaptokens, fastokens, splintr, tuetoken, tiktoken, tokenizers)}
TRAINERS = {
    "cs336": train_cs336,
    "gigabpe": train_gigabpe,
    "gigatoken": train_gigatoken,
    "rustbpe": train_rustbpe,
    "bpeasy": train_bpeasy,
    "tokenizers": train_tokenizers,
}
LISTS_ALONE = {"tuetoken", "tiktoken", "tokenizers"}  # have no output as an array for many documents
DISTRIBUTIONS = {"splintr": "splintr-rs"}  # where it is not called as its module


# ---- one process ----


def documents_of(path: str) -> list[str]:
    """A text in documents of some 100 KB, cut after line breaks."""
    documents, size = [""], 0
    with open(path, encoding="utf-8", newline="") as file:
        lines: list[str] = []
        for line in file:
            lines.append(line)
            size += len(line)
            if size >= 100_000:
                documents.append("".join(lines))
                lines, size = [], 0
    return [*documents[1:], "".join(lines)]


def peak_mb() -> float:
    """Of this program alone: what getrusage says begins with the memory of the process that started it."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1e3


def timed(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    cpu, wall = time.process_time(), time.perf_counter()
    result = call()
    return result, {"cpu": max(1e-6, time.process_time() - cpu), "wall": max(1e-6, time.perf_counter() - wall)}


def repeated(call: Callable[[], Any]) -> list[dict[str, float]]:
    """A few times, or for a few seconds."""
    times = [timed(call)[1]]
    while len(times) < WARM and sum(t["wall"] for t in times) < 5:
        times.append(timed(call)[1])
    return times


def encode(tool: str, tokenizer: str, text: str, output: str, threads: int, **_: Any) -> dict[str, Any]:
    """output: numpy or list; or shard: from the file of text to a file of ids."""
    import numpy as np

    calls = CODERS[tool](tokenizer)
    documents = documents_of(text)
    calls["list" if output == "list" else "numpy"](["x"] * threads, threads)  # what a library imports or starts late
    before = peak_mb()

    def run():
        if output != "shard":
            return calls[output](documents, threads)
        ids = calls["numpy"](documents_of(text), threads)
        ids.tofile(f"{text}.{os.getpid()}.ids")
        return ids

    ids, cold = timed(run)
    peak = peak_mb()
    warm = repeated(run)
    pathlib.Path(f"{text}.{os.getpid()}.ids").unlink(missing_ok=True)
    ids = np.concatenate([np.asarray(part, np.uint32) for part in ids]) if output == "list" else ids.astype(np.uint32)
    again = {key: statistics.median(w[key] for w in warm) for key in cold}
    digest = hashlib.sha256(ids.tobytes()).hexdigest()
    return {"cold": cold, "warm": again, "peak_mb": peak, "before_mb": before, "ids": digest, "tokens": len(ids)}


def decode(tool: str, tokenizer: str, text: str, **_: Any) -> dict[str, Any]:
    import numpy as np

    calls = CODERS[tool](tokenizer)
    whole = pathlib.Path(text).read_bytes().decode()
    ids = np.concatenate([np.asarray(part, np.uint32) for part in calls["list"](documents_of(text), 1)])
    before = peak_mb()
    decoded, cold = timed(lambda: calls["decode"](ids))
    peak = peak_mb()
    warm = repeated(lambda: calls["decode"](ids))
    again = {key: statistics.median(w[key] for w in warm) for key in cold}
    digest = "the text" if decoded == whole else "another text"
    return {"cold": cold, "warm": again, "peak_mb": peak, "before_mb": before, "ids": digest, "tokens": len(ids)}


def train(tool: str, text: str, vocab_size: int, threads: int, **_: Any) -> dict[str, Any]:
    importlib.import_module("cs336.tokenizer" if tool == "cs336" else tool)
    before = peak_mb()
    _result, cold = timed(lambda: TRAINERS[tool](text, vocab_size, threads))
    return {"cold": cold, "peak_mb": peak_mb(), "before_mb": before}


def double(tool: str, tokenizer: str, text: str, **_: Any) -> dict[str, Any]:
    """Seconds for one piece that no place splits, of 1, 2, 4 and 8 times `text`, repeated to 64 KB."""
    calls = CODERS[tool](tokenizer)
    unit = (text * (1 << 16))[: 1 << 16]
    return {
        "seconds": [min(timed(lambda n=n: calls["list"]([unit * n], 1))[1]["cpu"] for _ in "123") for n in (1, 2, 4, 8)]
    }


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    os.environ["RAYON_NUM_THREADS"] = str(job.get("threads", 1))
    print(json.dumps({"encode": encode, "decode": decode, "train": train, "double": double}[job["job"]](**job)))
