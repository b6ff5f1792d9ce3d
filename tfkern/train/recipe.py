"""What to train, on what, and how: a recipe."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from tfkern import files
from tfkern.train.kinds import check_choice, check_integer, check_number
from tfkern.train.parallel.mesh import AXES
from tfkern.train.parallel.pipeline import SCHEDULES

PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train, on what, and how.

    Attributes:
        out: the folder for the results.
        task: what the model learns, a kind of `tfkern.train.tasks`.
        data: what the task reads. For texts it is a folder that `tfkern prepare` made, or the
            fields of a `tfkern.data.prepare.Recipe` without its output, by which the data are
            prepared first; for other tasks see them.
        options: options of the task.
        length: most tokens of a row.
        batch: rows of a batch.
        model: fields of `tfkern.models.TransformerConfig`, beside those that follow from the task;
            "preset" names a published model whose fields they change, and "folder" is that of a
            model to go on with, weights and tokenizer, as `tfkern.models.load` reads it.
        lora: options of `tfkern.models.adapters.adapt`, which puts adapters of low rank on layers
            of the model and freezes all else. Without it the model itself is trained.
        freeze: names of parameters that stay as they are, in which * stands for any letters.
        objective: "kind" and options of the loss, see `tfkern.train.objectives`; the cross entropy
            by default.
        rollouts: options of `tfkern.train.Rollouts` for the task "prompts", such as "max_tokens"
            and "samples", and "reward". This is the folder of a reward model, or file.py:function,
            where the function takes lists of prompts and of answers as texts, and the columns of
            the data by name, and gives a number for each answer.
        recompute: whether backward computes activations again, rather than keep them.
        compile: whether the model is compiled.
        optimiser: "kind" and options, see `tfkern.train.optimiser`.
        schedule: "kind" and options, see `tfkern.train.schedule`.
        label_smoothing, z_loss: see `tfkern.cross_entropy`.
        weights: factors of the results' losses, for models with several.
        accumulate: parts of a batch that go through the model one after the other.
        precision: "float32"; or "bfloat16" or "float16", by autocast with weights of float32.
        clip_norm, clip_value: see `tfkern.train.steps`; None does not clip.
        steps: of the run. It may also be ended by `tokens` that were seen, or by
            `minutes` of steps, without evaluations.
        evaluate_every: steps from one evaluation to the next. There is one at the end, too.
        evaluation_batches: most batches of an evaluation.
        patience: the run ends after so many evaluations in a row that were not the best; None: not.
        save_every: steps from one checkpoint to the next. There is one at the end, too.
        keep: how many checkpoints stay.
        seed: of weights, order, corruption and dropout.
        device: that computes, such as "cpu" or "cuda"; the best one if None.
        parallel: how many processes share the work, and how: sizes of `tfkern.train.parallel.mesh`,
            of which dp follows from the number of processes, and "schedule" and "microbatches" of
            pp, see `tfkern.train.parallel.parallelise`.

    Raises:
        ValueError: a value of another type or out of range.
    """

    out: str
    task: str
    data: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    length: int = 256
    batch: int = 32
    model: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] | None = None
    freeze: tuple[str, ...] = ()
    objective: Mapping[str, Any] = field(default_factory=lambda: {"kind": "cross_entropy"})
    rollouts: Mapping[str, Any] = field(default_factory=dict)
    recompute: bool = False
    compile: bool = False
    optimiser: Mapping[str, Any] = field(default_factory=lambda: {"kind": "adamw", "lr": 1e-3})
    schedule: Mapping[str, Any] = field(default_factory=lambda: {"kind": "constant"})
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    weights: tuple[float, ...] | None = None
    accumulate: int = 1
    precision: str = "float32"
    clip_norm: float | None = 1.0
    clip_value: float | None = None
    steps: int = 1000
    tokens: int | None = None
    minutes: float | None = None
    evaluate_every: int = 250
    evaluation_batches: int = 50
    patience: int | None = None
    save_every: int = 1000
    keep: int = 2
    seed: int = 0
    device: str | None = None
    parallel: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("out", "task"):
            if not isinstance(getattr(self, name), str | Path):
                raise ValueError(f"{name} must be a string, got {files.shown(getattr(self, name))}")
            object.__setattr__(self, name, str(getattr(self, name)))
        for name in ("lora", *_MAPPINGS):
            told = getattr(self, name)
            if name == "lora" and told is None:
                continue
            if not isinstance(told, Mapping) or not all(isinstance(key, str) for key in told):
                raise ValueError(f"{name} must be a mapping of names, got {files.shown(told)}")
        if not isinstance(self.data, str | Path | Mapping):
            raise ValueError(f"data must be a path or a mapping, got {files.shown(self.data)}")
        if not isinstance(self.freeze, list | tuple) or not all(
            isinstance(name, str) for name in self.freeze
        ):
            raise ValueError(f"freeze must be a list of names, got {files.shown(self.freeze)}")
        object.__setattr__(self, "freeze", tuple(self.freeze))
        if {"preset", "folder"} <= self.model.keys():
            raise ValueError("model: preset and folder exclude each other")
        if not isinstance(self.model.get("folder", ""), str | Path):
            raise ValueError(
                f"model.folder must be a path, got {files.shown(self.model['folder'])}"
            )
        for name in ("recompute", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"{name} must be true or false, got {files.shown(getattr(self, name))}"
                )
        check_choice("precision", self.precision, PRECISIONS)
        for name in _COUNTS:
            if getattr(self, name) is not None or name not in _OPTIONAL:
                check_integer(name, getattr(self, name), 1)
        if self.accumulate > self.batch:
            raise ValueError(
                f"accumulate must be at most batch = {self.batch}, got {self.accumulate}"
            )
        check_integer("seed", self.seed, 0, 2**32 - 1)
        for name in ("clip_norm", "clip_value", "minutes"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 1e-12, 1e12)
        check_number("label_smoothing", self.label_smoothing, 0, 1)
        check_number("z_loss", self.z_loss, 0, 1e6)
        if self.weights is not None:
            if not isinstance(self.weights, list | tuple):
                raise ValueError(f"weights must be numbers, got {files.shown(self.weights)}")
            for weight in self.weights:
                check_number("weights", weight, 0, 1e6)
            object.__setattr__(self, "weights", tuple(self.weights))
        for name, needed in (
            ("objective", "kind"), ("optimiser", "kind"), ("optimiser", "lr"), ("schedule", "kind"),
        ):  # fmt: skip
            if needed not in getattr(self, name):
                raise ValueError(f"{name} needs {needed}")
        for name, taken in _TAKEN.items():
            for key in taken & getattr(self, name).keys():
                raise ValueError(f"{name} has no option {key!r}: that is a value of the recipe")
        for name, value in self.parallel.items():
            check_choice("parallel", name, (*AXES, "schedule", "microbatches"))
            if name != "schedule":
                check_integer(f"parallel.{name}", value, 1)
        if "schedule" in self.parallel:
            check_choice("parallel.schedule", self.parallel["schedule"], tuple(SCHEDULES))
        if "pp" not in self.parallel and {"schedule", "microbatches"} & self.parallel.keys():
            raise ValueError("parallel: schedule and microbatches need pp")
        if self.device is not None and not isinstance(self.device, str):
            raise ValueError(f"device must be a string, got {files.shown(self.device)}")


_COUNTS = (
    "length", "batch", "accumulate", "steps", "tokens", "evaluate_every", "evaluation_batches",
    "patience", "save_every", "keep",
)  # fmt: skip
_OPTIONAL = ("tokens", "patience")
_TAKEN = {  # what the run itself tells these functions
    "options": {"kind", "data", "length", "batch", "seed", "validation_batches", "start"},
    "optimiser": {"model"},
    "schedule": {"steps"},
    "rollouts": {"seed", "reference", "precision", "prompts", "objective"},
}
_MAPPINGS = ("options", "model", "objective", "rollouts", "optimiser", "schedule", "parallel")
_NESTED = (*_MAPPINGS, "data", "lora")


def load(name: str | Path, changes: Mapping[str, Any]) -> Recipe:
    """A recipe with some values in place of its own.

    Args:
        name: a YAML file, or the name of a recipe that comes with the package: see `shipped`.
        changes: values by name; "model.dim" stands for the value of dim in model. A mapping in
            place of another one replaces it as a whole.

    Raises:
        ValueError: the file cannot be read, is no mapping, or has names that no recipe has.
    """
    path = Path(name)
    if str(name) in shipped():
        path = _SHIPPED / f"{name}.yaml"
    elif path.suffix not in (".yaml", ".yml"):
        known = ", ".join(shipped())
        raise ValueError(f"{files.shown(str(name))} is neither a recipe (.yaml) nor one of {known}")
    told = files.read_recipe(path)
    for key, value in changes.items():
        outer, dot, inner = key.partition(".")
        if not dot:
            told[key] = value
        elif outer in _NESTED and isinstance(told.get(outer) or {}, dict):
            told[outer] = {**(told.get(outer) or {}), inner: value}
        else:
            raise ValueError(f"{key}: {outer} is no mapping of the recipe")
    return made(told)


def made(told: Mapping[str, Any]) -> Recipe:
    """The recipe with these values.

    Raises:
        ValueError: a name that no recipe has, or one that every recipe needs is missing.
    """
    files.check_recipe(told, [f.name for f in fields(Recipe)], ("out", "task", "data"))
    return Recipe(**told)


def shipped() -> dict[str, str]:
    """The recipes that come with the package, by name, with the first line of their comments."""
    found = sorted(Path(str(_SHIPPED)).glob("*.yaml"))
    return {path.stem: path.read_text().partition("\n")[0].lstrip("# ") for path in found}


_SHIPPED = Path(str(resources.files("tfkern.train") / "recipes"))


def plain(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain values, as YAML and JSON have them."""
    return {f.name: _plain(getattr(recipe, f.name)) for f in fields(recipe)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return str(value) if isinstance(value, Path) else value
