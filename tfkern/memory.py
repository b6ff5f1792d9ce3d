"""The memory of this process."""

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of mallopt, see malloc.h


def keep_memory() -> bool:
    """Lets this process keep the memory of freed CPU tensors for the next ones.

    By default, large tensors are memory that is new from Linux, page by page, and goes back when
    they are freed. Then writing to them for the first time costs more than most ops: an addition of
    4 million numbers takes several times as long. Programs that make tensors of the same sizes
    again and again, as training does, should call this once, at their start; `tfkern train` and
    `tfkern sample` do. It holds for the whole process, which then stays as large as it has ever
    been. Small tensors that live long between large ones may keep their memory from being reused.

    Returns:
        Whether the process keeps memory: only the malloc of the GNU C library can be told.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return False
    # Large blocks come from the heap in place of mappings of their own, and its end is never cut.
    return mallopt(_MMAP_MAX, 0) == 1 and mallopt(_TRIM_THRESHOLD, -1) == 1
