"""A crawl that any machine can make: the running Python's documentation as a web site, with what crawls are full of.

Pages of prose from docstrings and the topics of `help()`, each within menus and notices; copies of them, whole or with
words changed; pages in other languages; spam; records that are broken. What was planted is known, so that what a build
finds of it can be counted.
"""

import ast
import hashlib
import html
import os
import pathlib
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

from cs336.data.sources.warc_writer import WarcWriter
from cs336.data.stdlib import LEFT_OUT

DATE = "2025-01-01T00:00:00Z"
LEAST_CHARS, MOST_CHARS = 600, 4000  # of a page
HELD_OUT = 0.1  # of the pages, by their text
COPIES, NEAR_COPIES, FOREIGN, SPAM = 0.15, 0.15, 0.2, 0.2  # of the pages
CHANGED = 0.02  # of the words of a near copy
NOTICE = "We use cookies so that this page knows you again; by reading on you agree to all of them."
MENU = ("Home", "About", "Library", "Topics", "Downloads", "Community", "Contact", "Log in")
SENTENCES = {
    "fr": (
        "Le marché ouvre tôt le matin et les voisins y achètent des légumes frais.",
        "Ma grande sœur habite une petite maison au bord de la rivière.",
        "Nous avons attendu le train pendant plus de deux heures hier soir.",
        "Il fait froid aujourd'hui, alors les enfants restent dans la cuisine.",
        "Cette année, la récolte a été bien meilleure que la précédente.",
        "Je ne sais pas encore si je pourrai venir avec vous dimanche prochain.",
    ),
    "de": (
        "Der Markt öffnet früh am Morgen, und die Nachbarn kaufen dort frisches Gemüse.",
        "Meine ältere Schwester wohnt in einem kleinen Haus am Ufer des Flusses.",
        "Gestern Abend haben wir mehr als zwei Stunden auf den Zug gewartet.",
        "Heute ist es kalt, deshalb bleiben die Kinder lieber in der Küche.",
        "In diesem Jahr war die Ernte viel besser als im vergangenen.",
        "Ich weiß noch nicht, ob ich am nächsten Sonntag mit euch kommen kann.",
    ),
    "es": (
        "El mercado abre temprano por la mañana y los vecinos compran verduras frescas.",
        "Mi hermana mayor vive en una casa pequeña a la orilla del río.",
        "Anoche esperamos el tren durante más de dos horas en la estación.",
        "Hoy hace frío, así que los niños se quedan dentro de la cocina.",
        "Este año la cosecha ha sido mucho mejor que la del año pasado.",
        "Todavía no sé si podré ir con vosotros el domingo que viene.",
    ),
    "ru": (
        "Рынок открывается рано утром, и соседи покупают там свежие овощи.",
        "Моя старшая сестра живёт в маленьком доме на берегу реки.",
        "Вчера вечером мы ждали поезда больше двух часов на станции.",
        "Сегодня холодно, поэтому дети остаются на тёплой кухне.",
        "В этом году урожай был намного лучше, чем в прошлом.",
        "Я ещё не знаю, смогу ли я поехать с вами в следующее воскресенье.",
    ),
}
OFFERS = ("cheap watches", "free casino", "miracle pills", "easy loans", "hot stocks", "discount visas")


@dataclass
class Planted:
    """What is in a crawl: URLs of pages by what they are, and of each copy the page that it is one of."""

    originals: list[str] = field(default_factory=list)
    copies: dict[str, str] = field(default_factory=dict)
    near_copies: dict[str, str] = field(default_factory=dict)
    foreign: list[str] = field(default_factory=list)
    spam: list[str] = field(default_factory=list)
    broken: int = 0


def stdlib_pages(most: int) -> tuple[list[str], list[str]]:
    """(pages of the crawl, pages held out): texts of documentation, `most` of them in all, no two of them equal."""
    pages: dict[str, None] = {}
    for text in _texts():
        for page in _paged(text):
            pages.setdefault(page)
        if len(pages) >= most:
            break
    crawled: list[str] = []
    held_out: list[str] = []
    for page in list(pages)[:most]:
        digest = hashlib.blake2b(page.encode("utf-8", "replace"), digest_size=8).digest()
        (held_out if int.from_bytes(digest, "big") < HELD_OUT * 2**64 else crawled).append(page)
    return crawled, held_out


def write_crawl(file: IO[bytes], pages: list[str], seed: int = 0) -> Planted:
    """Write a WARC of the pages and what is planted among them, in an order that the seed decides."""
    rng = random.Random(seed)
    planted = Planted()
    bodies: list[tuple[str, str]] = []
    for i, page in enumerate(pages):
        url = f"http://docs.example/{i}"
        planted.originals.append(url)
        bodies.append((url, page))
    for kind, share in (("copy", COPIES), ("near", NEAR_COPIES)):
        known = planted.copies if kind == "copy" else planted.near_copies
        for i in rng.sample(range(len(pages)), int(share * len(pages))):
            url = f"http://mirror.example/{kind}/{i}"
            known[url] = planted.originals[i]
            bodies.append((url, pages[i] if kind == "copy" else _changed(pages[i], rng)))
    for i in range(int(FOREIGN * len(pages))):
        language = sorted(SENTENCES)[i % len(SENTENCES)]
        planted.foreign.append(f"http://{language}.example/{i}")
        bodies.append((planted.foreign[-1], _foreign(language, rng)))
    for i in range(int(SPAM * len(pages))):
        planted.spam.append(f"http://shop.example/{i}")
        bodies.append((planted.spam[-1], _spam(rng)))
    rng.shuffle(bodies)
    planted.broken = _write(file, bodies, rng)
    return planted


def _write(file: IO[bytes], bodies: list[tuple[str, str]], rng: random.Random) -> int:
    """Returns how many broken records are among them."""
    writer = WarcWriter(file)
    writer.record("warcinfo", "application/warc-fields", b"software: cs336\r\n", date=DATE)
    broken = 0
    for i, (url, text) in enumerate(bodies):
        writer.page(url, _html(url, text), type="text/html; charset=utf-8", date=DATE)
        if i % 40 == 7:
            writer.page(url + "/gone", b"not found", status=404, date=DATE)
        if i % 80 == 17:
            broken += 1
            if rng.random() < 0.5:
                writer.raw(b"WARC/1.1\r\nWARC-Type: response\r\nContent-Length: unknown\r\n\r\n\r\n\r\n")
            else:
                file.write(b"\x1f\x8b\x08\x00" + rng.randbytes(200))  # begins like a member, and is none
    return broken


def _texts() -> Iterator[str]:
    """The topics of help(), then the docstrings of every module, joined."""
    try:
        from pydoc_data.topics import topics

        yield from (topics[name] for name in sorted(topics))
    except ImportError:  # a distribution may leave it out
        pass
    for directory, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = sorted(set(folders) - LEFT_OUT - {"test", "tests", "idlelib"})
        for name in sorted(name for name in names if name.endswith(".py")):
            path = pathlib.Path(directory, name)
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, SyntaxError):
                continue
            held = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            docs = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, held)]
            yield "\n\n".join(doc for doc in docs if doc)


def _paged(text: str) -> Iterator[str]:
    """Pages of whole paragraphs."""
    page = ""
    for paragraph in text.split("\n\n"):
        words = " ".join(paragraph.split())
        if len(page) + len(words) > MOST_CHARS:
            if len(page) >= LEAST_CHARS:
                yield page
            page = ""
        page = f"{page}\n\n{words[:MOST_CHARS]}".strip()
    if len(page) >= LEAST_CHARS:
        yield page


def _html(url: str, text: str) -> bytes:
    menu = "".join(f'<li><a href="/{name.lower()}">{name}</a></li>' for name in MENU)
    paragraphs = "".join(f"<p>{html.escape(paragraph)}</p>\n" for paragraph in text.split("\n\n"))
    return (
        f"<!doctype html><html><head><title>{url}</title></head><body><nav><ul>{menu}</ul></nav>\n"
        f"<main><article>{paragraphs}<p>{NOTICE}</p></article></main>"
        f"<aside><ul>{menu}</ul></aside><footer><p>All rights reserved. Contact webmaster@docs.example.</p></footer>"
        "</body></html>"
    ).encode("utf-8", "replace")


def _changed(text: str, rng: random.Random) -> str:
    """Another text with a few of its words in each other's place."""
    words = text.split(" ")
    for _ in range(max(1, int(CHANGED * len(words) / 2))):
        i, j = rng.randrange(len(words)), rng.randrange(len(words))
        words[i], words[j] = words[j], words[i]
    return " ".join(words)


def _foreign(language: str, rng: random.Random) -> str:
    paragraphs = (" ".join(rng.sample(SENTENCES[language], 4)) for _ in range(6))
    return "\n\n".join(paragraphs)


def _spam(rng: random.Random) -> str:
    offer = rng.choice(OFFERS)
    lines = (f"Buy {offer} now! {offer.title()} best price {rng.randint(9, 99)} $$$ click here." for _ in range(30))
    return "\n\n".join(lines)
