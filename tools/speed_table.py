"""Prints README's tables of the kernels' speed.

    tfkern bench attention --against torch    # and layer_norm, mlp, rotary, block
    tfkern bench suite                        # on a GPU
    python tools/speed_table.py

The first writes benchmarks/results/cpu-<processor>.csv, the second <gpu>.csv beside it, and the
third prints the tables from all of these files. On a processor with AMX, run the first a second
time with ONEDNN_MAX_CPU_ISA=AVX512_CORE_FP16 and MKL_ENABLE_INSTRUCTIONS=AVX512_E3 to get the rows
without AMX; it takes both, since products go through both libraries.
"""

from pathlib import Path

from tfkern.benchmarks import report

_RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
FILES = sorted(_RESULTS.glob("cpu-*.csv"), key=lambda path: path.stem)
# bounds.csv is counted, not measured.
GPU_FILES = sorted({*_RESULTS.glob("*.csv")} - {*FILES, _RESULTS / "bounds.csv"})
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def table() -> str:
    """Markdown: for each processor its ratios, and below them device, versions and commands."""
    by_device: dict[str, list] = {}
    for path in FILES:
        rows = report.read(path)
        by_device.setdefault(rows[0]["device"], []).append(rows)
    return "\n".join(_of_device(files) for files in by_device.values())


def gpu_tables() -> str:
    """Markdown: for each GPU and op the rates of all variants, and the ratio of tfkern's faster
    backend to the fastest variant of PyTorch."""
    return "\n".join(_of_gpu(report.read(path)) for path in GPU_FILES)


def _of_gpu(rows: list[dict[str, str]]) -> str:
    probes = [f"{r['case']} {r['rate']} {r['unit']}" for r in rows if r["op"] == "probe"]
    printed = f"{rows[-1]['device']}: {', '.join(probes)}\n\n"
    for op in dict.fromkeys(r["op"] for r in rows if r["op"] != "probe"):
        own = [r for r in rows if r["op"] == op and r["pass"] != "forward+backward"]
        own = [r for r in own if op != "attention" or _shown(r["case"])]
        variants = list(dict.fromkeys(r["variant"] for r in own))
        found: dict[tuple, dict] = {}
        for row in own:
            found.setdefault((row["case"], row["pass"], row["unit"]), {})[row["variant"]] = row
        lines = [["op", "case", "pass", "unit", *variants, "tfkern / torch"]]
        lines += [["---"] * len(lines[0])]
        for (case, pass_, unit), line in found.items():
            rates = [line[v]["rate"] if v in line else "" for v in variants]
            ours = [r["ratio_p50"] for v, r in line.items() if v.startswith("tfkern")]
            ratio = f"{max(map(float, filter(None, ours))):.2f}" if any(ours) else ""
            lines.append([op, case, pass_, unit, *(_rate(r) for r in rates), ratio])
        printed += "".join("| " + " | ".join(line) + " |\n" for line in lines) + "\n"
    return printed + f"- {_gpu_facts(rows)}\n"


def _shown(case: str) -> bool:
    return "T=1 " in case or "T=4096 " in case or "T=16384 " in case


def _rate(text: str) -> str:
    return f"{float(text):.3g}" if text else ""


def _gpu_facts(rows: list[dict[str, str]]) -> str:
    def each(column: str) -> str:
        return ", ".join(dict.fromkeys(row[column].partition("T")[0] for row in rows))

    versions = ", ".join(f"{name} {each(name)}" for name in ("driver", "torch", "triton"))
    return f"{versions}, tfkern at commit {each('commit')}, {each('date')}"


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
    """The facts of a file. Its ops may have been run at different times."""

    def each(column: str) -> str:
        return ", ".join(dict.fromkeys(row[column].partition("T")[0] for row in rows))

    return (
        f"{each('torch_instructions')}: {each('device')}, torch {each('torch')}, tfkern at commit "
        f"{each('commit')} with {each('instructions')}, {each('threads')} threads, {each('date')}"
    )


if __name__ == "__main__":
    print(table(), gpu_tables(), sep="\n", end="")
