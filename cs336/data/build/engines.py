"""Engines: the same units of work by processes of this machine, or by Ray on machines that share the files."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

from cs336.data.build.supervisor import Supervisor, WorkerFailed
from cs336.data.build.unit import Work
from cs336.data.build.worker import described, recipe_of, request_of, work_of
from cs336.data.recipe import Recipe

Finished = Callable[[Work], None]


def run_local(recipe: Recipe, works: Sequence[Work], lock: str, workers: int | None, finished: Finished) -> None:
    """One worker process a core, or `workers`. Raises WorkerFailed for what is no document's fault."""
    count = max(1, min(workers or len(os.sched_getaffinity(0)), len(works)))
    supervisors = [Supervisor(recipe, lock) for _ in range(count)]
    todo = _Shared(works)
    errors: list[BaseException] = []

    def serve(supervisor: Supervisor) -> None:
        try:
            for work in todo:
                supervisor.run(work)
                finished(work)
        except BaseException as error:  # raised below, in the thread that called
            errors.append(error)
            for other in supervisors:
                other.stop()

    threads = [threading.Thread(target=serve, args=(supervisor,), daemon=True) for supervisor in supervisors]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # so that Ctrl-C is seen
                thread.join(0.2)
    finally:
        for supervisor in supervisors:
            supervisor.stop()
        for thread in threads:
            thread.join()
        for supervisor in supervisors:
            supervisor.close()
    if errors:
        raise errors[0]


class _Shared:
    """An iterator for several threads."""

    def __init__(self, items: Iterable[Work]):
        self._items, self._lock = iter(items), threading.Lock()

    def __iter__(self) -> Iterator[Work]:
        return self

    def __next__(self) -> Work:
        with self._lock:
            return next(self._items)


def run_ray(recipe: Recipe, works: Sequence[Work], lock: str, address: str | None, finished: Finished) -> None:
    """An actor a core of the cluster at `address`, or of one that is started here. Needs ray."""
    try:
        import ray
        from ray.util import ActorPool
    except ImportError:
        raise ImportError("the engine ray needs Ray: pip install ray, or use the engine local") from None
    started = not ray.is_initialized()
    if started:
        ray.init(address=address, log_to_driver=False, include_dashboard=False if address is None else None)
    try:
        actors = max(1, min(int(ray.cluster_resources().get("CPU", 1)), len(works)))
        actor = ray.remote(num_cpus=1)(_Remote)
        pool = ActorPool([actor.remote(described(recipe), lock, os.getcwd()) for _ in range(actors)])
        requests = [request_of(work) for work in works]
        by_number = {work.number: work for work in works}
        try:
            for number in pool.map_unordered(lambda a, request: a.run.remote(request), requests):
                finished(by_number[number])
        except ray.exceptions.RayError as error:
            raise WorkerFailed(str(getattr(error, "cause", error))) from None
    finally:
        if started:
            ray.shutdown()


class _Remote:
    """A supervisor on a machine of the cluster."""

    def __init__(self, recipe: dict, lock: str, directory: str):
        os.chdir(directory)  # paths are relative to where the build was started
        self._supervisor = Supervisor(recipe_of(recipe), lock)

    def run(self, request: dict) -> int:
        self._supervisor.run(work_of(request))
        return request["number"]
