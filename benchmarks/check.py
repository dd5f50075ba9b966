"""Whether we have fallen behind our peers since a results file was written.

Seconds differ from one machine of a kind to the next, and with its clocks. So what is compared is how many times as
fast as each peer we are, in the same case, then and now. A case passes if that ratio is at least BAND of what it was,
after the largest spread of the four times is taken off.
"""

import pathlib
from typing import Any

BAND = 0.92  # of 95 % of the H200's committed kernel times the quartiles are at most 1.1 % apart
OURS = ("native", "cs336")  # of a kernel, of host time

Row = dict[str, Any]
Cases = dict[tuple, dict[str, Row]]


def comparable(runs: dict[str, Any], names: list[str], path: pathlib.Path) -> None:
    """Raises ValueError unless the file holds results of every op that is named."""
    if absent := [name for name in names if name not in runs]:
        raise ValueError(f"{path} holds no results of {', '.join(absent)}: it has {', '.join(runs) or 'nothing'}")


def regressions(now: list[Row], then: list[Row]) -> list[str]:
    """A sentence for each case and peer where we are slower, beside the peer, than the band allows.

    Raises ValueError if not one case is in both: a check that compares nothing must not pass.
    """
    before, compared, found = _by_case(then), 0, []
    for case, rows in _by_case(now).items():
        ours = next((v for v in OURS if v in rows), None)
        for peer in rows.keys() & before.get(case, {}).keys() - {ours} if ours in before.get(case, {}) else ():
            compared += 1
            pair_now, pair_then = (rows[ours], rows[peer]), (before[case][ours], before[case][peer])
            ratio_now, ratio_then = (p["seconds"] / o["seconds"] for o, p in (pair_now, pair_then))
            noise = max(row["spread"] for row in (*pair_now, *pair_then))
            if ratio_now * (1 + noise) < BAND * ratio_then:
                label = f"{case[0]} {case[1]} {'x'.join(map(str, case[2]))} {case[3]}"
                found.append(f"BEHIND {label}: {ratio_now:.2f}x as fast as {peer}, was {ratio_then:.2f}x")
    if not compared:
        raise ValueError("no case and peer of this run is in the file that it was to be checked against")
    return sorted(found)


def _by_case(rows: list[Row]) -> Cases:
    """(op, pass, shape, dtype) -> contender -> its row, of those that have a time."""
    cases: Cases = {}
    for row in rows:
        if "seconds" in row:
            cases.setdefault((row["op"], row["pass"], tuple(row["shape"]), row["dtype"]), {})[row["variant"]] = row
    return cases
