"""Calls between two programs that share nothing but a line of text each way: tests, and a program that they judge.

The tests run where the program is not, so that it can neither read what they expect, nor change what == or assert
means, nor leave before they have passed. What crosses is plain data, by value: None, bool, int, float, complex, str,
bytes, list, tuple, dict, set, frozenset. Another object stays with the program, and the tests hold a `Remote`, which
can be called, iterated over, asked for an attribute and given one, but is equal to nothing and neither true nor false.

This file is the beginning of both programs; it knows nothing of this package.
"""

import builtins
import io
import itertools
import json
import symtable
import sys
from typing import Any

LONGEST = 1 << 24  # characters of a message
DEEPEST = 100
# In a test the first would be the test's own, and the others would end a loop over what is tested as if all had passed.
NOT_TO_BE_RAISED = (AssertionError, StopIteration, StopAsyncIteration)


def encode(value: Any, keep=None, depth=0):
    """A value as JSON. keep: takes what is no plain data and gives a number for it; without it that is a TypeError."""
    if depth > DEEPEST:
        raise ValueError(f"a value is nested more than {DEEPEST} deep")
    if value is None or type(value) is bool:
        return value
    if isinstance(value, int):
        return {"int": hex(value)}
    if isinstance(value, float):
        return {"float": float.hex(float(value))}
    if isinstance(value, complex):
        return {"complex": [float.hex(value.real), float.hex(value.imag)]}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bytes | bytearray):
        return {type(value).__name__: value.hex()}
    kinds: tuple[Any, ...] = (list, tuple, set, frozenset)
    for kind in kinds:
        if isinstance(value, kind):
            return {kind.__name__: [encode(item, keep, depth + 1) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(item, keep, depth + 1) for item in pair] for pair in value.items()]}
    if isinstance(value, type) and vars(builtins).get(name := getattr(value, "__name__", "")) is value:
        return {"type": name}
    if keep is None:
        raise TypeError(f"a test hands the program a value of type {type(value).__name__}, which cannot be sent")
    return {"remote": keep(value)}


def decode(data, remote=None):
    """The value of what `encode` made; ValueError for anything else. remote: makes the object of a number."""
    if data is None or type(data) in (bool, str):
        return data
    if type(data) is dict and len(data) == 1:
        ((kind, inner),) = data.items()
        if kind == "int" and type(inner) is str:
            return int(inner, 16)
        if kind == "float" and type(inner) is str:
            return float.fromhex(inner)
        if kind == "complex" and type(inner) is list and len(inner) == 2:
            return complex(*map(float.fromhex, inner))
        if kind in ("bytes", "bytearray") and type(inner) is str:
            return (bytes if kind == "bytes" else bytearray).fromhex(inner)
        if kind in ("list", "tuple", "set", "frozenset") and type(inner) is list:
            return getattr(builtins, kind)([decode(item, remote) for item in inner])
        if kind == "dict" and type(inner) is list:
            return {decode(key, remote): decode(value, remote) for key, value in inner}
        if kind == "type" and isinstance(found := getattr(builtins, str(inner), None), type):
            return found
        if kind == "remote" and type(inner) is int and remote is not None:
            return remote(inner)
    raise ValueError(f"{data!r:.60} is no value")


class Line:
    """Messages over standard input and output. Whatever else is printed goes to standard error."""

    def __init__(self):
        self._in, self._out = sys.stdin.buffer, sys.stdout.buffer
        sys.stdin, sys.stdout = io.StringIO(), sys.stderr

    def send(self, message):
        self._out.write(json.dumps(message).encode() + b"\n")
        self._out.flush()

    def receive(self):
        """None at the end."""
        text = self._in.readline(LONGEST)
        if text and not text.endswith(b"\n"):
            raise ValueError("a message is cut")
        return json.loads(text) if text else None


def raised(error):
    """What the program raised, named by the nearest of its classes that is Python's own: `except` goes by those."""
    known = (kind.__name__ for kind in type(error).__mro__ if vars(builtins).get(kind.__name__) is kind)
    try:
        arguments = encode(error.args)
    except (TypeError, ValueError):  # of no plain data, or nested too deep
        arguments = encode((f"{error}",))
    return {"raised": next(known), "text": f"{error}", "arguments": arguments}


def serve(source):
    """In the judged program: run its source, then do what is asked."""
    line, kept = Line(), []

    def keep(value):
        kept.append(value)
        return len(kept) - 1

    namespace = {"__name__": "program"}
    try:
        exec(compile(source, "program", "exec"), namespace)
    except Exception as error:
        line.send(raised(error))
        return
    line.send({"value": encode([name for name in namespace if isinstance(name, str)])})
    while (asked := line.receive()) is not None:
        try:
            what, target, name, values = asked
            arguments, keywords = decode(values, kept.__getitem__)
            if target is None and name not in namespace:
                raise NameError(f"{name} is not defined")
            value: Any = namespace[name] if target is None else kept[target]
            if what == "set":
                setattr(value, name, arguments[0])
            elif target is not None and name is not None:
                value = getattr(value, name)
            if what == "iterate":
                value = list(itertools.islice(value, 1 << 20))
            elif what == "call":
                value = value(*arguments, **keywords)
            # arguments, too: a function may change them in place
            reply = {"value": encode(value, keep), "arguments": encode(arguments, keep)}
        except Exception as error:
            reply = raised(error)
        line.send(reply)


class Remote:
    """An object of the program by its number, or one of its globals by its name."""

    def __init__(self, asking, target, name=None):
        self.__dict__.update(_asking=asking, _target=target, _name=name)

    def __call__(self, *arguments, **keywords):
        return self._asking("call", self._target, self._name, arguments, keywords)

    def _object(self):
        """Itself, or what a global is."""
        return self if self._name is None else self._asking("get", None, self._name, (), {})

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if self._name is not None:
            return getattr(self._object(), name)
        return self._asking("get", self._target, name, (), {})

    def __setattr__(self, name, value):
        if self._name is not None:
            setattr(self._object(), name, value)
        else:
            self._asking("set", self._target, name, (value,), {})

    def __iter__(self):
        return iter(self._asking("iterate", self._target, self._name, (), {}))

    def _refuse(self, *_):
        raise TypeError("the program gave an object that is no plain data where a test compares")

    __bool__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __len__ = __contains__ = _refuse
    __hash__ = object.__hash__


def free_names(tests):
    """Names that tests use as globals and neither define nor have from Python."""
    used: set[str] = set()
    defined: set[str] = set()
    top = symtable.symtable(tests, "tests", "exec")
    tables = [top]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            if table is top or symbol.is_global():
                used |= {symbol.get_name()} if symbol.is_referenced() else set()
                defined |= {symbol.get_name()} if symbol.is_assigned() or symbol.is_imported() else set()
    return used - defined - set(dir(builtins))


def judge(tests, names=()):
    """Run tests whose free names, and `names`, are the program's. Exits with 0 if they pass, else tells why on standard
    error, in its last line, and exits with 1.
    """
    line = Line()

    def answer():
        reply = line.receive()
        if reply is None:
            raise ConnectionError("the program ended")
        if "raised" in reply:
            kind: Any = getattr(builtins, str(reply["raised"]), None)
            said = f"{reply['raised']} in the program: {reply.get('text')!s:.200}"
            if not (isinstance(kind, type) and issubclass(kind, Exception)) or issubclass(kind, NOT_TO_BE_RAISED):
                raise RuntimeError(said)
            try:
                error = kind(*decode(reply["arguments"]))
            except (LookupError, TypeError, ValueError):  # it takes other arguments
                error = RuntimeError(said)
            error.add_note(said)
            raise error
        return reply

    def asking(what, target, name, arguments, keywords):
        def remote(number):
            return Remote(asking, number)

        def target_of(value):
            found = value._object() if isinstance(value, Remote) else None
            if isinstance(found, Remote):
                return found._target
            raise TypeError(f"a test hands the program a {type(value).__name__}, which cannot be sent")

        line.send([what, target, name, encode((arguments, keywords), target_of)])
        reply = answer()
        for given, changed in zip(arguments, decode(reply.get("arguments", {"list": []}), remote), strict=False):
            if type(given) in (list, bytearray) and type(changed) is type(given):
                given[:] = changed
            elif type(given) in (dict, set) and type(changed) is type(given):
                given.clear()
                given.update(changed)
        return decode(reply["value"], remote)

    try:
        decode(answer()["value"])
        namespace = {"__name__": "tests"}
        namespace |= {name: Remote(asking, None, name) for name in {*free_names(tests), *names}}
        exec(compile(tests, "tests", "exec"), namespace)
    except BaseException as error:
        where, trace = None, error.__traceback__
        while trace is not None:
            where = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "tests" else where
            trace = trace.tb_next
        failed = f": {tests.splitlines()[where - 1].strip():.200}" if where else ""
        text = " ".join((getattr(error, "__notes__", None) or [f"{error}"])[0].split())
        print(f"\n{type(error).__name__}{f' ({text:.300})' if text else ''}{failed}", file=sys.stderr)
        sys.exit(1)
