"""Several processes of one command on this machine, by torchrun's own agent."""

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

import typer

from tfkern_program import end_with, say

_PATIENCE = 3600  # seconds that processes have to save after Ctrl-C; one more Ctrl-C ends them
_LONG = 1.0  # seconds in which the agent notices a process that has ended


def launch(count: int, arguments: Sequence[str]) -> int:
    """Runs `tfkern` with these arguments in `count` processes, and waits for them.

    The first one writes to the terminal. If one fails, the agent ends the others, and its error is
    told in one line. A signal is passed on to all of them.

    Returns:
        The exit status: 0; that of the process that failed first; or 128 and the number of the
        signal that this process got.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # the agent tells at length what is told here in one line
    signal.set_wakeup_fd(-1)  # would end this program some seconds after a signal
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ["TFKERN_LAUNCHED"] = str(os.getpid())
    others = dict.fromkeys(range(1, count), Std.ALL)
    with tempfile.TemporaryDirectory(prefix="tfkern-launch-") as folder:
        config = LaunchConfig(
            1, 1, count, run_id=f"tfkern-{os.getpid()}", rdzv_backend="c10d",
            rdzv_endpoint="localhost:0", local_addr="localhost", max_restarts=0,
            logs_specs=DefaultLogsSpecs(folder, redirects=others), shutdown_timeout=_PATIENCE,
        )  # fmt: skip
        command = [sys.executable, "-m", "tfkern_program", *arguments]
        try:
            elastic_launch(config, command[0])(*command[1:])
        except SignalException as error:
            return 128 + error.sigval
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode == 2:  # a wrong call, which all processes have found
                return say(failure.message, 2)
            return say(f"rank {rank}: {failure.message}", max(failure.exitcode, 1))
    return 0


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Tells the agent of torchrun, if it has started this process, of an error in the block.

    Under `launch` nothing is printed here: the agent's process tells what has failed first.
    """
    launcher = os.environ.get("TFKERN_LAUNCHED")
    if launcher is not None:
        end_with(int(launcher))
    try:
        yield
    except Exception as error:
        path = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if path is None or isinstance(error, typer.Exit):
            raise
        status = _record(error, path)
        if launcher is None:
            raise
        raise typer.Exit(status) from None


def _record(error: Exception, path: str) -> int:
    """Writes an error for the agent, and returns the exit status that it stands for."""
    wrong = isinstance(error, ValueError | NotImplementedError)
    message = str(error) if wrong else f"{type(error).__name__}: {error}"
    with open(path, "w") as file:
        json.dump({"message": message, "timestamp": int(time.time())}, file)
    if isinstance(error, RuntimeError):
        # The connection to another process may be gone: the agent should find that one first.
        time.sleep(_LONG)
    return 2 if wrong else 1
