"""Steps on a CPU, laid out as those that are captured on a GPU."""

from cs336.inference import Engine, EngineConfig, SamplingParams, runner
from cs336.inference.engine import Request
from cs336.inference.shapes import Shape


class Replayed:
    """Stands in for the graph of a step: it runs the step anew, and what is drawn lies where it lay."""

    def __init__(self, run):
        self.run, self.drawn = run, run()

    def anew(self):
        """As on a GPU, what is drawn next does not lie where results on their way home do."""
        self.drawn = type(self.drawn)(*(x.clone() for x in self.drawn))
        return self, self.drawn

    def replay(self):
        for old, new in zip(self.drawn, self.run(), strict=True):
            old.copy_(new)


def lay_out(monkeypatch) -> list[Shape]:
    """Engines made from now on lay steps out so. The list gets the shapes that are asked for."""
    found = []

    def captured(self, shape, num_logprobs):
        found.append(shape)
        if (shape, num_logprobs) not in self._graphs:
            self._graphs[shape, num_logprobs] = Replayed(self._laid_out(shape, num_logprobs))
        return self._graphs[shape, num_logprobs].anew()

    monkeypatch.setattr(runner, "_capturable", lambda model: True)
    monkeypatch.setattr(runner.Runner, "_captured", captured)
    return found


def drawn(model, asked: list[tuple[list[int], SamplingParams]], **options) -> list[Request]:
    """What becomes of these prompts in an engine of small pages and few slots; the second is cancelled at step 9."""
    e = Engine(model, None, EngineConfig(**{"page_size": 4, "max_seqs": 5} | options))
    requests = [e.add(prompt, params) for prompt, params in asked]
    while e.busy:
        if e.stats.steps == 9:
            e.cancel(requests[1])
        e.step()
        e.check()
    assert e.cache.in_use == 0
    return requests


def tokens(request: Request) -> list[int]:
    """Of its first sample."""
    return [token.id for token in request.samples[0].tokens]
