"""How often the verifiers of mathematics agree with labels, on pairs of answers made from problem sets.

    python benchmarks/end_to_end/verifier_agreement.py gsm8k-train.jsonl minerva_math__test.jsonl --limit 300

Each answer of a file is paired with what is equal to it, written otherwise (label 1), and with what is not (label 0):
another problem's answer, a number changed in one digit, a term added. Prints agreement and Cohen's kappa of each.
"""

import argparse
import json
import random
from collections.abc import Iterator
from fractions import Fraction

from cs336.utils.documents import open_bytes
from cs336.verifiers import extract_answer, parse_number, verify_math, verify_math_symbolic
from cs336.verifiers.judge import agreement


def answers(path: str, limit: int) -> list[str]:
    found = []
    with open_bytes(path) as lines:
        for line in lines:
            row = json.loads(line)
            text = str(row["solution"] if "solution" in row else row["answer"])
            if (answer := extract_answer(text)) is not None:
                found.append(answer)
    return random.Random(0).sample(found, min(limit, len(found)))


def pairs(listed: list[str]) -> Iterator[tuple[str, str, int]]:
    """(response, expected, label)"""
    draw = random.Random(1)
    for answer in listed:
        number = parse_number(answer)
        other = draw.choice([a for a in listed if a != answer and (number is None or parse_number(a) != number)])
        yield f"So it is \\boxed{{{answer}}}.", answer, 1
        yield f"So it is \\boxed{{{other}}}.", answer, 0
        if number is None:
            yield f"\\boxed{{0 + {answer}}}", answer, 1
            yield f"\\boxed{{1 + {answer}}}", answer, 0
            continue
        yield f"The answer is \\boxed{{{written(number)}}}.", answer, 1
        yield f"The answer is \\boxed{{{written(number + Fraction(1, 10) * max(1, abs(number)))}}}.", answer, 0
        if number.denominator == 1:
            yield f"#### {number.numerator:,}.00", answer, 1
            yield f"#### {number.numerator}{draw.randrange(1, 10)}", answer, 0


def written(number: Fraction) -> str:
    return f"\\frac{{{number.numerator}}}{{{number.denominator}}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+")
    parser.add_argument("--limit", type=int, default=500, help="answers of each file")
    options = parser.parse_args()
    for path in options.files:
        listed = list(pairs(answers(path, options.limit)))
        labels = [label for *_, label in listed]
        for verify in (verify_math, verify_math_symbolic):
            said = [int(verify(response, expected).score) for response, expected, _ in listed]
            found = agreement(said, labels)
            wrong = [
                sum(s != label for s, label in zip(said, labels, strict=True) if label == which) for which in (0, 1)
            ]
            print(
                f"{path}: {verify.__name__}: agreement {found.raw:.4f}, kappa {found.kappa:.4f}, {found.count} pairs, "
                f"{wrong[0]} wrongly right, {wrong[1]} wrongly wrong",
                flush=True,
            )


if __name__ == "__main__":
    main()
