"""Runs a recipe: data, model, loop, evaluations, checkpoints and the record of it all.

On many processes all of them do the same, but for the first one, which prepares data and writes the
files other than checkpoints.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh

from tfkern import files, models, tokenize
from tfkern.models import Transformer, TransformerConfig
from tfkern.train import chart, checkpoint
from tfkern.train.evaluate import Evaluation, evaluate
from tfkern.train.flops import count_flops
from tfkern.train.freezing import freeze
from tfkern.train.log import Log, read
from tfkern.train.objective import CrossEntropy, Objective
from tfkern.train.objectives import objective
from tfkern.train.optimisers import optimiser
from tfkern.train.parallel import gather, mesh, parallelise
from tfkern.train.parallel.mesh import AXES, check_sizes, conflict, data_place, processes
from tfkern.train.parallel.together import each, everybody, first, gathered
from tfkern.train.recipe import Recipe, plain
from tfkern.train.schedules import schedule
from tfkern.train.steps import Record, size, steps
from tfkern.train.tasks import Task, check_options, task

_RECIPE, _METRICS, _CHART = "recipe.yaml", "metrics.jsonl", "loss.png"
_MARK = "# All values of a run of training. It is written anew whenever the run goes on."
_TOKENS = ("pad_token", "start_token", "end_token", "forced_first", "forced_last")
_HEADS = ("head", "classes")  # what a task changes in a model that is there already
_SIZE = 2**24  # tokens of a vocabulary that is not known yet
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
        self.model: Any = _model(recipe, self.task, self.device)
        config = self.model.config
        freeze(self.model, recipe.freeze)
        self.flops, self.tokens = 0, size(self.task.batches[0]) * world
        self.objective = _objective(recipe)
        self.batches, self.validation = self.task.batches, self.task.validation
        if (extended := getattr(self.objective, "extended", None)) is not None:
            self.batches, self.validation = (
                extended(batches, self.model) for batches in (self.batches, self.validation)
            )
        self.precision = _DTYPES[recipe.precision]
        if grid is not None:  # a model that is spread over processes cannot be counted
            self.flops = first(lambda: self._count_flops(0), self.many) * world
            if recipe.compile:
                self.model.compile()
            options = {name: x for name, x in recipe.parallel.items() if name not in AXES}
            self.model = parallelise(self.model, grid, **options)
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
                self.flops = self._count_flops(start)
        compile_here = recipe.compile and not self.many
        compiled: Any = torch.compile(self.model) if compile_here else self.model
        loop = steps(
            compiled,
            self.batches,
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

    def _count_flops(self, step: int) -> int:
        """Of the part of a batch that this process has."""
        return count_flops(
            self.model,
            self.objective,
            self.batches[step],
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
        objective = self.objective
        if isinstance(objective, CrossEntropy):  # that of training may have more terms
            objective = CrossEntropy(weights=self.recipe.weights)
        found = evaluate(self.model, self.validation, objective, precision=self.precision)
        if first(lambda: self._note(step, found), self.many):
            whole = gather(self.model)
            first(lambda: export(whole, self.task, self.folder / "model"), self.many)

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
    _objective(recipe)
    schedule(steps=steps, **recipe.schedule)
    optimiser(model=nn.ModuleList([nn.Linear(2, 2)]), **recipe.optimiser)
    # The task has its say on the architecture, and on the number of tokens.
    found = {"max_length": recipe.length, "vocab_size": _SIZE}
    if "folder" in recipe.model:
        models.convert.read_config(recipe.model["folder"])
        return
    if "preset" in recipe.model or "patch_size" in recipe.model:
        found = {}
    told = {**found, **recipe.model, "head": "none"}
    errors = []
    for architecture in ("decoder", "encoder", "encoder_decoder"):
        try:
            _built({"architecture": architecture, **told})
            return
        except ValueError as error:
            errors.append(error)
    raise errors[0]


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


def _config(recipe: Recipe, found: Task) -> TransformerConfig:
    """The configuration of the model: that of the task, with the recipe's fields."""
    ours = recipe.model
    least, size = found.config.get("vocab_size") or 0, ours.get("vocab_size")
    if isinstance(size, int) and size < least:
        raise ValueError(f"model: vocab_size is {size}, and the tokenizer has {least} tokens")
    needed = {key: found.config[key] for key in ("architecture", "head") if key in found.config}
    for key, value in needed.items():
        if ours.get(key, value) != value:
            raise ValueError(
                f"model: {recipe.task} needs {key} {value!r}, got {files.shown(ours[key])}"
            )
    name = ours.get("preset")
    if name in models.presets():
        architecture = models.preset(name).architecture
        if needed.get("architecture", architecture) != architecture:
            raise ValueError(
                f"model: {recipe.task} needs architecture {needed['architecture']!r}, and {name} "
                f"is {architecture!r}"
            )
    # The tokens of a preset are those of its own tokenizer.
    tokens = dict.fromkeys(_TOKENS if name is not None else ())
    return _built({**tokens, **found.config, **ours})


def _built(told: dict[str, Any]) -> TransformerConfig:
    """The configuration with these fields, or that of a preset with these changes."""
    told = dict(told)
    name = told.pop("preset", None)
    known = {f.name for f in fields(TransformerConfig)}
    if unknown := told.keys() - known:
        raise ValueError(f"model: {files.shown(min(unknown))} is no field of TransformerConfig")
    missing = [] if name is not None else sorted({"dim", "layers", "heads"} - told.keys())
    if missing:
        raise ValueError(f"model needs {', '.join(missing)}, or a preset")
    try:
        return TransformerConfig(**told) if name is None else models.preset(name, **told)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model: {files.one_line(error)}") from None


def _model(recipe: Recipe, found: Task, device: torch.device) -> Transformer:
    folder = recipe.model.get("folder")
    with torch.random.fork_rng([]):
        torch.manual_seed(recipe.seed)
        if folder is None:
            model = Transformer(_config(recipe, found))
        else:
            model = _loaded(Path(folder), recipe, found)
    model.recompute = recipe.recompute
    if model.vocabulary is not None:  # its logits would take most of the memory
        model.vocabulary.deferred = True
    return model.to(device)


def _loaded(folder: Path, recipe: Recipe, found: Task) -> Transformer:
    """The model of a folder, with the head that the task needs."""
    changes = {name: found.config[name] for name in _HEADS if name in found.config}
    changes |= {name: value for name, value in recipe.model.items() if name != "folder"}
    config = models.convert.read_config(folder)
    needed = found.config.get("architecture", config.architecture)
    if config.architecture != needed:
        raise ValueError(
            f"model: {recipe.task} needs architecture {needed!r}, and {folder} is "
            f"{config.architecture!r}"
        )
    size, context = found.config.get("vocab_size") or 0, config.max_length
    if size > (config.vocab_size or 0):
        changes["vocab_size"] = size  # the vectors of new tokens are drawn
    if context is not None and recipe.length > context and "max_length" not in changes:
        raise ValueError(f"length = {recipe.length} is more than {folder} takes: {context}")
    try:
        return models.load(folder, dtype=torch.float32, **changes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model: {files.one_line(error)}") from None


def _objective(recipe: Recipe) -> Objective:
    if recipe.objective != {"kind": "cross_entropy"}:
        return objective(**recipe.objective)
    return CrossEntropy(recipe.label_smoothing, recipe.z_loss, recipe.weights)


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
