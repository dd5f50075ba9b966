"""Seconds as people read them."""


def duration(seconds: float) -> str:
    """4.3 s, 43 s, 2 min 05 s, 3 h 07 min."""
    seconds = max(0.0, seconds)
    if seconds < 10:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
