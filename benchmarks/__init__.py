"""Benchmarks of the ops over context length: `tfkern bench <op>`, or `pytest benchmarks`.

One file per op says what is timed (`attention.py`, `layer_norm.py`, `mlp.py`, `block.py`,
`model.py`): its cases, the variants that compute them and the conventions for work. How it is timed
stands in `timing.py`, how memory is measured in `memory.py`; `sweep.py` puts the two together and
`report.py` writes the results. `against.py` times fixed cases in pairs with PyTorch instead, on a
CPU, and `suite.py` next to all that PyTorch has on a GPU, in a process of `worker.py`.
"""

from tfkern import ops

OPS = (*ops.OPS, "block", "model")
