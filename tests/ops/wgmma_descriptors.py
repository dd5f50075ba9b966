"""Where the wgmma instructions of a Hopper kernel take their tiles from: reads what nvdisasm prints."""

import re

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?(U?P\w+)\s+)?([\w.]+)\s*(.*?)\s*;")
LABEL = re.compile(r"^(\.L_\w+):")
JUMP = re.compile(r"`\((.+?)\)")
REGISTER = re.compile(r"\bU?R\d+\b")
PREDICATE = re.compile(r"!?U?P(\d|T)")
WGMMA = re.compile(r"R\d+, (R\d+, )?gdesc\[UR(\d+)\]")
WORDS = {"WIDE": 2, "64": 2, "128": 4}  # registers written, by a part of the opcode


def written(opcode: str, operands: list[str]) -> list[str]:
    rest = [o for i, o in enumerate(operands) if not all(PREDICATE.fullmatch(p) for p in operands[: i + 1])]
    to = re.fullmatch(r"(U?R)(\d+)(\.\w+)*", rest[0]) if rest else None
    if to is None or "SETP" in opcode or opcode.split(".")[0] in ("BAR", "R2P"):
        return []
    words = max(WORDS.get(part, 1) for part in opcode.split("."))
    return [f"{to[1]}{int(to[2]) + i}" for i in range(words)]


def execute(code: list[tuple], regs: dict[str, bool], found: list[str]) -> dict[str, bool]:
    """regs: whether a register is made of the address of shared memory."""
    for predicate, opcode, text in code:
        if "GMMA" in opcode and (tiles := WGMMA.match(text)):
            first = int(tiles[2])
            lows = [first + 2] if tiles[1] else [first, first + 2]  # words of addresses: of B, or of A and B
            found += [f"{opcode} {text}: UR{low}" for low in lows if not regs.get(f"UR{low}")]
        operands = [o.strip() for o in text.split(",")]
        kind, to = opcode.split(".")[0], written(opcode, operands)
        if kind in ("S2R", "S2UR"):
            shared = "SR_CgaCtaId" in text  # the base is 0x400 of the block in its cluster
        elif kind in ("LDG", "LDS", "LDSM", "LD", "LDC", "ULDC"):
            shared = False
        else:  # what was spilled is believed
            sources = REGISTER.findall(text)[1 if to else 0 :]
            shared = kind == "LDL" or any(regs.get(r) for r in sources)
        regs |= {r: shared and (regs.get(r, True) or not predicate) for r in to}
    return regs


def strays(sass: str) -> list[str]:
    """The descriptors whose address does not derive from shared memory's, on any path to them."""
    found: list[str] = []
    for function in re.split(r"(?m)^\s*\.section\s+\.text\.", sass)[1:]:
        code, labels = [], {}
        for line in function.splitlines():
            if label := LABEL.match(line):
                labels[label[1]] = len(code)
            elif instruction := INSTRUCTION.search(line):
                code.append(instruction.groups())
        targets = {i: JUMP.search(text) for i, (_, opcode, text) in enumerate(code) if opcode == "BRA"}
        jumps = {i: labels[to[1]] for i, to in targets.items() if to}
        starts = sorted({0, *labels.values(), *(i + 1 for i in jumps)} - {len(code)})
        ends = dict(zip(starts, [*starts[1:], len(code)], strict=True))
        into: dict[int, dict[str, bool]] = {0: {}}
        todo = [0]
        while todo:
            start = todo.pop()
            last = ends[start] - 1
            regs = execute(code[start : last + 1], dict(into[start]), [])
            predicate, opcode, text = code[last]
            always = opcode in ("EXIT", "BRA") and not predicate and not PREDICATE.match(text)
            for after in {jumps.get(last), None if always else last + 1} & ends.keys():
                old = into.get(after)
                new = regs if old is None else {r: old.get(r, True) and regs.get(r, True) for r in old | regs}
                if new != old:
                    into[after] = new
                    todo.append(after)
        for start, regs in into.items():
            execute(code[start : ends[start]], dict(regs), found)
    return found
