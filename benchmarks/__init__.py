"""Benchmarks of the ops over context length: `tfkern bench <op>`.

One file per op says what is timed: its cases, the variants that compute them and the conventions
for work; `linear_cross_entropy.py`, `block.py` and `model.py` do so for larger parts of a model.
`timing.py` says how to time and `memory.py` how to measure memory. Three modules choose cases:
`sweep.py` over lengths, `against.py` in pairs with PyTorch on a CPU, and `suite.py` on a GPU next
to all that PyTorch has, in a process of `worker.py`. All three measure them by `measure.py`, which
compares variants with float64, times them and makes the rows. `report.py` shows rows: files,
tables, charts.

Whole models have modules of their own: `train.py` times steps of training, `patched.py` models of
transformers that run on tfkern, and `infer.py` and `generate.py` next to other ways to run a model,
by what they share in `peers.py`.
"""

from tfkern import ops

OPS = (*ops.OPS, "linear_cross_entropy", "block", "model")
