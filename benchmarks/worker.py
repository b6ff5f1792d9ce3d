"""A process for functions that may ruin the process they run in.

After a kernel has touched memory that does not exist, every later call in its CUDA context fails;
and a kernel that waits for ever cannot be stopped. Either costs the worker's process, not the
caller's.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import Any

import torch

from tfkern_program import attached

from . import timing

# Longest time without a message, in seconds: more than the slowest compiler takes.
PATIENCE = 90.0


class Lost(Exception):
    """A worker's process is lost. `doing` is the last thing that it said it was doing."""

    def __init__(self, doing: str, why: str):
        super().__init__(why)
        self.doing = doing


class Worker:
    """A process that calls functions, and that is replaced when it is lost.

    Each function gets its arguments and one more: a function to call with what it is doing.

    Args:
        patience: longest time without a message, in seconds.
        environment: variables of the process beside those of this one.
        rests: whether the process is stopped between calls, so that threads that spin while they
            wait take no time from others.
    """

    def __init__(
        self,
        device: str,
        patience: float = PATIENCE,
        *,
        environment: Mapping[str, str] = MappingProxyType({}),
        rests: bool = False,
    ):
        self.device, self.patience = device, patience
        self._environment = environment
        self._rests = rests and hasattr(signal, "SIGSTOP")
        self._process: multiprocessing.process.BaseProcess | None = None

    def ask(self, function: Callable, *arguments: Any) -> Any:
        """Returns what the function returns in the process. Raises Lost if the process is lost."""
        if self._process is None or not self._process.is_alive():
            self._start()
        else:
            self._continue()
        doing = ""
        try:
            self._connection.send((function, arguments))
            while True:
                if not self._connection.poll(self.patience):
                    raise Lost(doing, f"no sign of life for {self.patience:.0f} s")
                kind, told = self._connection.recv()
                if kind == "answer":
                    if self._rests:
                        os.kill(self._process.pid, signal.SIGSTOP)
                    return told
                if kind == "lost":
                    raise Lost(doing, told)
                doing = told
        except (EOFError, OSError):
            self._process.join(self.patience)
            code = self._process.exitcode
            self.stop()
            raise Lost(doing, f"the process ended with status {code}") from None
        except BaseException:
            self.stop()
            raise

    def finish(self) -> None:
        """Lets the process, which waits for a call, end by itself."""
        if self._process is not None:
            self._connection.close()
            self._continue()
            self._process.join(self.patience)
        self.stop()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join(self.patience)
            self._process = None

    def _continue(self) -> None:
        if self._rests and self._process.is_alive():
            os.kill(self._process.pid, signal.SIGCONT)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._connection, theirs = context.Pipe()
        call = (os.getpid(), __name__, "_serve", theirs, self.device)
        self._process = context.Process(target=attached, args=call)
        with _interrupts_held(), _variables(self._environment):
            self._process.start()
        theirs.close()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Holds interrupts from the terminal back until the block ends. A process started in the block
    never gets any: its parent must end it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Processes that are started in the block have these variables in their environment."""
    former = {name: os.environ.get(name) for name in values}
    os.environ |= values
    try:
        yield
    finally:
        for name, value in former.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _serve(connection: Connection, device: str) -> None:
    """The loop of the worker's process: calls what it receives, and sends the results."""
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device).index or 0)  # set_device needs an index
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:  # the parent is gone
            return
        try:
            answer = function(*arguments, lambda doing: connection.send(("doing", doing)))
        except Exception as error:
            connection.send(("lost", timing.reason(error)))
            return
        connection.send(("answer", answer))
