"""`cs336 scaling api`: a training API under a budget. The operator's verbs take its directory, users' its address."""

import datetime
import sys
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from cs336.cli.common import Ints, MaybePath, Path

RunId = Annotated[Positional[str], arg(metavar="ID")]
Url = Annotated[str, arg(help="of the server.")]
KeyFile = Annotated[Path, arg(help="holds your key.")]
URL = "http://127.0.0.1:8336"
KEY = Path("cs336.key")


def serve(
    directory: Positional[Path],
    backend: Literal["simulator", "train"] = "simulator",
    base: MaybePath = None,
    host: str = "127.0.0.1",
    port: int = 8336,
    workers: int | None = None,
    gpus: Ints = (),
    target: float | None = None,
    deadline: str | None = None,
    max_waiting: int = 1000,
    speed: float = 4e14,
    time_scale: float = 1e-5,
    noise: float = 0.002,
) -> None:
    """Serve runs to users who have accounts; the page at the address shows them.

    Args:
        directory: of accounts, runs and their checkpoints. What was there goes on.
        backend: simulator (losses of published laws, no GPU) or train.
        base: for train, a configuration of `cs336 train`: its data are everybody's, the rest are defaults.
        host: the address that is listened to; others than this machine's need TLS in front.
        port: 0 is one that is free.
        workers: runs at once; as many as there are GPUs if left out, else 2.
        gpus: that runs are given; all there are if left out.
        target: FLOPs of the run that users predict.
        deadline: of their predictions: 2026-12-01T18:00, UTC if it says no offset.
        max_waiting: runs of one user that wait.
        speed: the simulator's FLOPs a second.
        time_scale: real seconds a second that is simulated.
        noise: of simulated losses, relative.
    """
    try:
        from cs336.scaling.api.app import ServerConfig
        from cs336.scaling.api.serve import serve as listen
    except ModuleNotFoundError as error:
        raise ImportError(f"serving needs what is not installed ({error}): pip install 'cs336[serve]'") from None
    from cs336.scaling.api.jobs import Backend
    from cs336.scaling.api.simulator import Simulator

    chosen: Backend = Simulator(speed=speed, time_scale=time_scale, noise=noise)
    if backend == "train":
        import torch

        from cs336.scaling.api.training import Training

        if base is None:
            raise ValueError("--backend train needs --base: a configuration that says data and model")
        chosen = Training.load(base)
        gpus = gpus or tuple(range(torch.cuda.device_count()))
    elif base is not None:
        raise ValueError("--base is of --backend train")
    listen(
        directory,
        chosen,
        ServerConfig(host, port, workers, gpus, target=target, deadline=deadline, max_waiting=max_waiting),
    )


def add_user(
    directory: Positional[Path],
    name: Annotated[Positional[str], arg(metavar="NAME")],
    budget: str,
    key_file: MaybePath = None,
) -> None:
    """Open an account, and print its key, once: only its hash is kept.

    Args:
        directory: as for `serve`, which may be going on.
        name: up to 64 letters, digits, '.', '_', '-'.
        budget: 1e18flops, or seconds of training: 90m, 12h.
        key_file: write the key here, for its owner alone to read, and not to the terminal.
    """
    import os

    from cs336.scaling.api.store import Store
    from cs336.training.budget import Budget

    found = Budget.parse(budget)
    if found.kind not in ("flops", "seconds"):
        raise ValueError(f"budget must be of flops or of time, got {budget!r}")
    if key_file is not None and key_file.exists():
        raise ValueError(f"{key_file} exists: remove it, or name another")
    key = Store(directory).add_user(name, found.kind, found.amount)  # type: ignore[arg-type]
    if key_file is None:
        print(key)
        return
    with open(os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(key + "\n")
    print(f"{name}'s key is in {key_file}", file=sys.stderr)


def users(directory: Positional[Path]) -> None:
    """What every user was granted, has reserved, was charged and has left; checks the ledger on the way.

    Args:
        directory: as for `serve`, which may be going on.
    """
    from cs336.scaling.api.store import Store

    for account in _existing(Store, directory).accounts():
        _tell_account(account)


def reveal(directory: Positional[Path], loss: float, parameters: float | None = None) -> None:
    """Say what the target's run reached, once: predictions are closed, and the leaderboard scores them.

    Args:
        directory: as for `serve`, which may be going on.
        loss: that the true run reached, in nats a token. Of the simulator's: `cs336 scaling predict epoch --flops C`.
        parameters: of the true optimum, if it is known.
    """
    from cs336.scaling.api import contest
    from cs336.scaling.api.store import Store

    made = contest.reveal(_existing(Store, directory), loss, parameters)
    best = "" if parameters is None else f", of {parameters:.4g} parameters"
    are = "1 is" if made == 1 else f"{made} are"
    print(f"the true loss is {loss:g}{best}; predictions are closed, and {are} on the leaderboard")


# ---- users' ----


def submit(
    parameters: float | None = None,
    tokens: float | None = None,
    learning_rate: float | None = None,
    batch_tokens: float | None = None,
    seed: int | None = None,
    config: MaybePath = None,
    wait: bool = False,
    url: Url = URL,
    key_file: KeyFile = KEY,
) -> None:
    """Enter a run: --parameters and --tokens, or --config. What it takes is reserved of your budget.

    Args:
        parameters: of the model.
        tokens: to read.
        learning_rate: highest, of 1e-9 to 1; the Step Law's if left out.
        batch_tokens: tokens a step, no more than all; the Step Law's if left out.
        seed: another draw of the same run.
        config: of `cs336 train`, without data and run_dir.
        wait: until it has ended.
    """
    client = _client(url, key_file)
    run = client.submit(
        parameters, tokens, learning_rate=learning_rate, batch_tokens=batch_tokens, seed=seed, config=config
    )
    if wait:
        (run,) = client.wait([run.id])
    _tell([run])


def runs(url: Url = URL, key_file: KeyFile = KEY) -> None:
    """Your runs, the newest first."""
    _tell(_client(url, key_file).runs())


def status(id: RunId, url: Url = URL, key_file: KeyFile = KEY) -> None:
    """One of your runs, with its losses so far.

    Args:
        id: as `submit` printed it.
    """
    run = _client(url, key_file).run(id)
    _tell([run])
    for tokens, loss in run.curve:
        print(f"{tokens:12.4g} tokens  loss {loss:.4f}")


def cancel(id: RunId, url: Url = URL, key_file: KeyFile = KEY) -> None:
    """End one of your runs; what it did not take is yours again.

    Args:
        id: as `submit` printed it.
    """
    client = _client(url, key_file)
    client.cancel(id)
    _tell(client.wait([id]))


def account(url: Url = URL, key_file: KeyFile = KEY) -> None:
    """What is left of your budget."""
    _tell_account(_client(url, key_file).account())


def predict(
    loss: float, parameters: float, tokens: float, final: bool = False, url: Url = URL, key_file: KeyFile = KEY
) -> None:
    """Submit what the target's best run will be, in place of what you said before.

    Args:
        loss: in nats a token.
        parameters: of its model.
        tokens: that it reads.
        final: it is not replaced any more.
    """
    made = _client(url, key_file).predict(loss, parameters, tokens, final=final)
    print(f"loss {made.loss:g} at {made.parameters:.4g} parameters{', final' if made.final else ''}")


def leaderboard(url: Url = URL, key_file: KeyFile = KEY) -> None:
    """Everybody's predictions, scored once the true run is revealed."""
    board = _client(url, key_file).leaderboard()
    if board.true_loss is None:
        print("the true run is not revealed yet")
    else:
        print(f"true loss {board.true_loss:.4f}")
    for row in board.rows:
        error = "" if row.error is None else f"{100 * row.error:8.2f} %  loss {row.loss:.4f}"
        size = "" if row.size_ratio is None else f"  {row.size_ratio:.2f} of the best size"
        print(f"{row.user:20}{error}{size}")


def _client(url: str, key_file: Path):
    from cs336.scaling.api.client import Client

    if not key_file.exists():
        raise ValueError(f"{key_file} is not there: name the file that holds your key with --key-file")
    return Client(url, key_file.read_text(encoding="utf-8", errors="replace"))


def _existing(kind, directory: Path):
    if not (directory / "api.sqlite").exists():
        raise ValueError(f"{directory} is no directory of `cs336 scaling api serve`: it holds no api.sqlite")
    return kind(directory)


def _tell_account(account) -> None:
    amounts = (f"{getattr(account, name):.6g} {name}" for name in ("granted", "reserved", "charged", "left"))
    print(f"{account.user}: {', '.join(amounts)} ({account.unit})")


def _tell(found) -> None:
    for run in found:
        loss = "" if run.loss is None else f"loss {run.loss:.4f}"
        size = f"{run.parameters:10.4g} parameters {run.tokens or 0:10.4g} tokens"
        when = datetime.datetime.fromtimestamp(run.submitted).strftime("%d %b %H:%M:%S")
        print(f"{run.id}  {when}  {run.state:9} {run.done:4.0%} {size}  {loss}{run.error or ''}".rstrip())
