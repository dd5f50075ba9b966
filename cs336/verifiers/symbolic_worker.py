"""The other side of symbolic.py: a pair of answers a line, true or false a line. It ends when its input does."""

import json
import resource
import sys

MOST_MEMORY = 4 << 30  # bytes of addresses


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    from math_verify import parse, verify

    out, sys.stdout = sys.stdout, sys.stderr
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        answer, expected = (parse(f"${text}$", parsing_timeout=None) for text in json.loads(line))
        equal = bool(answer and expected) and verify(expected, answer, timeout_seconds=None)
        print(json.dumps(bool(equal)), file=out, flush=True)


if __name__ == "__main__":
    main()
