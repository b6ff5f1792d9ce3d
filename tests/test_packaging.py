"""What a wheel holds, and what the build says when something is missing."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.xdist_group("packaging")  # one build for all
UNWANTED = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", "build", "results")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The files of the checkout without what was built in it."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("csrc", "kernels", "tfkern", "benchmarks", "examples", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=UNWANTED)
    for name in (
        "setup.py",
        "tfkern_program.py",
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
    ):
        shutil.copy(ROOT / name, tree)
    return tree


def wheel(tree, out, **environment):
    """The names in a wheel built from `tree`, and its path."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    environment = (
        os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | environment
    )
    run = subprocess.run(
        [*command, "-w", out, tree], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    (path,) = Path(out).glob("*.whl")
    return set(zipfile.ZipFile(path).namelist()), path


def install(path, target):
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, path]
    subprocess.run(command, check=True)


def python(code, *path):
    """Runs code with these folders and torch's on the path, but without the editable install."""
    path = (*path, Path(torch.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))},
        cwd="/",
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


PYTHON_FILES = {
    f"{folder}/{path.relative_to(ROOT / source)}"
    for source, folder in {
        "tfkern": "tfkern", "kernels": "tfkern/kernels", "benchmarks": "tfkern/benchmarks"
    }.items()
    for path in (ROOT / source).glob("**/*.py")
} | {"tfkern_program.py"}  # fmt: skip
DATA = {"tfkern/py.typed", "tfkern/_C.pyi"} | {
    str(path.relative_to(ROOT)) for path in (ROOT / "tfkern/train/recipes").glob("*.yaml")
}

LAYER_NORM = (
    "import torch, tfkern\n"
    "x = torch.randn(4, 9, requires_grad=True)\n"
    "tfkern.layer_norm(x).square().sum().backward()\n"
    "print(tfkern.__file__, tfkern.explain('layer_norm', x).backend)"
)


def test_source_distribution(tree, tmp_path):
    """It holds all that a build needs, without the tests, which need more than itself."""
    # A copy: an earlier build leaves a list of files behind, which the next build adds to its own.
    tree = shutil.copytree(tree, tmp_path / "tree", ignore=UNWANTED)
    expected = {str(p.relative_to(tree)) for p in tree.rglob("*") if p.is_file()}
    expected = {name for name in expected if not name.startswith("tests/")}
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        capture_output=True,
        text=True,
        cwd=tree,
        env=os.environ | {"TFKERN_NATIVE": "0"},
    )
    assert run.returncode == 0, run.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {m.name.partition("/")[2] for m in archive if m.isfile()}
    made = {"PKG-INFO", "setup.cfg"}
    assert {n for n in names if not n.startswith("tfkern.egg-info/")} - made == expected


def test_pure_python_wheel(tree, tmp_path):
    names, path = wheel(tree, tmp_path / "wheel", TFKERN_NATIVE="0")
    assert path.name.endswith("-py3-none-any.whl")
    assert {n for n in names if ".dist-info/" not in n} == PYTHON_FILES | DATA
    install(path, tmp_path / "site")
    where, backend = python(LAYER_NORM, tmp_path / "site").split()
    assert where.startswith(str(tmp_path)) and backend == "reference"
    reason = python(
        "import tfkern; print(tfkern.backends('layer_norm')['native'])", tmp_path / "site"
    )
    assert "TFKERN_NATIVE=0" in reason


@pytest.mark.slow
def test_native_wheel(tree, tmp_path):
    names, path = wheel(tree, tmp_path / "wheel", TFKERN_CUDA="0")
    assert names >= PYTHON_FILES | DATA | {"tfkern/_operators.abi3.so"}
    rest = {n for n in names if ".dist-info/" not in n} - PYTHON_FILES - DATA
    assert sorted(n.partition(".")[0] for n in rest) == ["tfkern/_C", "tfkern/_operators"]
    assert all(n.endswith(".so") for n in rest)
    install(path, tmp_path / "site")
    where, backend = python(LAYER_NORM, tmp_path / "site").split()
    assert where.startswith(str(tmp_path)) and backend == "native"
    assert python("from tfkern import _C; print(_C.has_cuda)", tmp_path / "site") == "False"


@pytest.mark.parametrize(
    "environment, told",
    [
        (
            {"CUDA_HOME": "/nowhere", "TFKERN_CUDA": "1"},
            "no nvcc with libcudart_static.a in /nowhere",
        ),
        ({"CUDA_HOME": "/nowhere"}, ""),
    ],
)
def test_cuda_kernels_are_left_out_or_insisted_on(tree, environment, told):
    run = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        capture_output=True,
        text=True,
        cwd=tree,
        env=os.environ | environment,
    )
    assert (run.returncode != 0) == bool(told) and told in run.stderr
    assert told or "no CUDA kernels in this build" in run.stdout


ALL = "sm_80 sm_90a sm_100"


@pytest.mark.parametrize(
    "known, wanted, capability, told",
    [
        (ALL, "", None, ALL),
        ("sm_80 sm_90a", "", None, "sm_80 sm_90a"),
        (ALL, "sm_90a", None, "sm_90a"),
        (ALL, "sm_80,sm_100", (9, 0), "sm_80 sm_100"),
        (ALL, "native", (9, 0), "sm_90a"),
        (ALL, "native", (8, 9), "sm_80"),
        (ALL, "native", (10, 3), "sm_100"),
        ("sm_80 sm_90a", "native", (10, 3), "sm_80"),  # the PTX
        (ALL, "native", (12, 0), "sm_80"),
        (ALL, "native", None, ALL),
        (ALL, "sm_80,sm_12", None, "names 'sm_12': expected some of sm_80, sm_90a, sm_100, native"),
        ("sm_80 sm_90a", "sm_100", None, "names 'sm_100': expected some of sm_80, sm_90a, native"),
    ],
)
def test_architectures_to_build_for(tree, tmp_path, known, wanted, capability, told):
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho {known.replace('90a', '90')} sm_120")
    nvcc.chmod(0o755)
    code = (
        "import sys, torch; sys.argv = ['setup.py', '--version']\n"
        f"torch.cuda.is_available = lambda: {capability is not None}\n"
        f"torch.cuda.get_device_capability = lambda: {capability}\n"
        "exec(open('setup.py').read())\n"
        f"print(*cuda_architectures({str(tmp_path)!r}, torch))"
    )
    environment = os.environ | {"TFKERN_CUDA": "0", "TFKERN_CUDA_ARCHITECTURES": wanted}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tree, env=environment)
    assert told in (run.stdout.splitlines()[-1], run.stderr.partition("ARCHITECTURES ")[2].strip())


@pytest.mark.slow
def test_the_operator_library_needs_the_stable_abi_only():
    """No symbol of Python or of torch's C++ classes, so that one binary serves every version."""
    (library,) = ROOT.glob("tfkern/_operators*.so")
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", "--demangle", library], capture_output=True, text=True
    ).stdout
    assert "aoti_torch" in symbols
    foreign = [s for s in symbols.splitlines() if " Py" in s or "at::" in s or "c10::" in s]
    assert not foreign


def test_build_without_torch_says_what_to_do(tree):
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--version']\n"
    code += "exec(open('setup.py').read())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tree)
    assert run.returncode != 0
    assert "--no-build-isolation" in run.stderr and "TFKERN_NATIVE=0" in run.stderr
    assert "Traceback" not in run.stderr


def test_build_without_a_compiler_says_what_to_do(tree):
    run = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        capture_output=True,
        text=True,
        cwd=tree,
        env=os.environ | {"CXX": "no-such-compiler"},
    )
    assert run.returncode != 0
    assert "'no-such-compiler' cannot be found" in run.stderr and "TFKERN_NATIVE=0" in run.stderr
    assert "Traceback" not in run.stderr


def test_another_package_named_kernels_stays_importable(tmp_path):
    (tmp_path / "kernels.py").write_text("mine = True")
    code = "import kernels, tfkern; tfkern.backends('layer_norm'); print(kernels.mine)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ
        | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        cwd="/",
    )
    assert run.stdout == "True\n", run.stderr


def test_the_folder_refuses_to_be_a_top_level_package():
    run = subprocess.run(
        [sys.executable, "-c", "import kernels"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert "ImportError: this folder is tfkern.kernels" in run.stderr
