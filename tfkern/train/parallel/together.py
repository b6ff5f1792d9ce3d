"""Work that one process does for all, or all do, and whose errors are raised in all of them.

A process that went on while another has failed would wait for it until the time limit of the group.
"""

import pickle
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from torch import distributed
from torch.distributed import ProcessGroup

T = TypeVar("T")


def first(function: Callable[[], T], many: bool) -> T:
    """What a function returns that only the first process calls; all do if they are not `many`."""
    if not many:
        return function()
    told: list[Any] = [None]
    each(lambda: told.__setitem__(0, function()) if distributed.get_rank() == 0 else None, many)
    distributed.broadcast_object_list(told, 0, everybody())
    return told[0]


def each(function: Callable[[], T], many: bool) -> T:
    """What a function returns in this process. An error of any process is raised in all."""
    if not many:
        return function()
    found, error = None, None
    try:
        found = function()
    except Exception as failure:
        error = _sendable(failure)
    for raised in gathered(error, everybody()):
        if raised is not None:
            raise raised
    return found  # type: ignore[return-value]


def everybody() -> ProcessGroup:
    """All processes, as a group that may wait as long as the preparation of data takes.

    A process that has died is noticed all the same.
    """
    return _patient(distributed.group.WORLD)


@cache
def _patient(world: ProcessGroup) -> ProcessGroup:
    return distributed.new_group(timeout=timedelta(days=30), backend="gloo")


def gathered(value: T, group: ProcessGroup | None) -> list[T]:
    """The values of all processes of a group; without one that of this process."""
    if group is None:
        return [value]
    found: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(found, value, group)
    return found


def _sendable(error: Exception) -> Exception:
    """The error, or if it does not survive pickling one with its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
