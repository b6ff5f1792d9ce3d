"""Conditions under which every test runs, and the parametrisation over backends and dtypes."""

import os

# Inductor knows a graph by the names of its operators: one that it kept from before would have the
# shapes that our operators had then.
os.environ |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, which reads it

import emulation  # noqa: E402
import pytest  # noqa: E402

if os.environ.get("TFKERN_CPU_FLAVOUR"):
    emulation.load_cpu()

import tfkern  # noqa: E402
from tfkern.ops import OPS  # noqa: E402

if os.environ.get("TFKERN_CUDA_HOST"):
    emulation.patch()

# Tests that run side by side share the processors.
torch.set_num_threads(
    max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(autouse=True)
def _strict():
    """Fresh allocations are NaN, so that an element that a kernel forgets is seen."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=DEVICE == "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread():
    """One thread: on small models more would wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _ranks(world):
    from ranks import Ranks

    ranks = Ranks(world)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def two():
    """Two processes of one group, which stay for all tests of a file. See `ranks.Ranks`."""
    yield from _ranks(2)


@pytest.fixture(scope="module")
def three():
    yield from _ranks(3)


@pytest.fixture(scope="module")
def four():
    yield from _ranks(4)


@pytest.fixture
def every_size(monkeypatch):
    """Models of other libraries run on tfkern's ops however small their inputs are."""
    monkeypatch.setattr("tfkern.integrations.hf.worth._costs", lambda x: False)


@pytest.fixture
def device():
    return DEVICE


def _repeats(metafunc, dtype):
    """Whether a test shows little of Triton's kernels that others do not, for which the interpreter
    takes too long. Their code hardly depends on which 16-bit dtype it is: float16 takes part where
    whole results are compared, in tests that match something or go through sizes."""
    if metafunc.definition.get_closest_marker("slow_in_interpreter"):
        return True
    compares = any(word in metafunc.function.__name__ for word in ("match", "sizes"))
    return dtype == torch.float16 and not compares


def pytest_generate_tests(metafunc):
    """`backend` runs a test once per backend of the op that its file is named after."""
    names = metafunc.fixturenames
    if "backend" not in names:
        return
    file = metafunc.module.__name__.rpartition("test_")[2]
    op = next(op for op in OPS if op in file)
    cases = []
    for backend, reason in tfkern.backends(op).items():
        for dtype in DTYPES if "dtype" in names else (None,):
            if backend == "triton" and dtype == torch.float64:
                continue  # not among the dtypes of the Triton kernels
            if backend == "native" and DEVICE == "cuda" and dtype == torch.float64:
                continue  # nor of the CUDA kernels
            marks = [pytest.mark.skip(reason=reason)] if reason else []
            if backend == "triton" and DEVICE == "cpu" and _repeats(metafunc, dtype):
                marks.append(pytest.mark.slow)
            values = (backend, dtype) if "dtype" in names else (backend,)
            label = backend if dtype is None else f"{backend}-{str(dtype).removeprefix('torch.')}"
            cases.append(pytest.param(*values, marks=marks, id=label))
    metafunc.parametrize(("backend", "dtype") if "dtype" in names else ("backend",), cases)
