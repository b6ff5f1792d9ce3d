"""Runs a recipe: data, model, loop, evaluations, checkpoints and the record of it all.

On many processes all of them do the same, but for the first one, which prepares data and writes the
files other than checkpoints.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh

from tfkern import files, models, tokenize
from tfkern.models import Transformer
from tfkern.models.adapters import save_adapter
from tfkern.train import chart, checkpoint
from tfkern.train.evaluate import Evaluation
from tfkern.train.flops import count_flops
from tfkern.train.lessons import lessons_for, no_reference, objective_for, reference_for
from tfkern.train.log import Log, read
from tfkern.train.objective import Batch
from tfkern.train.objectives import check_axes
from tfkern.train.optimisers import optimiser
from tfkern.train.parallel import mesh, parallelise
from tfkern.train.parallel.mesh import AXES, check_sizes, conflict, data_place, processes
from tfkern.train.parallel.together import each, everybody, first, gathered
from tfkern.train.policy import FromRewards
from tfkern.train.recipe import Recipe, plain
from tfkern.train.recipe_model import (
    check_model,
    gathered_policy,
    model_for,
    policy_of,
    unadapted,
)
from tfkern.train.schedules import schedule
from tfkern.train.steps import Record, size, steps
from tfkern.train.tasks import Task, check_options, task

_RECIPE, _METRICS, _CHART = "recipe.yaml", "metrics.jsonl", "loss.png"
_MARK = "# All values of a run of training. It is written anew whenever the run goes on."
_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Fields that change neither data nor weights. How far a run goes matters to its schedule alone.
_FREE = (
    "out", "data", "model", "compile", "recompute", "schedule", "steps", "tokens", "minutes",
    "evaluate_every", "evaluation_batches", "patience", "save_every", "keep", "device",
    "parallel",
)  # fmt: skip


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
        step: how many steps are done.
        reason: "steps", "minutes", "patience", or "stopped" by the caller.
        validation_loss: the best one.
        model: the folder with the model and its tokenizer, as `tfkern.models.load` and
            `tfkern.tokenize.load` read them: the weights of the best evaluation.
    """

    step: int
    reason: str
    validation_loss: float
    model: Path


def run(
    recipe: Recipe,
    *,
    told: Callable[[dict[str, Any]], None] = lambda line: None,
    stopped: Callable[[], bool] = lambda: False,
    ceiling: Callable[[], float] | None = None,
    preparing: Callable[[str, int, int], None] = lambda doing, done, total: None,
) -> Outcome:
    """Runs a recipe, or goes on with it where its last checkpoint is.

    The folder `recipe.out` then has recipe.yaml with all values, metrics.jsonl, loss.png, the
    checkpoints, and "model" with the weights of the best evaluation. On a CPU, a run that was
    stopped and one that was not have the same weights, bit by bit, with as many threads.

    If torchrun or Slurm has started many processes, all of them call this, with a folder that all
    see. How they share the work is in `recipe.parallel`.

    Args:
        told: is called with each line of metrics.jsonl; of many processes, in the first one.
        stopped: is asked after each step whether to save and end; of many processes, one suffices.
        ceiling: measures FLOP/s of the device, of which the lines then tell the share.
        preparing: is told what the preparation of data does, if there is one, how much of that is
            done, and of how much.

    Raises:
        ValueError: values of the recipe that are wrong or do not go together, data that are, a
            folder with other files, or with another run.
        OSError: files cannot be read or written.
        FloatingPointError: see `steps`.
    """
    return _Run(recipe, told, ceiling, preparing).run(stopped)


class _Run:
    def __init__(
        self,
        recipe: Recipe,
        told: Callable[[dict[str, Any]], None],
        ceiling: Callable[[], float] | None,
        preparing: Callable[[str, int, int], None],
    ) -> None:
        self.recipe, self.told, self.measure = recipe, told, ceiling
        self.folder = Path(recipe.out)
        kind = recipe.device or ("cuda" if torch.cuda.is_available() else "cpu")
        grid = _mesh(recipe, kind)
        self.many = grid is not None
        self.leads = grid is None or distributed.get_rank() == 0
        first(lambda: _check_foreign(self.folder), self.many)
        self.device = _device(kind if grid is None else grid.device_type)
        if isinstance(recipe.data, Mapping):  # all that is known before they are prepared
            _check_alone(recipe)
            if first(lambda: not (self.folder / _RECIPE).exists(), self.many):
                first(self._claim, self.many)
        data = first(lambda: _data(recipe, preparing), self.many)
        rank, world = (0, 1) if grid is None else data_place(grid)
        self.task = each(lambda: _task(recipe, data, rank, world), self.many)
        self.objective = objective_for(recipe)
        self.precision = _DTYPES[recipe.precision]
        critic = getattr(self.objective, "critic", False)
        self.model: Any = model_for(recipe, self.task, self.device, critic)
        config = policy_of(self.model).config
        # Before the weights of a checkpoint are there: a reference is the model at the start.
        reference = reference_for(recipe, self.objective, self.model, self.precision)
        self.flops, self.writes = 0, isinstance(self.objective, FromRewards)
        batch = self.task.batches[0]
        self.tokens = recipe.batch * recipe.length if self.writes else size(batch) * world
        if grid is not None:  # a model that is spread over processes cannot be counted
            self.flops = first(lambda: self._count_flops(batch), self.many) * world
            if recipe.compile:
                self.model.compile()
            options = {name: x for name, x in recipe.parallel.items() if name not in AXES}
            self.model = parallelise(self.model, grid, **options)
        self.lessons = lessons_for(
            recipe, self.objective, self.model, self.task, reference, self.precision
        )
        self.optimiser = optimiser(model=self.model, **recipe.optimiser)
        self.total = recipe.steps
        if recipe.tokens is not None:
            self.total = min(self.total, -(-recipe.tokens // self.tokens))
        self.schedule = schedule(steps=self.total, **recipe.schedule)
        half = self.precision == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type) if half else None
        self.configuration = {
            name: value for name, value in plain(recipe).items() if name not in _FREE
        }
        self.configuration |= {
            "model": asdict(config),
            "schedule": {"kind": recipe.schedule["kind"], **asdict(self.schedule)},
            "data": _digest(data),
        }

    def _claim(self) -> None:
        """Makes the folder, and a recipe.yaml in it that shows whose it is."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"out: {self.folder}: {error.strerror}") from None
        told = yaml.safe_dump(plain(self.recipe), sort_keys=False)
        files.write(self.folder / _RECIPE, f"{_MARK}\n{told}")

    def run(self, stopped: Callable[[], bool]) -> Outcome:
        with ExitStack() as held:
            first(lambda: self._lock(held), self.many)
            return self._run(stopped)

    def _lock(self, held: ExitStack) -> None:
        lock = self.folder / ".lock"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.touch()
        except OSError as error:
            raise ValueError(f"out: {self.folder}: {error.strerror}") from None
        try:
            held.enter_context(files.locked(lock, wait=False))
        except BlockingIOError:
            raise ValueError(f"out: another run is at work in {self.folder}") from None

    def _run(self, stopped: Callable[[], bool]) -> Outcome:
        recipe = self.recipe
        start = checkpoint.load(
            self.folder / "checkpoints",
            self.model,
            self.optimiser,
            scaler=self.scaler,
            configuration=self.configuration,
        )
        first(lambda: self._check_kept(start), self.many)
        first(self._claim, self.many)
        self.ceiling = None
        if start < self.total:
            if self.measure is not None:
                self.ceiling = first(self.measure, self.many) * processes()
            if not self.many:
                self.flops = self._count_flops(self.task.batches[start])
        compile_here = recipe.compile and not self.many
        compiled: Any = torch.compile(self.model) if compile_here else self.model
        loop = steps(
            compiled,
            self.lessons.batches,
            self.objective,
            self.optimiser,
            start=start,
            stop=self.total,
            schedule=self.schedule,
            accumulate=recipe.accumulate,
            precision=self.precision,
            scaler=self.scaler,
            clip_norm=recipe.clip_norm,
            clip_value=recipe.clip_value,
            seed=recipe.seed,
        )
        with ExitStack() as held:
            first(lambda: self._open(start, held), self.many)
            step, reason = start, self._agreed(start)
            for record in () if reason else loop:
                step = record.step
                if self.leads:
                    self._write(self._line(record))
                reason = self._agreed(step)
                if reason or step % recipe.evaluate_every == 0:
                    self._evaluate(step)
                    reason = self._agreed(step)
                if not reason and any(self._gathered(stopped())):
                    reason = "stopped"
                if reason or step % recipe.save_every == 0:
                    self._save(step)
                if reason:
                    break
            best = first(self._best, self.many)
        return Outcome(step, reason or "steps", best, self.folder / "model")

    def _check_kept(self, start: int) -> None:
        if not start and any("validation_loss" in line for line in read(self.folder / _METRICS)):
            raise ValueError(
                f"out: {self.folder} holds a run without its checkpoints: delete it, or choose "
                "another folder"
            )

    def _open(self, start: int, held: ExitStack) -> None:
        self.log = held.enter_context(closing(Log(self.folder, start)))

    def _count_flops(self, batch: Batch) -> int:
        """The FLOPs of a step on a batch of this process; 0 if the model writes its batches."""
        if self.writes:
            return 0
        if (extended := getattr(self.objective, "extended", None)) is not None:
            batch = extended([batch], self.model, reference=no_reference)[0]
        return count_flops(
            self.model,
            self.objective,
            batch,
            accumulate=self.recipe.accumulate,
            precision=self.precision,
        )

    def _gathered(self, value: Any) -> list[Any]:
        """The values of all processes."""
        return gathered(value, everybody() if self.many else None)

    def _agreed(self, step: int) -> str | None:
        """Why the run is at its end by the record, which the first process has."""
        return self._gathered(self._ended(step) if self.leads else None)[0]

    def _best(self) -> float:
        return min((loss for _, loss in self.log.evaluations), default=math.nan)

    def _ended(self, step: int) -> str | None:
        """Why the run is at its end, None if it is not."""
        recipe, losses = self.recipe, [loss for _, loss in self.log.evaluations]
        if step >= self.total:
            return "steps"
        if recipe.minutes is not None and self.log.seconds >= 60 * recipe.minutes:
            return "minutes"
        if recipe.patience is not None and losses:
            since = len(losses) - 1 - losses.index(min(losses))
            if since >= recipe.patience:
                return "patience"
        return None

    def _line(self, record: Record) -> dict[str, Any]:
        line = record._asdict() | {"tokens_per_second": record.tokens_per_second}
        line["flops_per_second"] = self.flops / record.seconds
        if self.ceiling is not None:
            line["share_of_ceiling"] = line["flops_per_second"] / self.ceiling
        if len(record.terms) == 1:
            del line["terms"]
        if self.lessons.told is not None:
            line |= self.lessons.told()
        return line

    def _write(self, line: dict[str, Any]) -> None:
        self.log.add(line)
        self.told(line)

    def _evaluate(self, step: int) -> None:
        """Evaluates, and keeps the model if it is the best so far.

        What has been evaluated has a checkpoint, so that a run without any is one that lost them.
        """
        if first(self._is_fresh, self.many):
            self._save(step)
        found = self.lessons.evaluate(self.model)
        if first(lambda: self._note(step, found), self.many):
            whole = gathered_policy(self.model)
            first(lambda: self._export(whole), self.many)

    def _export(self, model: Transformer) -> None:
        export(unadapted(model), self.task, self.folder / "model")
        if self.recipe.lora is not None:
            save_adapter(model, self.folder / "adapter", base=self.recipe.model.get("folder"))

    def _is_fresh(self) -> bool:
        """Whether nothing has been evaluated or saved yet."""
        return not self.log.evaluations and checkpoint.latest(self.folder / "checkpoints") is None

    def _note(self, step: int, found: Evaluation) -> bool:
        """Writes an evaluation to the record. Returns whether it is the best so far."""
        line: dict[str, Any] = {"step": step, "validation_loss": found.loss}
        if found.accuracies:
            line["accuracy"] = found.accuracies[-1]
        best = all(found.loss < loss for _, loss in self.log.evaluations)
        self._write(line)
        self.log.flush()
        chart.draw(self.log.losses, self.log.evaluations, self.folder / _CHART)
        return best

    def _save(self, step: int) -> None:
        if self.leads:
            self.log.flush()
        checkpoint.save(
            self.folder / "checkpoints",
            step,
            self.model,
            self.optimiser,
            scaler=self.scaler,
            configuration=self.configuration,
            keep=self.recipe.keep,
        )


def export(model: Transformer, found: Task, folder: Path) -> None:
    """Writes a model, its tokenizer with its chat template and, as labels.json, the names of its
    classes.

    The model is in the form of transformers if it has such models.
    """
    try:
        models.save(model, folder)
    except ValueError:
        models.save(model, folder, form="tfkern")
    if found.tokenizer is not None:
        tokenize.save(found.tokenizer, folder)
    if found.template is not None:
        files.write(folder / "chat_template.jinja", found.template)
    if found.labels:
        files.write(folder / "labels.json", json.dumps(list(found.labels)) + "\n")


def _mesh(recipe: Recipe, kind: str) -> DeviceMesh | None:
    """The processes that take part, if there are several."""
    world = processes()
    sizes = check_sizes(recipe.parallel, world)
    if world == 1:
        return None
    if (reason := conflict(sizes)) is not None:
        raise ValueError(f"parallel: {reason}")
    check_axes(recipe.task, sizes)
    if recipe.compile and sizes.get("pp", 1) > 1:
        raise ValueError("compile must be false with pp: stages are parts of a model")
    return mesh(**sizes, device=kind.partition(":")[0])


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        told = str(error).partition("\n")[0]
        raise ValueError(f"device: {files.shown(name)} cannot be used: {told}") from None


def _check_foreign(folder: Path) -> None:
    """Raises ValueError if the folder has files, and they are not of a run."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: {folder} is no folder")
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    found = sorted(name for name in names if not name.startswith("."))
    recipe = folder / _RECIPE
    if found and not (recipe.is_file() and files.read(recipe).startswith(_MARK.encode())):
        raise ValueError(f"out: {folder} holds {found[0]}, and has not been written by a run")


def _check_alone(recipe: Recipe) -> None:
    """Raises ValueError for what is wrong whatever the data are."""
    check_options(recipe.task, recipe.options)
    _preparation(recipe)
    steps = recipe.steps
    if recipe.tokens is not None:
        steps = min(steps, -(-recipe.tokens // (recipe.batch * recipe.length)))
    objective_for(recipe)
    schedule(steps=steps, **recipe.schedule)
    optimiser(model=nn.ModuleList([nn.Linear(2, 2)]), **recipe.optimiser)
    check_model(recipe)


def _data(recipe: Recipe, preparing: Callable[[str, int, int], None]) -> Path:
    """Where the data are, which are prepared first if need be."""
    if not isinstance(recipe.data, Mapping):
        return Path(recipe.data)
    from tfkern.data.prepare import prepare

    return prepare(_preparation(recipe), progress=preparing)


def _preparation(recipe: Recipe) -> Any:
    """The recipe of the data."""
    from tfkern.data.prepare.recipe import made

    if "output" in recipe.data:
        raise ValueError("data has no output: they are prepared in the folder of the run")
    return made({**recipe.data, "output": str(Path(recipe.out) / "data")})


def _task(recipe: Recipe, data: Path, rank: int, world: int) -> Task:
    return task(
        recipe.task,
        data,
        length=recipe.length,
        batch=recipe.batch,
        seed=recipe.seed,
        validation_batches=recipe.evaluation_batches,
        rank=rank,
        world=world,
        start=recipe.model.get("folder"),
        **recipe.options,
    )


def _digest(data: Path) -> str:
    """A hash of what the data are: of the manifest of prepared ones, of a file, or a name."""
    path = data / "manifest.json" if data.is_dir() else data
    if not path.is_file():
        return str(data)
    told = files.read_object(path).get("shards") if data.is_dir() else None
    hashed = hashlib.sha256(json.dumps(told, sort_keys=True).encode() if told else b"")
    if told is None:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                hashed.update(block)
    return hashed.hexdigest()
