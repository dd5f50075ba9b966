"""How many of something, for people."""


def counted(number: int, noun: str) -> str:
    """1 step, 1,234 steps: of a noun whose plural has an s."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
