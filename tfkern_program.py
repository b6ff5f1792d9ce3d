"""The process of the program `tfkern`: it ends with a status, and leaves no other process behind.

This module is outside of the package, whose import takes seconds, so that signals are handled from
the start.
"""

import importlib
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from types import FrameType
from typing import Any

GRACE = 3.0  # seconds for the main thread to clean up: in a kernel it notices no signal
_SIGNALS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "the terminal is gone"}
_LONGEST = 600  # most characters in a line
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


class Stopped(BaseException):
    """Raised when a signal has told the program to end."""


def main() -> int:
    """Runs the program and returns its exit status.

    The status is 0 for success, 1 for a failed check or another failure, 2 for a wrong call, 130
    after an interrupt and 143 after a termination. TFKERN_TRACEBACK=1 shows where an error comes
    from.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller has closed it
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    stop = _Stop()
    status = 0
    try:
        try:
            from tfkern import cli

            stop.at_once = False
            status = cli.main()
        except SystemExit as left:  # the reader of a pipe is gone
            status = left.code if isinstance(left.code, int) else 1
        except Exception as error:
            status = failed(error)
        stop.at_once = True  # nothing is left to clean up, nor anybody who would catch Stopped
    except Stopped:
        _flush()
        stop.leave()
    return _flush() or status


class _Stop:
    """Handles signals: the first raises Stopped, and after GRACE seconds the process ends anyway.

    While `at_once` is set, the process ends without cleaning up: during imports and at the end
    nothing needs it.
    """

    def __init__(self) -> None:
        self.at_once, self.number, self._leaving = True, 0, threading.Lock()
        for name in _SIGNALS:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        if os.name == "posix":
            self._reader, writer = os.pipe()
            os.set_blocking(writer, False)
            signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, daemon=True).start()

    def leave(self) -> None:
        """Ends the process with the status of the signal, after a line that names it."""
        self._leaving.acquire()  # never released, so that one thread writes one line
        number = signal.Signals(self.number)
        if sys.stderr.isatty():
            os.write(2, b"\r\x1b[K\x1b[?25h")  # a progress bar may have hidden the cursor
        if "TFKERN_LAUNCHED" not in os.environ:  # else the process that has started this one tells
            os.write(2, f"tfkern: {_SIGNALS[number.name]}\n".encode())
        os._exit(128 + number)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        first, self.number = not self.number, self.number or number
        if first:
            sys.unraisablehook = lambda _: None  # callbacks that cannot raise would print Stopped
            if self.at_once:
                self.leave()
            raise Stopped

    def _watch(self) -> None:
        """Ends the process from another thread: the main one may be in code that sees no signal."""
        number = os.read(self._reader, 1)[0]
        time.sleep(GRACE)
        self.number = self.number or number
        self.leave()


def say(message: str, status: int) -> int:
    """Prints a message as one line on stderr, without control characters. Returns `status`."""
    line = "".join(c for c in " ".join(message.split()) if c.isprintable())
    line = line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
    print(f"tfkern: {line}", file=sys.stderr)
    return status


def failed(error: Exception) -> int:
    """Reports an error that is not a wrong call of the program. Returns the exit status."""
    if os.environ.get("TFKERN_TRACEBACK"):
        traceback.print_exception(error)
    told = str(error)
    if isinstance(error, OSError) and error.strerror:
        name = error.filename if error.filename is not None else "output"
        return say(f"{name}: {error.strerror}", 1)
    if isinstance(error, MemoryError) or "not enough memory" in told or "out of memory" in told:
        return say(f"out of memory: {told or 'no more is to be had'}", 1)
    return say(f"{type(error).__name__}: {told}", 1)


def _flush() -> int:
    """Flushes stdout. Returns 0, or 1 if it cannot be written."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes again at exit
        return 1 if isinstance(error, BrokenPipeError) else failed(error)
    return 0


def attached(parent: int, module: str, function: str, *arguments: Any) -> Any:
    """Calls a function of a module in a process that is to end when its parent does.

    The module is imported only after this is set up.
    """
    end_with(parent)
    return getattr(importlib.import_module(module), function)(*arguments)


def end_with(parent: int) -> None:
    """Makes this process end when its parent does.

    Only Linux ends a process with its parent; elsewhere it has to end by itself.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if hasattr(os, "getppid") and os.getppid() != parent:  # the parent has ended meanwhile
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
