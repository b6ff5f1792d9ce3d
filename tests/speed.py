"""The table of README that says how fast the native kernels are.

    tfkern bench attention --against torch    # and layer_norm, mlp, block
    python tests/speed.py

The first writes benchmarks/results/cpu-<processor>.csv, the second prints the table from all of
these files. On a processor with AMX, a second run under ONEDNN_MAX_CPU_ISA=AVX512_CORE_FP16 and
MKL_ENABLE_INSTRUCTIONS=AVX512_E3 says how it looks without: products go through both libraries.
"""

from pathlib import Path

from tfkern.benchmarks import report

_RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
FILES = sorted(_RESULTS.glob("cpu-*.csv"), key=lambda path: path.stem)
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def table() -> str:
    """Markdown: for each processor its ratios, and below them what they were measured with."""
    by_device: dict[str, list] = {}
    for path in FILES:
        rows = report.read(path)
        by_device.setdefault(rows[0]["device"], []).append(rows)
    return "\n".join(_of_device(files) for files in by_device.values())


def _of_device(files: list[list[dict[str, str]]]) -> str:
    rows = [row for file in files for row in file]
    columns = list(dict.fromkeys((r["torch_instructions"], r["dtype"]) for r in rows))
    ratios: dict[tuple, dict] = {}
    for row in rows:
        label = f"{row['op']} {row['pass']}", row["case"], row["against"]
        column = row["torch_instructions"], row["dtype"]
        ratios.setdefault(label, {})[column] = f"{float(row['ratio_p50']):.2f}"
    head = [f"{_SHORT[dtype]}, {instructions}" for instructions, dtype in columns]
    lines = [["op", "case", "against", *head], ["---"] * (3 + len(head))]
    lines += [[*label, *(found.get(c, "") for c in columns)] for label, found in ratios.items()]
    printed = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    return printed + "\n" + "".join(f"- {_facts(file)}\n" for file in files)


def _facts(rows: list[dict[str, str]]) -> str:
    """Of a file, whose ops may have been run at different times."""

    def each(column: str) -> str:
        return ", ".join(dict.fromkeys(row[column].partition("T")[0] for row in rows))

    return (
        f"{each('torch_instructions')}: {each('device')}, torch {each('torch')}, tfkern at commit "
        f"{each('commit')} with {each('instructions')}, {each('threads')} threads, {each('date')}"
    )


if __name__ == "__main__":
    print(table(), end="")
