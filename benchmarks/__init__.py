"""Benchmarks of the ops over context length: `tfkern bench <op>`.

One file per op says what is timed (`attention.py`, `layer_norm.py`, `mlp.py`, `block.py`,
`model.py`): its cases, the variants that compute them and the conventions for work. How it is
timed stands in `timing.py`, how memory is measured in `memory.py`, and `measure.py` says whether a
variant is right and what its rows hold. Three modules choose cases: `sweep.py` over lengths,
`against.py` in pairs with PyTorch on a CPU, and `suite.py` next to all that PyTorch has on a GPU,
in a process of `worker.py`. `report.py` writes the results.
"""

from tfkern import ops

OPS = (*ops.OPS, "block", "model")
