"""Prints README's table of the backends that have each option of attention.

    python tools/feature_table.py

builds it from the parameters that the tests go through and the answers of the backends.
"""

import os
import random

os.environ.setdefault("TRITON_INTERPRET", "1")  # lets triton answer without a GPU

import torch

import tfkern
from tfkern.validation.attention import PARAMETERS, make_case

BACKENDS = ("reference", "native", "triton")


def rows() -> list[tuple[str, list[bool]]]:
    """A row for each parameter and set of its values with equal answers. The answers say for each
    backend whether it runs forward, and whether it runs backward."""
    found: dict[tuple, list[str]] = {}
    for parameter, values in PARAMETERS.items():
        for value in filter(None, values):
            found.setdefault((parameter, *served({parameter: value})), []).append(value)
    return [
        (parameter if values == [parameter] else f"{parameter}: {', '.join(values)}", answers)
        for (parameter, *answers), values in found.items()
    ]


def served(choice: dict) -> list[bool]:
    case = make_case(choice, torch.randn, random.Random(0), None)
    options = case.fn.keywords | case.inputs
    del options["backend"]
    found = []
    for backend in BACKENDS:
        for needs_grad in (False, True):
            options["q"] = options["q"].requires_grad_(needs_grad)
            answer = tfkern.explain(case.fn.func.__name__, **options | {"backend": backend})
            found.append(answer.backend is not None)
    return found


def table() -> str:
    """The table in Markdown."""
    head = ["attention", *(f"{b} {way}" for b in BACKENDS for way in ("forward", "backward"))]
    lines = [head, ["---"] * len(head)]
    lines += [[label, *("yes" if yes else "" for yes in answers)] for label, answers in rows()]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


if __name__ == "__main__":
    print(table(), end="")
