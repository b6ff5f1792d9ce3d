"""Steps that kill the process that runs them, or fail. Workers import them from here."""

import os
import signal
import time

from datatrove.pipeline.base import PipelineStep


class Killed(PipelineStep):
    type, name = "test", "killed"

    def run(self, data=None, rank=0, world_size=1):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        yield from ()


class Fails(PipelineStep):
    """Rank 0 fails as soon as rank 1 has begun to write, who goes on for a minute."""

    type, name = "test", "fails"

    def __init__(self, path):
        super().__init__()
        self.path = path

    def run(self, data=None, rank=0, world_size=1):
        for _ in range(600):
            if rank == 0 and self.path.exists():
                raise ValueError("document 7 is wrong")
            if rank == 1:
                with open(self.path, "a") as file:
                    file.write("x")
            time.sleep(0.1)
        yield from ()
