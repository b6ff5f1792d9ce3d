"""The script of the first minutes on a GPU, with stand-ins for what needs one."""

import sys
import time

import gpu_first
from gpu_first import Part


def python(name, seconds, code):
    return Part(name, seconds, [sys.executable, "-c", code])


def test_no_part_waits_for_the_success_of_another(capfd):
    slow = "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    parts = [
        python("fails", 60, "raise SystemExit(3)"),
        python("hangs", 1, slow),
        Part("is missing", 60, ["/no/such/program"]),
        python("works", 60, "print('it ran')"),
    ]
    start = time.monotonic()
    assert gpu_first.main([], parts) == 1
    assert time.monotonic() - start < 50
    output = capfd.readouterr().out
    for told in ("fails: failed with status 3", "hangs: stopped after 1 s", "works: passed"):
        assert told in output
    assert "is missing: could not start" in output and "it ran" in output
    assert gpu_first.main(["works"], parts) == 0


def test_the_parts_take_ten_minutes_and_are_programs():
    parts = gpu_first.parts()
    assert sum(part.seconds for part in parts) <= 670  # some end before their limits
    for part in parts:
        if part.command[1] == "-c":
            compile(part.command[2], part.name, "exec")
