"""What a recipe learns from: batches with what the objective needs beside, and evaluations."""

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tfkern import files, models
from tfkern.models.adapters import without_adapters
from tfkern.models.loss import IGNORED
from tfkern.train.evaluate import Evaluation, evaluate
from tfkern.train.freezing import frozen
from tfkern.train.kinds import make
from tfkern.train.objective import Batch, CrossEntropy, Objective
from tfkern.train.objectives import check_objective, objective
from tfkern.train.policy import FromRewards, ModelReward, Rollouts, TextReward
from tfkern.train.preferences import Reference
from tfkern.train.recipe import Recipe
from tfkern.train.recipe_model import policy_of
from tfkern.train.steps import Batches
from tfkern.train.tasks import Task


class Lessons(NamedTuple):
    """What a recipe learns from.

    Attributes:
        batches: of training.
        evaluate: evaluates the model that is trained. If rewards teach it, the loss is minus their
            mean.
        told: tells what the answers of the last round are like; None if the model writes none.
    """

    batches: Batches
    evaluate: Callable[[nn.Module], Evaluation]
    told: Callable[[], dict[str, Any]] | None = None


def objective_for(recipe: Recipe) -> Objective:
    """The objective of a recipe.

    Raises:
        ValueError: one that its task does not have, or options that do not fit.
    """
    kind = recipe.objective.get("kind")
    check_objective(recipe.task, kind)
    if kind != "cross_entropy":
        return objective(**recipe.objective)
    if len(recipe.objective) > 1:
        raise ValueError("objective cross_entropy has its options as values of the recipe itself")
    options = {name: getattr(recipe, name) for name in ("label_smoothing", "z_loss", "weights")}
    return objective("cross_entropy", **options)


def reference_for(
    recipe: Recipe, objective: Objective, model: nn.Module, precision: torch.dtype | None
) -> Any:
    """The reference that an objective compares a model with, the model as it is now: a copy, or
    with adapters the model without them. None if the objective needs none."""
    policy = policy_of(model)
    apart: Callable[[], AbstractContextManager[Any]] = partial(without_adapters, policy)
    if isinstance(objective, FromRewards):
        if not objective.kl:
            return None
        return frozen(policy) if recipe.lora is None else apart
    if not hasattr(objective, "extended"):
        return None
    if recipe.lora is None:
        return Reference(frozen(policy), precision=precision)
    return Reference(policy, apart, precision)


def no_reference(batch: Batch) -> Tensor:
    """Log-probabilities of 0, in place of those of a reference, where only shapes matter."""
    targets = batch["targets"]
    targets = targets[0] if isinstance(targets, tuple | list) else targets
    return (targets != IGNORED).sum(-1) * 0.0


def lessons_for(
    recipe: Recipe,
    objective: Objective,
    model: nn.Module,
    found: Task,
    reference: Any,
    precision: torch.dtype | None,
) -> Lessons:
    """What a recipe learns from.

    Args:
        model: what `steps` trains.
        found: the task of the recipe.
        reference: see `reference_for`.
        precision: see `steps`.

    Raises:
        ValueError: options of rollouts that do not fit, or a reward that cannot be read.
    """
    if isinstance(objective, FromRewards):
        return _from_rewards(recipe, objective, model, found, reference, precision)
    if recipe.rollouts:
        raise ValueError(f"rollouts are of the task prompts, and the task is {recipe.task}")
    batches, held, judge = found.batches, found.validation, objective
    if (extended := getattr(objective, "extended", None)) is not None:
        options = {"reference": reference, "precision": precision}
        batches, held = (extended(x, model, **options) for x in (batches, held))
    if isinstance(objective, CrossEntropy):  # that of training may have more terms
        judge = CrossEntropy(weights=recipe.weights)
    return Lessons(batches, lambda model: evaluate(model, held, judge, precision=precision))


def _from_rewards(
    recipe: Recipe,
    objective: FromRewards,
    model: nn.Module,
    found: Task,
    reference: Any,
    precision: torch.dtype | None,
) -> Lessons:
    options = dict(recipe.rollouts)
    device = next(model.parameters()).device
    reward = reward_for(options.pop("reward", None), found, device)
    _check_length(recipe, found)
    shared: dict[str, Any] = {"reference": reference, "precision": precision}

    def rollouts(prompts: Batches, seed: int, options: dict[str, Any]) -> Rollouts:
        kinds = {"rollouts": partial(Rollouts, model, prompts, reward, objective, seed=seed)}
        return make("recipe's", kinds, "rollouts", **shared, **options)

    training = rollouts(found.batches, recipe.seed, options)
    once = {name: x for name, x in options.items() if name not in ("epochs", "minibatches")}
    held = rollouts(found.validation, 0, once)  # evaluations of runs with other seeds compare

    def judge(model: nn.Module) -> Evaluation:
        rewards = []
        for batch in range(len(found.validation)):
            held[batch]
            assert held.last is not None
            rewards.append(held.last.reward)
        loss = -sum(rewards) / len(rewards)
        return Evaluation(loss, (loss,), ())

    def told() -> dict[str, Any]:
        return {} if training.last is None else training.last._asdict()

    return Lessons(training, judge, told)


def _check_length(recipe: Recipe, found: Task) -> None:
    """Raises ValueError if a prompt and its answer may have more tokens than a row has."""
    parts: Any = (found.batches, found.validation)
    longest = max(len(prompt) for part in parts for prompt in part.columns["prompt"])
    most = recipe.rollouts.get("max_tokens")
    if isinstance(most, int) and longest + most > recipe.length:
        raise ValueError(
            f"rollouts: a prompt of {longest} tokens and max_tokens = {most} are more than "
            f"length = {recipe.length}"
        )


def reward_for(told: Any, found: Task, device: torch.device) -> Any:
    """A reward: of the model in a folder, or a function of texts in a file of Python."""
    if not isinstance(told, str):
        expected = "the folder of a reward model, or file.py:function"
        raise ValueError(f"rollouts.reward must be {expected}, got {files.shown(told)}")
    assert found.tokenizer is not None
    path, colon, name = told.rpartition(":")
    if not (colon and path.endswith(".py")):
        judge = models.load(told, device=device).requires_grad_(False)
        size, other = found.tokenizer.vocab_size, judge.config.vocab_size or 0
        if size > other:
            raise ValueError(f"rollouts.reward: {told} has {other} tokens, the policy {size}")
        return ModelReward(judge)
    files.regular(Path(path))
    spec = importlib.util.spec_from_file_location("tfkern_reward", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        told = f"{type(error).__name__}: {files.one_line(error)}"
        raise ValueError(f"rollouts.reward: {path} cannot be run: {told}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"rollouts.reward: {path} has no function {files.shown(name)}")
    return TextReward(function, found.tokenizer)
