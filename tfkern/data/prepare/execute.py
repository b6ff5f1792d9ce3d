"""Where the ranks of a stage run: processes of this machine, tasks of Ray, or jobs of Slurm."""

import copy
import multiprocessing
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor

from tfkern import files
from tfkern.data.prepare.options import checked
from tfkern.data.prepare.recipe import Plan
from tfkern.data.prepare.stage import Stage

EXECUTORS = ("local", "ray", "slurm")
Progress = Callable[[str, int, int], None]
_NOWHERE = open(os.devnull, "w")
JOBS = "jobs"  # the ids of all jobs that were given to Slurm
# Options that would break what a stage relies on: that all of the one before it has run, once.
_FIXED = (
    "pipeline", "tasks", "workers", "job_name", "logging_dir", "depends", "skip_completed",
    "job_id_retriever", "run_on_dependency_fail", "nodes_per_task", "max_array_size",
    "max_array_launch_parallel", "stagger_max_array_jobs",
)  # fmt: skip


def started(executor: str, planned: Plan, workers: int | None) -> Callable[[Stage, Progress], None]:
    """What runs a stage, and tells after each rank how many are done."""
    if executor == "slurm":
        return _Slurm(planned, workers)
    if executor == "ray":
        return _Ray(planned, workers)
    if workers is None:  # a worker starts in a second, and reads some megabytes in it
        workers = min(os.cpu_count() or 1, planned.files, 1 + (planned.size >> 23))
    return _Local(planned, workers)


class _Ranks(LocalPipelineExecutor):
    """The ranks of a stage. Its `run` waits for ever for a worker that is killed."""

    def __init__(self, stage: Stage, folder: Path) -> None:
        super().__init__(stage.steps, stage.ranks, logging_dir=str(folder / "logs" / stage.log))

    def run_rank(self, rank: int) -> int:
        # datatrove shows its bars and its traces on stderr; the latter are in `logs`, too.
        with redirect_stderr(_NOWHERE):
            copy.deepcopy(self)._run_for_rank(rank, local_rank=1)  # steps count one rank only
        return rank

    def missing(self) -> list[int]:
        return self.get_incomplete_ranks(skip_completed=True)


class _Local:
    """Processes of this machine."""

    def __init__(self, planned: Plan, workers: int) -> None:
        self.folder, self.workers = planned.folder, workers

    def __call__(self, stage: Stage, progress: Progress) -> None:
        ranks = _Ranks(stage, self.folder)
        missing = ranks.missing()
        progress(stage.name, stage.ranks - len(missing), stage.ranks)
        if self.workers == 1 or len(missing) < 2:
            for i, rank in enumerate(missing):
                ranks.run_rank(rank)
                progress(stage.name, stage.ranks - len(missing) + i + 1, stage.ranks)
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tfkern.data.prepare"])
        with ProcessPoolExecutor(min(self.workers, len(missing)), context) as pool:
            try:
                jobs = [pool.submit(ranks.run_rank, rank) for rank in missing]
                for i, job in enumerate(as_completed(jobs)):
                    job.result()
                    progress(stage.name, stage.ranks - len(missing) + i + 1, stage.ranks)
            except BrokenProcessPool:
                raise RuntimeError(
                    f"stage {stage.name!r}: a worker was killed, perhaps for want of memory; the "
                    "same call goes on where it was"
                ) from None
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


class _Ray:
    """Tasks of a Ray cluster, which are tried again when their process or machine dies."""

    def __init__(self, planned: Plan, workers: int | None) -> None:
        import ray

        self.ray, self.folder = ray, planned.folder.absolute()
        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level="ERROR")
        self.workers = workers or int(ray.cluster_resources().get("CPU", 1))

    def __call__(self, stage: Stage, progress: Progress) -> None:
        ranks = _Ranks(stage, self.folder)
        waiting = ranks.missing()
        done = stage.ranks - len(waiting)
        progress(stage.name, done, stage.ranks)
        task = self.ray.remote(_Ranks.run_rank).options(num_cpus=1, max_retries=3)
        shared, running = self.ray.put(ranks), list[Any]()
        try:
            while waiting or running:
                while waiting and len(running) < self.workers:
                    running.append(task.remote(shared, waiting.pop(0)))
                ready, running = self.ray.wait(running)
                self.ray.get(ready)
                done += len(ready)
                progress(stage.name, done, stage.ranks)
        except self.ray.exceptions.RayError as error:  # it holds what a rank itself raised
            cause = getattr(error, "cause", error)
            if not isinstance(cause, self.ray.exceptions.RayError):
                raise cause from None
            told = f"stage {stage.name!r}: {files.one_line(cause)}; the same call goes on"
            raise RuntimeError(f"{told} where it was") from None
        finally:  # the same call may come again, and then nobody else must write
            for rank in running:
                self.ray.cancel(rank, force=True)
            if running:
                self.ray.wait(running, num_returns=len(running))


class _Slurm:
    """Arrays of jobs. Each stage waits for the one before it."""

    def __init__(self, planned: Plan, workers: int | None) -> None:
        options = checked("slurm", planned.recipe.slurm or {}, SlurmPipelineExecutor, _FIXED)
        for name in ("time", "partition"):
            if name not in options:
                raise ValueError(f'slurm needs {name}, as in slurm: {{time: "2:00:00", ...}}')
        self.folder, self.options = planned.folder.absolute(), options
        # A job whose stage before it failed would be in the queue for ever.
        sbatch = {"kill-on-invalid-dep": "yes", **(options.get("sbatch_args") or {})}
        self.options["sbatch_args"] = sbatch
        self.workers, self.before = workers, None

    def __call__(self, stage: Stage, progress: Progress) -> None:
        position = self.options.get("job_id_position", -1)
        job = SlurmPipelineExecutor(
            stage.steps,
            stage.ranks,
            job_name=f"tfkern-{stage.log}",
            logging_dir=str(self.folder / "logs" / stage.log),
            workers=self.workers or -1,
            depends=self.before,
            job_id_retriever=partial(_noted, self.folder / JOBS, position),
            max_array_size=stage.ranks,
            **self.options,
        )
        try:
            with redirect_stderr(_NOWHERE):
                job.launch_job()
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(f"stage {stage.name!r}: sbatch failed: {error}") from None
        self.before = job
        progress(stage.name, stage.ranks, stage.ranks)


def _noted(jobs: Path, position: int, told: str) -> str:
    """The id of a job in what sbatch printed. It is also written down, for `check_queue`."""
    found = told.split()[position]
    with open(jobs, "a") as file:
        file.write(found + "\n")
    return found


def check_queue(folder: Path) -> None:
    """Raises ValueError if Slurm still has jobs of a run in this folder."""
    jobs = folder / JOBS
    if not jobs.exists():
        return
    try:
        told = subprocess.run(
            ["squeue", "--noheader", "--format=%F"], check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"{folder}: jobs of Slurm may be at work in this folder, and squeue cannot tell "
            f"({files.one_line(error)}): remove {jobs} if they have ended"
        ) from None
    if left := sorted({*told.stdout.split()} & {*jobs.read_text().split()}):
        raise ValueError(
            f"{folder}: Slurm still has jobs of this run ({', '.join(left)}): wait for them, or "
            "end them by scancel"
        )
    jobs.unlink()
