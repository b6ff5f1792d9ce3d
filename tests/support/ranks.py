"""Processes of one group, which run functions of a test file together.

    ranks = Ranks(2)
    ranks(work, 3)  # what work(3) returns in each process, by rank
    ranks.close()

They stay for the next call, since a process takes seconds to import torch. Each has one thread.
"""

import importlib.util
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any


class Failed(Exception):
    """A function has raised in one of the processes."""


class Ranks:
    """`world` processes with a group of torch.distributed over gloo.

    After a failure all of them are ended, since the others may wait for the one that failed.
    """

    def __init__(self, world: int, limit: float = 120.0) -> None:
        self.world, self.limit = world, limit
        self._processes: list[Any] = []

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """The results of a function at the top level of a file, by rank.

        Raises:
            Failed: the function raised, or did not return within the limit of seconds.
        """
        if not self._processes:
            self._start()
        call = (function.__code__.co_filename, function.__qualname__, args)
        for pipe in self._pipes:
            pipe.send(call)
        end = time.monotonic() + self.limit
        found = []
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(max(0.0, end - time.monotonic())):
                    raise Failed(f"rank {rank}: no result after {self.limit:.0f} s")
                result, error = pipe.recv()
            except (EOFError, ConnectionError):
                result, error = None, "the process has ended"
            except Failed:
                self.close()
                raise
            if error is not None:
                self.close()
                raise Failed(f"rank {rank}: {error}")
            found.append(result)
        return found

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self._pipes = []
        threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        try:
            for rank in range(self.world):
                ours, theirs = context.Pipe()
                args = (rank, self.world, store, theirs)
                process = context.Process(target=_serve, args=args, daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)
        finally:
            if threads is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = threads


def _serve(rank: int, world: int, store: str, pipe: Any) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world,
        timeout=timedelta(seconds=100),
    )  # fmt: skip
    modules: dict[str, Any] = {}
    while True:
        try:
            path, name, args = pipe.recv()
        except EOFError:
            return
        try:
            if path not in modules:
                spec = importlib.util.spec_from_file_location(Path(path).stem, path)
                assert spec is not None and spec.loader is not None
                modules[path] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(modules[path])
            pipe.send((getattr(modules[path], name)(*args), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
