"""Tasks that ask how likely a model finds a text: multiple choice, continuations, bits per byte."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from cs336.evaluation.tasks.task import Answered, Item, Model, Options, Row

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Scored(NamedTuple):
    logprob: float
    """Nats, of the whole continuation."""
    greedy: bool
    """Whether each of its tokens was the likeliest."""


def loglikelihoods(model: Model, pairs: Sequence[tuple[str, str]]) -> list[Scored]:
    """How likely each (prompt, continuation) is, split as lm-evaluation-harness splits: spaces at a prompt's end go to
    the continuation, both are encoded together, and cut after as many tokens as the prompt has alone. An empty prompt
    begins a document. What does not fit the model's context is cut off at the left.

    Raises ValueError for an empty continuation, and one that does not fit.
    """
    if not all(continuation for _, continuation in pairs):
        raise ValueError("there is an empty continuation, which has no tokens to score")
    moved = [(p.rstrip(), p[len(p.rstrip()) :] + c) for p, c in pairs]
    heads = model.encode([p for p, _ in moved])
    wholes = model.encode([p + c for p, c in moved])
    prompts, ends, most = [], [], model.engine.max_len - 1
    for (p, c), head, whole in zip(moved, heads, wholes, strict=True):
        cut = len(head) if p else len(model.tokenizer.begin_ids)
        start, end = (whole[:cut] or head, whole[cut:])
        if not end:  # it became a part of the prompt's last token
            start, end = head, model.tokenizer.encode(c, "all", behind=head)
        if len(end) >= most:
            raise ValueError(f"a continuation has {len(end)} tokens, which leaves no room in a sequence of {most + 1}")
        prompts.append(start[len(end) - most :] if len(start) + len(end) > most else start)
        ends.append(end)
    return [
        Scored(sum(t.logprob for t in row), all(t.top[0][0] == t.id for t in row))
        for row in model.score(prompts, ends, top=1)
    ]


def rolling(model: Model, texts: Sequence[str]) -> list[float]:
    """Log-probability of each text, in nats, over windows of the model's context, each after the last token of the one
    before, the first after the token that begins a document."""
    window = model.engine.max_len - 2
    (begin,) = model.encode([""])
    heads: list[list[int]] = []
    ends: list[list[int]] = []
    owners: list[int] = []
    for number, ids in enumerate(model.encode(texts)):
        ids = ids[len(model.tokenizer.begin_ids) :]
        for at in range(0, len(ids), window):
            heads.append(ids[at - 1 : at] or begin)
            ends.append(ids[at : at + window])
            owners.append(number)
    nats = [0.0] * len(texts)
    for owner, row in zip(owners, model.score(heads, ends), strict=True):
        nats[owner] += sum(token.logprob for token in row)
    return nats


class Choice:
    """Rows: query or question, choices, gold or answer (a number or a letter), as in llm-foundry; or ARC's choices =
    {text, label} and answerKey; or context_options and a continuation that all share (Winograd). Each choice follows
    the question after a space; the likeliest is the model's, for acc_norm by its log-probability a character of the
    choice, as in lm-evaluation-harness."""

    name, separator = "choice", "\n\n"

    def read(self, row: Row) -> Item:
        if "context_options" in row:
            if not 0 <= row["gold"] < len(row["context_options"]):
                raise ValueError(f"gold is {row['gold']}, of {len(row['context_options'])} options")
            return Item("", f"{row['context_options'][row['gold']]} {row['continuation'].strip()}", row)
        question, choices, gold = _choices(row)
        return Item(question, _after(question, choices[gold]), row)

    def answer(self, model: Model, items: Sequence[Item], prompts: Sequence[str], options: Options) -> list[Answered]:
        pairs, sizes, golds = [], [], []
        prompts = _texts(model, prompts, options)
        for item, prompt in zip(items, prompts, strict=True):
            row = item.row
            if "context_options" in row:
                if options.chat:
                    raise ValueError("rows of context_options ask nothing that a chat could answer: leave chat out")
                listed = [
                    (f"{prompt}{context}", f" {row['continuation'].strip()}") for context in row["context_options"]
                ]
                gold = row["gold"]
            else:
                _, choices, gold = _choices(row)
                listed = [(prompt, _after(prompt, choice)) for choice in choices]
            pairs += listed
            sizes.append(len(listed))
            golds.append(gold)
        scored, answered = iter(zip(pairs, loglikelihoods(model, pairs), strict=True)), []
        for prompt, size, gold in zip(prompts, sizes, golds, strict=True):
            mine = [next(scored) for _ in range(size)]
            sums = [found.logprob for _, found in mine]
            norms = [found.logprob / max(1, len(c.removeprefix(" "))) for (_, c), found in mine]
            right = {"acc": float(_best(sums) == gold), "acc_norm": float(_best(norms) == gold)}
            said = [{"prompt": p, "choice": c, "logprob": f.logprob} for (p, c), f in mine]
            answered.append(Answered(prompt, said, right, [f"the right one is number {gold}"]))
        return answered


class Letters:
    """Rows of MMLU: question, choices, answer (a number or a letter), subject. The choices are written under the
    question with their letters, and the likeliest letter is the model's answer (arXiv:2009.03300)."""

    name, separator = "mmlu", "\n\n"

    def read(self, row: Row) -> Item:
        question, choices, gold = _choices(row)
        if len(choices) > len(LETTERS):
            raise ValueError(f"there are {len(choices)} choices, expected at most {len(LETTERS)}, which have letters")
        subject = f" about {row['subject'].replace('_', ' ')}" if row.get("subject") else ""
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
        return Item(
            "\n".join([question.strip(), *lines, "Answer:"]), f" {LETTERS[gold]}", row,
            f"The following are multiple choice questions (with answers){subject}.\n\n",
        )  # fmt: skip

    def answer(self, model: Model, items: Sequence[Item], prompts: Sequence[Any], options: Options) -> list[Answered]:
        texts = _texts(model, prompts, options)
        listed = [LETTERS[: len(_choices(item.row)[1])] for item in items]
        pairs = [
            (text, _after(text, letter)) for text, letters in zip(texts, listed, strict=True) for letter in letters
        ]
        scored, answered = iter(loglikelihoods(model, pairs)), []
        for text, letters, item in zip(texts, listed, items, strict=True):
            found = {letter: next(scored).logprob for letter in letters}
            right = max(found, key=found.__getitem__) == item.target.strip()
            answered.append(Answered(text, [found], {"acc": float(right)}, [f"the right one is{item.target}"]))
        return answered


class Continuation:
    """Rows: context and continuation, or answer. acc: whether the continuation is the likeliest, token by token (as in
    LAMBADA); logprob: its nats."""

    name, separator = "continuation", "\n\n"

    def read(self, row: Row) -> Item:
        wanted = row["continuation"] if "continuation" in row else row["answer"]
        return Item(row["context"], _after(row["context"], wanted), row)

    def answer(self, model: Model, items: Sequence[Item], prompts: Sequence[str], options: Options) -> list[Answered]:
        prompts = _texts(model, prompts, options)
        pairs = [
            (p, _after(p, item.target.strip()) if options.chat else item.target)
            for p, item in zip(prompts, items, strict=True)
        ]
        scored = loglikelihoods(model, pairs)
        return [
            Answered(p, [item.target], {"acc": float(s.greedy), "logprob": s.logprob})
            for p, item, s in zip(prompts, items, scored, strict=True)
        ]


class Text:
    """Rows: text. bits_per_byte over windows of the model's context, each after the last token of the one before."""

    name, separator = "text", ""

    def read(self, row: Row) -> Item:
        if not row["text"]:
            raise ValueError("the text is empty")
        return Item("", row["text"], row)

    def answer(self, model: Model, items: Sequence[Item], prompts: Sequence[str], options: Options) -> list[Answered]:
        nats = rolling(model, [item.target for item in items])
        sizes = [len(item.target.encode()) for item in items]
        return [
            Answered(item.target, [], {"bits_per_byte": -total / math.log(2) / size}, weight=size)
            for item, total, size in zip(items, nats, sizes, strict=True)
        ]


def _choices(row: Row) -> tuple[str, list[str], int]:
    question = row["query"] if "query" in row else row["question"]
    choices: Any = row["choices"]
    if isinstance(choices, dict):
        choices, gold = choices["text"], choices["label"].index(row["answerKey"])
    else:
        gold = row["gold"] if "gold" in row else row["answer"]
    at = gold
    if isinstance(gold, str):
        at = int(gold) if gold.isdecimal() else LETTERS.find(gold) if len(gold) == 1 else None
    if not isinstance(at, int) or not 0 <= at < len(choices):
        raise ValueError(f"the right choice is {gold!r}, which is none of 0 to {len(choices) - 1}")
    return question, choices, at


def _texts(model: Model, prompts: Sequence[Any], options: Options) -> list[str]:
    """What stands before a continuation: a text as it is, a chat as its template writes it."""
    return [model.chat_template.render(prompt) if options.chat else prompt for prompt in prompts]


def _after(prompt: str, text: str) -> str:
    return text if not prompt or prompt[-1:].isspace() or text[:1].isspace() else f" {text}"


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
