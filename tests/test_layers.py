"""The import ranks, and what importing the package does not do."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module imports only from packages of lower rank. Modules of one package may import each other.
RANKS = {
    "tfkern.reference": -1,  # what an op is: the kernels take its lists of arguments
    "tfkern.kernels": 0,
    "tfkern.native": 0,
    "tfkern._C": -1,
    "tfkern.files": 0,
    "tfkern.memory": 0,
    "tfkern.dispatch": 1,
    "tfkern.ops": 2,
    "tfkern.nn": 3,
    "tfkern.models": 4,
    "tfkern.tokenize": 4,
    "tfkern.classic": 5,
    "tfkern.data": 5,
    "tfkern.generate": 5,
    "tfkern.integrations": 5,
    "tfkern.validation": 3,
    "tfkern.testing": 4,  # the public door to the comparison in validation
    "tfkern.train": 6,
    "tfkern.benchmarks": 7,
    "tfkern.cli": 8,
}


def modules():
    for path in sorted(ROOT.glob("tfkern/**/*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(p for p in parts if p != "__init__"), path
    for folder in ("kernels", "benchmarks"):
        for path in sorted((ROOT / folder).glob("**/*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(("tfkern", *parts)), path


def package(name):
    return ".".join(name.split(".")[:2])


def imports(name, path):
    """Full names of the tfkern modules that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            found = [package(name)]
        elif isinstance(node, ast.ImportFrom) and node.module == "tfkern":
            found = [f"tfkern.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [node.module]
        else:
            continue
        for target in found:
            assert target.split(".")[0] not in ("kernels", "benchmarks"), f"{path} imports {target}"
            if target.split(".")[0] == "tfkern":
                yield package(target)


def broken_rules(files):
    for name, path in files:
        if name == "tfkern":
            continue
        for target in imports(name, path):
            # names that tfkern itself exports come from its highest rank below nn
            rank = RANKS.get(target, RANKS["tfkern.ops"])
            if target != package(name) and rank >= RANKS[package(name)]:
                yield f"{name} imports {target}"


def test_every_module_has_a_rank():
    assert {package(name) for name, _ in modules()} - {"tfkern"} <= set(RANKS)


def test_imports_go_down_the_ranks():
    assert list(broken_rules(modules())) == []


@pytest.mark.parametrize(
    "line",
    ["from tfkern.ops import layer_norm", "import tfkern.nn", "from tfkern import layer_norm"],
)
def test_a_planted_import_is_found(tmp_path, line):
    path = tmp_path / "planted.py"
    path.write_text(line)
    assert list(broken_rules([("tfkern.reference.planted", path)]))


def circles(files):
    """The first circle of modules that import each other, wherever in a file they do."""
    files = dict(files)
    graph = {}
    for name, path in files.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = name if path.name == "__init__.py" else name.rpartition(".")[0]
                above = ".".join(above.split(".")[: len(above.split(".")) + 1 - node.level])
                source = node.module or "" if not node.level else f"{above}.{node.module or ''}"
                source = source.strip(".")
                # a name is a module of the package, or else something that the package makes
                found = [f"{source}.{alias.name}" for alias in node.names]
                found = [x if x in files else source for x in found]
            else:
                continue
            graph[name] |= {x for x in found if x in files and x != name}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_no_modules_import_each_other():
    assert circles(modules()) == []


def test_a_planted_circle_is_found(tmp_path):
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    a.write_text("def f():\n    from tfkern.x import b")
    b.write_text("if TYPE_CHECKING:\n    from tfkern.x.a import f")
    assert set(circles([("tfkern.x.a", a), ("tfkern.x.b", b)])) == {"tfkern.x.a", "tfkern.x.b"}


def test_import_is_inert():
    """No Triton, no command line, no CUDA context, nothing printed."""
    code = (
        "import sys, torch, tfkern\n"
        "assert not torch.cuda.is_initialized()\n"
        "heavy = {'triton', 'typer', 'rich', 'matplotlib', 'numpy.testing', 'safetensors',\n"
        "         'tokenizers', 'transformers'} & set(sys.modules)\n"
        "assert torch.cuda.device_count() or not heavy, heavy"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
