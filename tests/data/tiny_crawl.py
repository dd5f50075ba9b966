"""A crawl of a few pages of every fate, and a recipe over it."""

import json
import random

from cs336.data.sources import WarcWriter

DATE = "2025-03-01T12:00:00Z"
WORDS = [
    *("the", "of", "and", "to", "in", "a", "is", "that", "was", "for", "it", "on", "with", "as", "his", "by", "at"),
    *("from", "they", "we", "say", "her", "she", "or", "an", "will", "my", "one", "all", "would", "there", "their"),
    *("river", "mountain", "garden", "letter", "window", "winter", "summer", "morning", "village", "captain"),
    *("sister", "journey", "silence", "castle", "harvest", "teacher", "question", "answer", "music", "shadow"),
    *("forest", "bridge", "island", "market", "stranger", "promise", "memory"),
]
NOTICE = "This notice about cookies stands at the end of every page of the crawl."


def prose(rng, sentences=12):
    def sentence():
        return " ".join(rng.choices(WORDS, k=rng.randint(8, 16))).capitalize() + "."

    return "\n\n".join(" ".join(sentence() for _ in range(4)) for _ in range(sentences // 4))


def html(text):
    paragraphs = "".join(f"<p>{part}</p>" for part in text.split("\n\n"))
    return f"<!doctype html><title>t</title><body><article>{paragraphs}<p>{NOTICE}</p></article></body>".encode()


def near(text, rng):
    """Another text with one word in a hundred changed, or one at least."""
    words = text.split(" ")
    for i in rng.sample(range(len(words)), max(1, len(words) // 100)):
        words[i] = rng.choice(WORDS)
    return " ".join(words)


def write_crawl(directory, *, files=3, pages=12):
    """crawl-*.warc.gz and notes.jsonl. Returns {url of a copy: url of what it is a copy of}."""
    rng = random.Random(0)
    directory.mkdir(parents=True)
    copies, originals = {}, []
    for f in range(files):
        with (directory / f"crawl-{f}.warc.gz").open("wb") as file:
            writer = WarcWriter(file)
            writer.record("warcinfo", "application/warc-fields", b"x: y\r\n", date=DATE)
            for i in range(pages):
                url, text = f"http://crawl/{f}/{i}", prose(rng)
                if originals and i % 4 == 3:
                    copies[url], text = originals[rng.randrange(len(originals))]
                    text = text if i % 8 == 3 else near(text, rng)
                else:
                    originals.append((url, text))
                writer.page(url, html(text), date=DATE)
            writer.page(f"http://crawl/{f}/short", b"<p>too short to stay</p>", date=DATE)
            writer.page(f"http://crawl/{f}/gone", b"gone", status=404, date=DATE)
            writer.raw(b"WARC/1.1\r\nContent-Length: none\r\n\r\n")
    with (directory / "notes.jsonl").open("w") as file:
        for i in range(6):
            file.write(json.dumps({"id": f"note-{i}", "text": prose(rng), "licence": "CC0-1.0"}) + "\n")
        file.write("not JSON\n")
    return copies


RECIPE = """
output = "{output}"
{top}
[[sources]]
kind = "warc"
paths = ["{crawl}/*.warc.gz"]
[[sources]]
kind = "jsonl"
paths = ["{crawl}/notes.jsonl"]
name = "notes"
[[steps]]
kind = "length"
min_chars = 200
[[steps]]
kind = "gopher_quality"
[[steps]]
kind = "mask_pii"
[[dedup]]
kind = "documents"
[[dedup]]
kind = "minhash"
threshold = 0.7
[[dedup]]
kind = "lines"
keep = "none"
[tokenize]
vocab_size = 300
val_fraction = 0.2
shard_tokens = 1000
{end}
"""


def write_recipe(path, crawl, output="out", top="", end=""):
    path.write_text(RECIPE.format(crawl=crawl, output=output, top=top, end=end))
    return path


TIMES = {"stages.json", ".contents.json", ".sources.json", ".stages.lock", ".workers.lock", ".lock", "report.html"}


def tree(directory):
    """What a build made, but for what says when."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name not in TIMES)
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}
