"""Answers that the model itself writes, and their rewards, as batches of training."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tfkern.generate import Sampling, generate
from tfkern.models import Transformer
from tfkern.models.loss import IGNORED
from tfkern.train.evaluate import evaluating
from tfkern.train.kinds import check_integer, check_number
from tfkern.train.parallel.model import ROWS, Parallel
from tfkern.train.policy.answers import Answers, tempered_log_probs
from tfkern.train.policy.critic import ActorCritic, check_repeats
from tfkern.train.policy.objective import FromRewards
from tfkern.train.policy.rewards import Reward, numbers
from tfkern.train.steps import Batches

_Reference = nn.Module | Callable[[], AbstractContextManager[Any]]


class Round(NamedTuple):
    """What the answers of a round are like, on all data ranks.

    Attributes:
        number: of the round, from 0.
        reward: the mean over answers, less what a missing end costs.
        kl: the mean over answers of log(policy / reference), an estimate of the KL divergence of
            whole answers in nats; None without a reference.
        ended: the share of answers that an end token ended.
        length: the mean number of tokens of an answer, with its end token.
    """

    number: int
    reward: float
    kl: float | None
    ended: float
    length: float


class Rollouts:
    """Batches for PPO, GRPO and RLOO: answers that the model writes in rounds, with their rewards.

        policy, objective = tfkern.models.load(folder), GRPO(kl=0.04)
        batches = Rollouts(policy, Prompts(rows, 16), reward, objective, max_tokens=64, samples=8,
                           reference=frozen(policy))
        for record in steps(policy, batches, objective, adamw(policy, 1e-6), stop=1000):
            print(record.step, batches.last.reward)

    A round has `minibatches` batches, and is gone through `epochs` times. When a new one begins,
    the model as it is then writes answers, in evaluation mode, and their log-probabilities under it
    and the reference, values, rewards and advantages become targets of the batches: `Answers`.

    Answers depend on the weights, the seed and the number of the round alone. So a run that goes on
    where a round begins, at a multiple of `epochs * minibatches` steps, is the run that was not
    stopped. Within a round it goes on with answers of the weights as they are then.

    Data ranks, as `parallelise` makes them, each write answers to their part of the prompts, and
    all of them together have the answers that one process would have.

    Args:
        model: what `steps` trains: a decoder with head "lm", or an `ActorCritic` if the objective
            has a critic; or the `Parallel` of it, along dp alone.
        prompts: `Prompts`, or batches by number with "prompt", lists of tokens, and columns for the
            reward. Each batch of answers has one batch of them.
        reward: `reward(prompts, answers, **columns)` -> (B,), see `Reward`.
        objective: `PPO`, `GRPO` or `RLOO`.
        max_tokens: the most tokens of an answer.
        samples: answers to each prompt.
        epochs: how often each answer is trained on.
        minibatches: of a round. Advantages are made of all of them together.
        reference: a model, such as `frozen(policy)`; or a function that makes a context in which
            the policy itself is the reference, such as one without adapters. None if the
            objective's `kl` is 0.
        missing_end: what the reward of an answer that no end token ended is less (Huang et al.
            2024).
        end_tokens: tokens that end an answer; end_token of the configuration if None.
        rows: the most answers that are written, or scored, at once; those of a batch if None.
        precision: dtype of autocast, that of `steps`.
        seed: of the draws of answers.

    Attributes:
        last: the answers of the last round; None before the first one.

    Raises:
        ValueError: arguments out of their range or that do not go together; a model that does not
            write, that has dropout or batch norm, or that is spread along other axes than dp. Also
            when a round begins, for prompts beyond the model's context and rewards of another
            number than answers, or that are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Batches,
        reward: Reward,
        objective: FromRewards,
        *,
        max_tokens: int,
        samples: int = 1,
        epochs: int = 1,
        minibatches: int = 1,
        reference: _Reference | None = None,
        missing_end: float = 0.0,
        end_tokens: Sequence[int] | None = None,
        rows: int | None = None,
        precision: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        named = {"max_tokens": max_tokens, "epochs": epochs, "minibatches": minibatches}
        for name, value in (named if rows is None else named | {"rows": rows}).items():
            check_integer(name, value, 1)
        check_integer("samples", samples, objective.samples)
        check_integer("seed", seed, 0)
        check_number("missing_end", missing_end, 0, 1e12)
        if objective.kl and reference is None:
            raise ValueError(f"kl = {objective.kl} needs a reference, got None")
        self._ranks = Parallel.of(model)
        if self._ranks.mesh is not None and self._ranks.mesh.size() != self._ranks.size("dp"):
            raise ValueError("a model that writes answers can be spread along dp only")
        module: Any = self._ranks.module
        self._module: Any = getattr(module, "_orig_mod", module)  # of a compiled model
        if isinstance(self._module, ActorCritic) != objective.critic:
            needs = "an ActorCritic" if objective.critic else "the policy alone"
            raise ValueError(
                f"{type(objective).__name__} trains {needs}, got {type(self._module).__name__}"
            )
        self._policy: Transformer = self._module.policy if objective.critic else self._module
        _check_policy(self._policy)
        check_repeats(self._module)
        self._ends = list(self._policy.config.end_tokens if end_tokens is None else end_tokens)
        if missing_end and not self._ends:
            raise ValueError(f"missing_end = {missing_end} needs an end token, and there is none")
        self.prompts, self.reward, self.objective = prompts, reward, objective
        self.reference, self.precision, self.seed = reference, precision, seed
        self.max_tokens, self.samples, self.rows = max_tokens, samples, rows
        self.epochs, self.minibatches, self.missing_end = epochs, minibatches, missing_end
        self.last: Round | None = None
        self._batches: tuple[int, list[dict[str, Any]]] = (-1, [])

    def __getitem__(self, step: int) -> dict[str, Any]:
        number, place = divmod(step, self.epochs * self.minibatches)
        # At its first step a round is made anew, since the weights may be others than before.
        if place == 0 or self._batches[0] != number:
            self._batches = (-1, [])  # so that not both rounds are in memory
            self._batches = (number, self._round(number))
        return self._batches[1][place % self.minibatches]

    @torch.no_grad()
    def _round(self, number: int) -> list[dict[str, Any]]:
        prompts: list[list[int]] = []
        written: list[list[int]] = []
        columns: dict[str, list[Any]] = {}
        sizes = []
        with evaluating(self._module, *self._references()):
            for place in range(number * self.minibatches, (number + 1) * self.minibatches):
                told = dict(self.prompts[place])
                rows = [[int(t) for t in row] for row in told.pop("prompt") for _ in self._copies]
                with self._autocast():
                    written += self._write(rows, place)
                prompts += rows
                sizes.append(len(rows))
                for name, column in told.items():
                    columns.setdefault(name, []).extend(x for x in column for _ in self._copies)
            rewards = self._rewards(prompts, written, columns)
            batch = self._padded(prompts, written)
            with self._autocast():
                old, reference, values = self._scored(batch)
        ended = torch.tensor([row[-1] in self._ends for row in written], device=self._device)
        rewards = rewards.to(old.dtype) - self.missing_end * ~ended
        answers = Answers(batch["targets"], old, reference, values, rewards, rewards, None)
        self.last = self._told(number, answers, ended)
        answers = self.objective.credited(answers, self.samples, self._total)
        return _cut(batch | {"targets": answers}, sizes)

    @property
    def _copies(self) -> range:
        return range(self.samples)

    def _references(self) -> list[nn.Module]:
        """The model that is the reference, if the policy itself is not."""
        return [self.reference] if isinstance(self.reference, nn.Module) else []

    @property
    def _device(self) -> torch.device:
        return next(self._policy.parameters()).device

    def _total(self, x: Tensor) -> Tensor:
        return self._ranks.sum(x, ROWS)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision is None:
            return nullcontext()
        return torch.autocast(self._device.type, self.precision)

    def _pieces(self, count: int) -> Iterator[slice]:
        size = self.rows or count
        return (slice(i, i + size) for i in range(0, count, size))

    def _write(self, prompts: list[list[int]], place: int) -> list[list[int]]:
        """Answers to prompts, which may be repeated, of the batch of this number."""
        first = self._before(len(prompts))
        seeds = [_seed(self.seed, place, first + row) for row in range(len(prompts))]
        sampling = Sampling(temperature=self.objective.temperature)
        found: list[list[int]] = []
        for piece in self._pieces(len(prompts)):
            answers = generate(
                self._policy, prompts[piece], self.max_tokens, sampling=sampling,
                seeds=seeds[piece], end_tokens=self._ends,
            )  # fmt: skip
            found += [row.tolist() for row in answers]
        return found

    def _before(self, count: int) -> int:
        """How many rows the data ranks before this one have, which may be unequally many in an
        evaluation. All of them tell their `count` at once."""
        counts = torch.zeros(self._ranks.data_world, device=self._device)
        counts[self._ranks.data_rank] = count
        return int(self._total(counts)[: self._ranks.data_rank].sum())

    def _rewards(
        self, prompts: list[list[int]], answers: list[list[int]], columns: dict[str, list[Any]]
    ) -> Tensor:
        found = numbers(self.reward(prompts, answers, **columns))
        if found.shape != (len(answers),):
            raise ValueError(
                f"reward must give ({len(answers)},) numbers, got the shape {tuple(found.shape)}"
            )
        if not found.isfinite().all():
            row = int((~found.isfinite()).nonzero()[0])
            raise ValueError(f"reward must be finite, got {found[row].item()} for answer {row}")
        return found.to(self._device)

    def _padded(self, prompts: list[list[int]], answers: list[list[int]]) -> dict[str, Any]:
        """Prompts with their answers, as inputs of the model, with the tokens of answers as
        targets."""
        pairs = list(zip(prompts, answers, strict=True))
        T = max(len(prompt) + len(answer) for prompt, answer in pairs) - 1
        pad = self._policy.config.pad_token or 0
        tokens = torch.full((len(pairs), T), pad)
        targets = torch.full((len(pairs), T), IGNORED)
        for row, (prompt, answer) in enumerate(pairs):
            text = torch.tensor([*prompt, *answer])
            tokens[row, : len(text) - 1] = text[:-1]
            targets[row, len(prompt) - 1 : len(text) - 1] = text[len(prompt) :]
        lengths = torch.tensor([len(prompt) + len(answer) - 1 for prompt, answer in pairs])
        batch = {"tokens": tokens, "mask": lengths, "targets": targets}
        return {name: x.to(self._device) for name, x in batch.items()}

    def _scored(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities under the policy and the reference, and values."""
        olds, references, values = [], [], []
        with evaluating(self._module, *self._references(), deferred=True):
            for piece in self._pieces(len(batch["tokens"])):
                tokens, mask, targets = (batch[name][piece] for name in _INPUTS)
                output = self._module(tokens, mask=mask)
                logits, value = output if self.objective.critic else (output, None)
                olds.append(tempered_log_probs(logits, targets, self.objective.temperature))
                if value is not None:
                    values.append(torch.where(targets != IGNORED, value, 0).to(olds[-1].dtype))
                if self.reference is not None:
                    logits = self._by_reference(tokens, mask)
                    references.append(
                        tempered_log_probs(logits, targets, self.objective.temperature)
                    )
        old = torch.cat(olds)
        reference = torch.cat(references) if references else None
        return old, reference, torch.cat(values) if values else None

    def _by_reference(self, tokens: Tensor, mask: Tensor) -> Any:
        if isinstance(self.reference, nn.Module):
            return self.reference(tokens, mask=mask)
        assert self.reference is not None
        with self.reference():
            return self._policy(tokens, mask=mask)

    def _told(self, number: int, answers: Answers, ended: Tensor) -> Round:
        kl = torch.zeros_like(answers.rewards)
        if answers.reference is not None:
            kl = (answers.old - answers.reference).sum(1)
        each = (torch.ones_like(kl), answers.rewards, kl, ended, answers.exist.sum(1))
        count, *sums = self._total(torch.stack([x.double().sum() for x in each])).tolist()
        reward, divergence, share, length = (x / count for x in sums)
        known = None if answers.reference is None else divergence
        return Round(number, reward, known, share, length)


_INPUTS = ("tokens", "mask", "targets")


def _cut(batch: dict[str, Any], sizes: list[int]) -> list[dict[str, Any]]:
    """The batches of a round, each as wide as its longest row."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    found = []
    for start, size in zip(starts, sizes, strict=True):
        mine = slice(start, start + size)
        T = int(batch["mask"][mine].max())

        def part(x: Tensor, mine: slice = mine, T: int = T) -> Tensor:
            return x[mine, :T] if x.dim() == 2 else x[mine]

        pieces: Any = (None if x is None else part(x) for x in batch["targets"])
        answers = Answers(*pieces)
        inputs = {name: part(batch[name]) for name in ("tokens", "mask")}
        found.append(inputs | {"targets": answers})
    return found


def _check_policy(policy: Any) -> None:
    if not isinstance(policy, Transformer):
        raise ValueError(f"a policy must be a Transformer, got {type(policy).__name__}")
    config = policy.config
    if (config.architecture, config.head) != ("decoder", "lm"):
        raise ValueError(
            f"a policy must be a decoder with head 'lm', got an {config.architecture} with "
            f"{config.head!r}"
        )
    if config.forced_first is not None or config.forced_last is not None:
        raise ValueError("a policy must draw all tokens, and this configuration forces some")


def _seed(seed: int, place: int, row: int) -> int:
    digest = hashlib.blake2b(f"{seed} {place} {row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
