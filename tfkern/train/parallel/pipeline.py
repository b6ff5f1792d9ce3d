"""Pipelines: a model in stages, through which the parts of a batch go one after the other.

Each process has one stage. The stages run on `torch.distributed.pipelining`, by one of two
schedules: all parts forward and then all backward (GPipe, Huang et al. 2019), or each part backward
as soon as it can be (1F1B, Narayanan et al. 2019), which keeps the activations of no more parts in
memory than there are stages.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor

from tfkern.models import Transformer
from tfkern.models.embedding import length
from tfkern.models.heads import ends
from tfkern.models.positions import RelativeBias
from tfkern.models.stack import Stack
from tfkern.models.transformer import count_positions

SCHEDULES: dict[str, Any] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}

Measure = Callable[[Any, Mapping[str, Any]], Tensor]


class Stage(nn.Module):
    """The part of a transformer that one process of a pipeline has.

    Blocks are spread evenly, those of an encoder before those of a decoder. The first stage has the
    embedding, the last one the head. A parameter that several stages need is in each of them: the
    table of tied embeddings, that of an encoder-decoder also where its decoder begins, and relative
    positions.

    Args:
        model: loses all modules that belong to other stages. Those that are left keep their names.
        index, count: the number of this stage, and how many there are.

    Raises:
        ValueError: more stages than blocks, or a head that needs several rows for an item.
    """

    def __init__(self, model: Transformer, index: int, count: int) -> None:
        super().__init__()
        if model.config.head == "choice":
            raise ValueError("head 'choice' has several rows for an item: it takes no pipeline")
        encoder, decoder = model.encoder, model.decoder
        of_encoder = 0 if encoder is None else len(encoder.blocks)
        of_decoder = 0 if decoder is None else len(decoder.blocks)
        if of_encoder + of_decoder < count:
            raise ValueError(
                f"a pipeline of {count} stages needs as many blocks, and the model has "
                f"{of_encoder + of_decoder}"
            )
        parts = torch.arange(of_encoder + of_decoder).tensor_split(count)
        own = parts[index].tolist()
        self._starts = [int(part[0]) for part in parts]
        self.first, self.last = index == 0, index == count - 1
        self.encodes, self.decodes = own[0] < of_encoder, own[-1] >= of_encoder
        self._of_encoder = of_encoder
        # Whether the stack that reads `tokens` begins here.
        self.begins = of_encoder in own if decoder is not None else self.first
        if encoder is not None:
            _keep(encoder, [number for number in own if number < of_encoder])
        if decoder is not None:
            _keep(decoder, [number - of_encoder for number in own if number >= of_encoder])
        if not self.last:
            model.vocabulary = model.pooler = model.narrow = model.classifier = None
        if not (self.first or self.begins):
            tied = model.config.tie_embeddings and model.vocabulary is not None
            if tied:
                model.embedding.widen = None  # the head reads the table alone
            else:
                model.embedding = None
        self.model = model

    def streams(self, index: int) -> tuple[str, ...]:
        """The inputs of the model that have the lengths of the streams into a stage."""
        if index == 0:
            return ()
        if self.model.encoder is None or self.model.decoder is None:
            return ("tokens",)
        return ("source",) if self._starts[index] <= self._of_encoder else ("tokens", "source")

    def forward(
        self,
        *streams: Tensor,
        tokens: Tensor,
        source: Tensor | None = None,
        mask: Tensor | None = None,
        source_mask: Tensor | None = None,
        token_types: Tensor | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        measure: Measure | None = None,
        **others: Any,
    ) -> Any:
        """The streams for the next stage, or from the last one what the model returns.

        Args:
            streams: what the stage before returned: the residual stream, in an encoder-decoder that
                of the encoder, or where the decoder has begun its own and the encoder's output.
            measure: makes of what the model returns, and of `others`, what the last stage returns
                in its place.
        """
        model = self.model
        model.check_inputs(source, source_mask, documents)
        if positions is None:
            positions = count_positions(model.config, tokens, mask, documents)
        options: Any = {
            "mask": mask, "token_types": token_types, "positions": positions,
            "documents": documents,
        }  # fmt: skip
        if source is not None:
            memory = source if self.first else streams[-1]
            if self.encodes:
                places = count_positions(model.config, source, source_mask)
                memory = model.encode(memory, source_mask, positions=places)
            if not self.decodes:
                return (memory,)
            options |= {"memory": memory, "memory_mask": source_mask}
        run = model.encode if model.decoder is None else model.decode
        y = run(tokens if self.begins else streams[0], **options)
        streams = (y,) if source is None else (y, memory)
        if not self.last:
            return streams
        if model.decoder is not None and model.config.head.endswith("classification"):
            mask = ends(model.config, tokens, source, mask)
        output = model.project(streams[0], mask)
        return output if measure is None else measure(output, others)


def _keep(stack: Stack, own: list[int]) -> None:
    """Takes from a stack all but its own blocks, and what stands in front of or behind others."""
    count = len(stack.blocks)
    for i in set(range(count)) - set(own):
        stack.blocks[i] = None  # type: ignore[assignment]
    if 0 not in own:
        stack.token_types = stack.embedding_norm = None
        if not own or not isinstance(stack.positions, RelativeBias):
            stack.positions = None
    if count - 1 not in own:
        stack.norm = None


class Pipeline:
    """A stage, and the schedule by which it works with those of other processes.

    Args:
        stage: what this process has; `module` may be it, or DDP or FSDP around it.
        group: the processes with the stages, in their order.
        schedule: "gpipe" or "1f1b".
        microbatches: into how many parts a batch is cut.

    Attributes:
        shared: parameters that other stages have, too, each with the group of these processes.
        borrowed: those of them that an earlier stage has, which is where they are counted.

    Raises:
        ValueError: an unknown schedule, or fewer parts than 1F1B needs.
    """

    def __init__(
        self,
        stage: Stage,
        module: nn.Module,
        group: ProcessGroup,
        *,
        schedule: str = "1f1b",
        microbatches: int | None = None,
    ) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
        self.stage, self.module, self.group = stage, module, group
        self.index, self.count = distributed.get_rank(group), distributed.get_world_size(group)
        self.schedule = schedule
        self.microbatches = 2 * self.count if microbatches is None else microbatches
        least = self.count if schedule == "1f1b" else 1
        if self.microbatches < least:
            raise ValueError(
                f"microbatches must be at least {least} with {self.count} stages and the schedule "
                f"{schedule}, got {self.microbatches}"
            )
        self._made: dict[bool, tuple[Any, Any]] = {}
        parameter = next(stage.parameters())
        self.dtype, self.device = parameter.dtype, parameter.device
        self.shared, self.borrowed = self._find_shared()

    def train(self, batch: Mapping[str, Any], measure: Measure) -> Tensor:
        """Adds the gradients of a batch to those of the stage's parameters, and returns the terms
        of the loss, whose sum the gradients are of, in all processes.

        Gradients of `shared` have to be summed by `reduce` once all batches of a step are done.

        Args:
            batch: "tokens" and whatever else the model takes, and what `measure` needs.
            measure: takes what the model returns and the rest of a part of the batch, and returns
                (terms,), the part's share of each term.

        Raises:
            ValueError: a batch that cannot be cut into parts of equal size.
        """
        rows = len(batch["tokens"])
        if rows % self.microbatches:
            raise ValueError(
                f"a batch of {rows} rows cannot be cut into {self.microbatches} equal microbatches"
            )
        return self._run(batch, measure, self.microbatches, True)

    def evaluate(self, batch: Mapping[str, Any], measure: Measure) -> Tensor:
        """The sum of what `measure`, see `train`, finds for the parts of a batch."""
        rows = len(batch["tokens"])
        with torch.no_grad():
            return self._run(
                batch, measure, self.microbatches if rows % self.microbatches == 0 else 1, False
            )

    def reduce(self) -> None:
        """Sums the gradients of parameters that several stages have over these stages."""
        for p, group in self.shared:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            local = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            distributed.all_reduce(local, group=group)

    def _run(
        self, batch: Mapping[str, Any], measure: Measure, parts: int, training: bool
    ) -> Tensor:
        schedule = self._schedule(batch, parts, training)
        # torch wants targets for a loss, which the last stage returns by itself.
        target = torch.zeros(parts) if training else None
        try:
            found = schedule.step(target=target, measure=measure, **batch)
        except RuntimeError as error:
            if error.__cause__ is None:
                raise
            raise error.__cause__ from None  # torch wraps it into a text on its stage
        told = [None]
        if self.stage.last:
            told = [found.detach().double().unflatten(0, (parts, -1)).sum(0).tolist()]
        last = distributed.get_global_rank(self.group, self.count - 1)
        distributed.broadcast_object_list(told, last, self.group)
        return torch.tensor(told[0], dtype=torch.float64, device=self.device)

    def _schedule(self, batch: Mapping[str, Any], parts: int, training: bool) -> Any:
        """The schedule for batches of the size of this one: buffers of messages have its shape."""
        shapes = {name: batch[name].shape for name in ("tokens", "source") if name in batch}
        key = (shapes, parts)
        known, made = self._made.get(training, (None, None))
        if known == key:
            return made
        stage = PipelineStage(
            self.module, self.index, self.count, self.device,
            input_args=self._streams(batch, parts, self.index),
            output_args=self._streams(batch, parts, self.index + 1),
            group=self.group,
        )  # fmt: skip
        kind = SCHEDULES[self.schedule] if training else ScheduleGPipe
        loss = (lambda terms, target: terms.sum()) if training else None
        made = kind(stage, parts, loss_fn=loss, scale_grads=False)
        self._made[training] = (key, made)
        return made

    def _streams(self, batch: Mapping[str, Any], parts: int, index: int) -> tuple[Tensor, ...]:
        """Tensors without memory like those that the stage with this index takes."""
        if index == self.count:  # at most two results of a model, which torch sends nowhere
            return (torch.empty(0, device="meta"),) * 2
        config, rows = self.stage.model.config, len(batch["tokens"]) // parts
        tokens = self.stage.streams(index)
        return tuple(
            torch.empty(
                rows, length(config, batch[name]), config.dim, dtype=self.dtype, device="meta",
                requires_grad=True,
            )
            for name in tokens
        )  # fmt: skip

    def _find_shared(self) -> tuple[list[tuple[nn.Parameter, ProcessGroup]], set[nn.Parameter]]:
        parameters = dict(self.stage.named_parameters())
        names: list[Any] = [None] * self.count
        distributed.all_gather_object(names, list(parameters), self.group)
        groups: dict[tuple[int, ...], Any] = {tuple(range(self.count)): self.group}
        shared, borrowed = [], set()
        for name in sorted(parameters):
            stages = tuple(i for i in range(self.count) if name in names[i])
            if len(stages) == 1:
                continue
            if stages not in groups:
                ranks = [distributed.get_global_rank(self.group, i) for i in stages]
                groups[stages] = distributed.new_group(ranks, use_local_synchronization=True)
            shared.append((parameters[name], groups[stages]))
            if stages[0] != self.index:
                borrowed.add(parameters[name])
        return shared, borrowed
