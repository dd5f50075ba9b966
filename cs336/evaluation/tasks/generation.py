"""Tasks that have a model write, and check what it wrote: mathematics, programs, instructions, refusals, pairs."""

import ast
import builtins
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cs336.evaluation.tasks.task import Answered, Item, Model, Options, Row, pass_at_k
from cs336.verifiers import (
    Verdict,
    check,
    extract_answer,
    extract_code,
    is_refusal,
    loosened,
    verify_code,
    verify_math,
    verify_math_symbolic,
)

PARALLEL = 8  # programs at once, at most: each is several processes


def respond(
    model: Model, prompts: Sequence[Any], options: Options, new_tokens: int, stop: Sequence[str]
) -> list[list[str]]:
    """The answers to each prompt: `options.samples` texts, without the stop string."""
    params = options.sampling(new_tokens, stop)
    outputs = (model.chat if options.chat else model.generate)(prompts, params)
    return [[one.text for one in output.outputs] for output in outputs]


class Solution:
    """Rows: question and answer with #### (GSM8K), or problem and solution or answer (MATH)."""

    separator = "\n\n"

    def __init__(self, name: str, question: str, answer: str, form: str, new_tokens: int, stop: Sequence[str]):
        self.name, self._form, self._new_tokens, self._stop = name, form, new_tokens, stop
        self._question, self._answer = question, answer

    def read(self, row: Row) -> Item:
        answer = str(row[self._answer if self._answer in row else "answer"])
        if ("\\boxed" in answer or "####" in answer) and extract_answer(answer) is None:
            raise ValueError(f"the solution holds no answer: {answer[-80:]!r}")
        return Item(self._form.format(row[self._question]), f" {answer}", row)

    def answer(self, model: Model, items: Sequence[Item], prompts: Sequence[Any], options: Options) -> list[Answered]:
        answers = respond(model, prompts, options, self._new_tokens, self._stop)
        verify = verify_math_symbolic if options.algebra else verify_math
        return [
            _answered(prompt, texts, [verify(text, item.target.strip()) for text in texts])
            for prompt, texts, item in zip(prompts, answers, items, strict=True)
        ]


class Program:
    """Rows of MBPP (text or prompt, code, test_list, test_setup_code or test_imports) or of HumanEval (prompt,
    entry_point, test, canonical_solution). acc is the share of right answers; pass@k for k = 1, 10, 100 up to the
    samples."""

    separator = "\n\n"

    def __init__(self, name: str):
        self.name = name

    def read(self, row: Row) -> Item:
        if self.name == "humaneval":
            _ = row["test"], row["entry_point"]
            return Item(row["prompt"], row.get("canonical_solution", ""), row)
        asked = row["text"] if "text" in row else row["prompt"]
        shown = "\n".join(row["test_list"])
        return Item(f'"""\n{asked}\n{shown}\n"""\n', row.get("code", "").replace("\r\n", "\n"), row)

    def answer(self, model: Model, items: Sequence[Item], prompts: Sequence[Any], options: Options) -> list[Answered]:
        stop = ["\nclass ", "\nprint(", "\n#", "\nif __name__", "\n```", '\n"""', "\nassert "]
        stop += ["\ndef "] if self.name == "humaneval" else []
        answers = respond(model, prompts, options, 512, stop)

        def verify(item: Item, text: str) -> Verdict:
            program, tests, names = self._judged(item, text)
            return verify_code(program, tests, names=names, weak=options.weak_sandbox)

        with ThreadPoolExecutor(min(PARALLEL, os.cpu_count() or 1)) as pool:
            waiting = [
                [pool.submit(verify, item, text) for text in texts] for item, texts in zip(items, answers, strict=True)
            ]
            verdicts = [[one.result() for one in row] for row in waiting]
        answered = []
        for prompt, texts, row in zip(prompts, answers, verdicts, strict=True):
            said = _answered(prompt, texts, row)
            right = sum(verdict.score == 1 for verdict in row)
            said.scores |= {f"pass@{k}": pass_at_k(len(row), right, k) for k in (1, 10, 100) if k <= len(row)}
            answered.append(said)
        return answered

    def _judged(self, item: Item, text: str) -> tuple[str, str, list[str]]:
        """(the program, its tests, names that are the program's though Python has them)"""
        row = item.row
        if self.name == "humaneval":
            code = extract_code(text)
            helpers = _without(row["prompt"], row["entry_point"])  # tests trust none but their own
            whole = f"def {row['entry_point']}(" in code  # but for what the prompt imports and defines
            program = f"{helpers}\n{code}" if whole else item.prompt + code
            return program, f"{helpers}\n{row['test']}\ncheck({row['entry_point']})\n", []
        setup = row.get("test_setup_code") or "\n".join(row.get("test_imports", []))
        names = [name for name in _defined(item.target) if hasattr(builtins, name)]
        return text, "\n".join([setup, *row["test_list"]]), names


class Instructions:
    """Rows of IFEval: prompt, instruction_id_list, kwargs. Shares of prompts of which all instructions are followed and
    of instructions that are, as written and (loose) after what surrounds an answer is cut."""

    name, separator = "ifeval", "\n\n"

    def read(self, row: Row) -> Item:
        if len(row["instruction_id_list"]) != len(row["kwargs"]) or not row["kwargs"]:
            raise ValueError("instruction_id_list and kwargs must have one entry an instruction")
        for kind, given in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            check(kind, "?", **given)
        return Item(row["prompt"], "", row)

    def answer(self, model: Model, items: Sequence[Item], prompts: Sequence[Any], options: Options) -> list[Answered]:
        answered = []
        for prompt, texts, item in zip(prompts, respond(model, prompts, options, 1024, ()), items, strict=True):
            kinds = list(zip(item.row["instruction_id_list"], item.row["kwargs"], strict=True))
            sums = dict.fromkeys(("prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose"), 0.0)
            reasons = []
            for text in texts:
                strict = [check(kind, text, **given) for kind, given in kinds]
                loose = [any(check(kind, cut, **given) for cut in loosened(text)) for kind, given in kinds]
                for how, followed in (("strict", strict), ("loose", loose)):
                    sums[f"prompt_{how}"] += all(followed) / len(texts)
                    sums[f"instruction_{how}"] += sum(followed) / len(followed) / len(texts)
                missed = [kind for (kind, _), kept in zip(kinds, strict, strict=True) if not kept]
                reasons.append(f"not followed: {', '.join(missed)}" if missed else "all are followed")
            answered.append(Answered(prompt, texts, sums, reasons))
        return answered


class Refusals:
    """Rows: prompt and harmful (true or false). refusal: of harmful requests, the share that is declined; over_refusal:
    of the others. Low is good for the second only."""

    name, separator = "refusal", "\n\n"

    def read(self, row: Row) -> Item:
        if not isinstance(row["harmful"], bool):
            raise ValueError(f"harmful must be true or false, got {row['harmful']!r}")
        return Item(row["prompt"], "", row)

    def answer(self, model: Model, items: Sequence[Item], prompts: Sequence[Any], options: Options) -> list[Answered]:
        answered = []
        for prompt, texts, item in zip(prompts, respond(model, prompts, options, 128, ()), items, strict=True):
            share = sum(map(is_refusal, texts)) / len(texts)
            answered.append(Answered(prompt, texts, {"refusal" if item.row["harmful"] else "over_refusal": share}))
        return answered


class Pairs:
    """Rows: instruction or prompt, and output, the answer to compare with. win_rate: how often a judge prefers the
    model's, ties a half; length_ratio: how long they are beside the others'."""

    name, separator = "pairs", "\n\n"

    def read(self, row: Row) -> Item:
        return Item(row["instruction"] if "instruction" in row else row["prompt"], row["output"], row)

    def answer(self, model: Model, items: Sequence[Item], prompts: Sequence[Any], options: Options) -> list[Answered]:
        if options.judge is None:
            raise ValueError("a win rate takes a judge: name one with --judge")
        answered = []
        for prompt, texts, item in zip(prompts, respond(model, prompts, options, 1024, ()), items, strict=True):
            wins = [options.judge(item.prompt, text, item.target) for text in texts]
            length = sum(map(len, texts)) / len(texts) / max(1, len(item.target))
            answered.append(Answered(prompt, texts, {"win_rate": sum(wins) / len(wins), "length_ratio": length}))
        return answered


def _answered(prompt: Any, texts: list[str], verdicts: Sequence[Verdict]) -> Answered:
    share = sum(verdict.score for verdict in verdicts) / len(verdicts)
    return Answered(prompt, texts, {"acc": share}, [verdict.reason for verdict in verdicts])


def _defined(code: str) -> list[str]:
    try:
        return [node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
    except (SyntaxError, ValueError):
        return []


def _without(code: str, name: str) -> str:
    """Code without the definition of a function, which may have no body."""
    module = ast.parse(f"{code}\n    pass\n")
    module.body = [n for n in module.body if not (isinstance(n, ast.FunctionDef) and n.name == name)]
    return ast.unparse(module)


GSM8K = Solution("gsm8k", "question", "answer", "Question: {}\nAnswer:", 512, ("\n\n", "Question:"))
MATH = Solution("math", "problem", "solution", "Problem:\n{}\n\nSolution:", 1024, ("\nProblem:",))
