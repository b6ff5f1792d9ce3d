"""The process of the program: how it ends, what it leaves, and what a signal finds."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tfkern_program
from tfkern.benchmarks import report

PROGRAM = [sys.executable, "-P", "-m", "tfkern_program"] if sys.version_info >= (3, 11) else []
pytestmark = pytest.mark.skipif(
    not PROGRAM or sys.platform != "linux", reason="looks at processes through /proc"
)
PATIENCE = 120  # seconds, for a busy machine
QUICK = """
import sys, time
import tfkern_program
from tfkern.cli import doctor
from tfkern.benchmarks import timing
timing.product_ceiling = lambda *_: 1e11
timed = timing.Timing([(1.0, 0.0)] * 3)
timing.interleaved = lambda steps, *_, **__: dict.fromkeys(steps, timed)
"""


def started(command, **options):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes | {"stdin": subprocess.DEVNULL} | options)


def planted(code, *arguments, **options):
    """The program in a process of its own, after the code has changed a part of it."""
    code = f"{QUICK}\n{code}\nsys.exit(tfkern_program.main())"
    return started([sys.executable, "-c", code, *arguments], **options)


def until(found):
    deadline = time.monotonic() + PATIENCE
    while not (result := found()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return result


def maps_torch(process):
    return "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()


def children(process):
    """The running processes that it has started, but for compilers and version control."""
    pids = []
    for task in Path(f"/proc/{process.pid}/task").glob("*/children"):
        pids += map(int, task.read_text().split())
    return [pid for pid in pids if b"attached" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


STATUS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}


@pytest.mark.parametrize("number", STATUS)
def test_a_signal_during_the_import_of_torch(number):
    process = started([*PROGRAM, "doctor"])
    until(lambda: maps_torch(process))
    process.send_signal(number)
    out, error = process.communicate(timeout=PATIENCE)
    status, told = STATUS[number]
    assert (process.returncode, out, error) == (status, "", f"tfkern: {told}\n")


@pytest.mark.parametrize("number", [*STATUS, signal.SIGKILL])
def test_a_signal_during_a_benchmark(tmp_path, number):
    """It ends with its measuring child, and the rows so far stand in a file that is whole."""
    sizes = ["--lengths", "16,32,64,128", "--heads", "1", "--device", "cpu", "--out", str(tmp_path)]
    process = planted("", "bench", "attention", *sizes)
    until(lambda: (tmp_path / "attention.csv").exists())
    (child,) = until(lambda: children(process))
    process.send_signal(number)
    _, error = process.communicate(timeout=PATIENCE)
    if number in STATUS:
        status, told = STATUS[number]
        assert (process.returncode, error) == (status, f"tfkern: {told}\n")
    until(lambda: not alive(child))
    rows = report.read(tmp_path / "attention.csv")
    assert rows and {row["length"] for row in rows} <= {"16", "32", "64", "128"}
    assert [p.name for p in tmp_path.iterdir() if number in STATUS or p.is_file()] == [
        "attention.csv"
    ]


@pytest.mark.parametrize("number", STATUS)
def test_a_main_thread_that_hears_nothing(number):
    """It is like a thread in a long kernel. The program ends all the same, with one line."""
    deaf = """
def deaf(*_):
    print("deaf", flush=True)
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
tfkern_program.GRACE = 0.5
doctor.show = deaf
"""
    process = planted(deaf, "doctor")
    assert process.stdout.readline() == "deaf\n"
    for _ in range(3):
        process.send_signal(number)
    _, error = process.communicate(timeout=PATIENCE)
    status, told = STATUS[number]
    assert (process.returncode, error) == (status, f"tfkern: {told}\n")


@pytest.mark.parametrize("number", STATUS)
def test_a_signal_while_nobody_reads_what_was_printed(number):
    """Output that fills the pipe leaves the buffer at the end only."""
    full = """
import os, threading
def show(*_):
    os.set_blocking(1, False)
    try:
        while True:
            os.write(1, b"x")
    except BlockingIOError:
        os.set_blocking(1, True)
    print("more")
    threading.Timer(0.2, os.write, (2, b"soon\\n")).start()
doctor.show = show
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    process = planted(full, "doctor", env=environment)
    assert process.stderr.readline() == "soon\n"  # the main thread is flushing by now
    time.sleep(0.2)
    process.send_signal(number)
    status, told = STATUS[number]
    assert process.wait(timeout=PATIENCE) == status
    assert process.stderr.read() == f"tfkern: {told}\n"


def test_an_interrupt_that_the_caller_ignores_is_ignored():
    """A command in the background of a script is called so."""
    code = "doctor.show = lambda *_: (print('here', flush=True), time.sleep(1), print('on'))"
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = planted(code, "doctor")
    finally:
        signal.signal(signal.SIGINT, former)
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, error) == (0, "on\n", "")


def test_a_worker_ends_with_its_parent():
    code = """
import planted
from tfkern.benchmarks.worker import Worker
worker = Worker("cpu")
worker.ask(planted.answer, 1)
print(worker._process.pid, flush=True)
worker.ask(planted.hang)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent / "support")}
    process = started([sys.executable, "-c", code], env=environment)
    child = int(process.stdout.readline())
    assert alive(child)
    process.kill()
    process.wait()
    until(lambda: not alive(child))
    process.stdout.close()
    process.stderr.close()


def test_a_child_whose_parent_is_gone_does_nothing():
    code = "from tfkern_program import attached; attached(1, 'builtins', 'print', 'it runs')"
    process = started([sys.executable, "-c", code])
    assert process.communicate(timeout=PATIENCE) == ("", "") and process.returncode == 1


@pytest.mark.parametrize(
    "where, status, told",
    [
        ("| true", 1, ""),
        ("> /dev/full", 1, "tfkern: output: No space left on device\n"),
        (">&- 2>&-", 0, ""),
    ],
)
def test_where_the_output_goes(where, status, told):
    """A reader that is gone, a disk that is full, streams that are closed."""
    code = """
import sys, time, tfkern_program
from tfkern.cli import doctor
doctor.show = lambda *_: (time.sleep(0.2), print("x" * 100_000))
sys.exit(tfkern_program.main())
"""
    shell = f'"$0" -c "$1" doctor {where}; exit ${{PIPESTATUS[0]}}'
    run = subprocess.run(
        ["bash", "-c", shell, sys.executable, code],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (run.returncode, run.stderr) == (status, told)


def test_a_package_that_cannot_be_imported_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('no\\nlibrary')")
    run = subprocess.run(
        [*PROGRAM, "doctor"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        timeout=PATIENCE,
    )
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == "tfkern: RuntimeError: no library\n"


@pytest.mark.slow
def test_interrupts_at_any_moment(tmp_path):
    """From the first import to the end of a sweep."""
    sizes = ["--lengths", "16,32", "--heads", "1", "--device", "cpu", "--out", str(tmp_path)]
    for tenth in range(2, 120, 4):
        process = started([*PROGRAM, "bench", "attention", *sizes])
        time.sleep(tenth / 10)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=PATIENCE)
        assert (process.returncode, error) in ((130, "tfkern: interrupted\n"), (0, "")), tenth


def test_the_program_is_this_module():
    """What pip installs as `tfkern` imports nothing else before it is ready."""
    from importlib.metadata import entry_points

    (point,) = (p for p in entry_points(group="console_scripts") if p.name == "tfkern")
    assert point.value == "tfkern_program:main" and point.load() is tfkern_program.main
    code = "import sys, tfkern_program; assert not {'torch', 'tfkern'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
