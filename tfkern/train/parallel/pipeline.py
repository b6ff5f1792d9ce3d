"""Pipelines: a model in stages, through which the parts of a batch go one after the other.

Each process has one stage. The stages run on `torch.distributed.pipelining`, by one of two
schedules: all parts forward and then all backward (GPipe, Huang et al. 2019), or each part backward
as soon as it can be (1F1B, Narayanan et al. 2019), which keeps the activations of no more parts in
memory than there are stages.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from tfkern.models import Transformer
from tfkern.models.embedding import length
from tfkern.models.heads import ends
from tfkern.models.positions import RelativeBias
from tfkern.models.stack import Stack
from tfkern.models.transformer import count_positions
from tfkern.train.objective import Batch
from tfkern.train.parallel.context import check_rows
from tfkern.train.parallel.gradients import local
from tfkern.train.parallel.model import Measure, Parallel, Share
from tfkern.train.parallel.together import gathered

SCHEDULES: dict[str, Any] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


class Stage(nn.Module):
    """The part of a transformer that one process of a pipeline has.

    Blocks are spread evenly, those of an encoder before those of a decoder. The first stage has the
    embedding, the last one the head. A parameter that several stages need is in each of them: the
    table of tied embeddings, that of an encoder-decoder also where its decoder begins, and relative
    positions.

    Args:
        model: loses all modules that belong to other stages. Those that are left keep their names.
        index, count: the number of this stage, and how many there are.
        dtype: of the streams between stages; that of the parameters if None.

    Raises:
        ValueError: more stages than blocks, or a head that needs several rows for an item.
    """

    def __init__(
        self, model: Transformer, index: int, count: int, dtype: torch.dtype | None = None
    ) -> None:
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
        # The stack that reads `tokens` begins in one of the stages.
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
        self.dtype = next(model.parameters()).dtype if dtype is None else dtype

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
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        **others: Any,
    ) -> Any:
        """The streams for the next stage, or from the last one what the model returns.

        Args:
            streams: what the stage before returned: the residual stream, in an encoder-decoder that
                of the encoder, or where the decoder has begun its own and the encoder's output.
            measure: makes of what the model returns, and of `others`, what the last stage returns
                in its place.
            autocast: makes the context of all that is computed.
        """
        model = self.model
        model.check_inputs(source, source_mask, documents)
        if positions is None:
            positions = count_positions(model.config, tokens, mask, documents)
        options: Any = {
            "mask": mask, "token_types": token_types, "positions": positions,
            "documents": documents,
        }  # fmt: skip
        with autocast():
            if source is not None:
                memory = source if self.first else streams[-1]
                if self.encodes:
                    places = count_positions(model.config, source, source_mask)
                    memory = model.encode(memory, source_mask, positions=places)
                if not self.decodes:
                    return (memory.to(self.dtype),)
                options |= {"memory": memory, "memory_mask": source_mask}
            run = model.encode if model.decoder is None else model.decode
            y = run(tokens if self.begins else streams[0], **options)
            if not self.last:
                streams = (y,) if source is None else (y, memory)
                return tuple(stream.to(self.dtype) for stream in streams)
            if model.decoder is not None and model.config.head.endswith("classification"):
                mask = ends(model.config, tokens, source, mask)
            output = model.project(y, mask)
            return output if measure is None else measure(output, others)


def _by_row(batch: Batch) -> dict[str, Any]:
    """A batch with positions for each row, which may be one row for all, as torch cuts all tensors
    of a batch alike."""
    found = dict(batch)
    if (positions := batch.get("positions")) is not None and len(positions) == 1:
        found["positions"] = positions.expand(len(batch["tokens"]), -1)
    return found


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


class Pipeline(Parallel):
    """A model whose stages are on different processes, and the schedule by which they work.

    A batch is cut into equal parts, the microbatches. What the model returns is in the last stage
    alone, and numbers that are computed from it, such as losses, are in all of them.

    Args:
        stage: what this process has of the model.
        mesh: see `parallelise`.
        schedule: "gpipe" or "1f1b".
        microbatches: how many; twice as many as stages if None.

    Raises:
        ValueError: an unknown schedule, or fewer microbatches than 1F1B needs.
    """

    stage: Stage

    def __init__(
        self,
        stage: Stage,
        mesh: DeviceMesh,
        *,
        schedule: str = "1f1b",
        microbatches: int | None = None,
    ) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
        super().__init__(stage.model, mesh, stage)
        self.__dict__["stage"] = stage  # its model is the module of this one already
        self.group, self.schedule = mesh.get_group("pp"), schedule
        self.index, self.count = mesh.get_local_rank("pp"), self.size("pp")
        self.microbatches = 2 * self.count if microbatches is None else microbatches
        least = self.count if schedule == "1f1b" else 1
        if self.microbatches < least:
            raise ValueError(
                f"microbatches must be at least {least} with {self.count} stages and the schedule "
                f"{schedule}, got {self.microbatches}"
            )
        self._made: dict[bool, tuple[Any, Any]] = {}
        self.device = next(stage.parameters()).device
        self._find_shared()

    def forward(self, **inputs: Any) -> Any:
        """As the model's in the last stage, and None in the others. All of them have to call it."""
        parts = self._parts(inputs)
        return self._schedule(inputs, parts, False).step(**_by_row(inputs))

    def backward(
        self, part: Batch, share: Share, scale: Callable[[Tensor], Tensor], last: bool
    ) -> Tensor:
        """As `Parallel.backward`.

        Raises:
            ValueError: a part of the batch that cannot be cut into equal microbatches.
        """
        rows, count = len(part["tokens"]), self.microbatches
        if rows % count:
            raise ValueError(f"{rows} rows cannot be cut into {count} equal microbatches")
        scale(torch.ones((), device=self.device))  # a scaler is set up by its first use
        self._scale = scale
        terms = self._run(part, share, share.autocast, count, True)
        if last:
            self._reduce()
        return terms

    @torch.no_grad()
    def measure(
        self, batch: Batch, measure: Measure, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> Tensor:
        """As `Parallel.measure`. A batch that cannot be cut into equal parts is not cut."""
        return self._run(batch, measure, autocast, self._parts(batch), False)

    def _parts(self, batch: Batch) -> int:
        return 1 if len(batch["tokens"]) % self.microbatches else self.microbatches

    def _run(
        self,
        batch: Batch,
        measure: Measure,
        autocast: Callable[[], AbstractContextManager[Any]],
        parts: int,
        backward: bool,
    ) -> Tensor:
        """The sum over all parts of what `measure` finds; gradients if it makes terms of a loss."""
        schedule, batch = self._schedule(batch, parts, backward), _by_row(batch)
        # torch wants targets for a loss, and the last stage knows them already.
        target = torch.zeros(parts) if backward else None
        try:
            found = schedule.step(
                target=target, measure=measure, autocast=autocast, **_by_row(batch)
            )
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

    def _reduce(self) -> None:
        """Sums the gradients of parameters that several stages have over these stages."""
        for p, group in self._shared:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            distributed.all_reduce(local(p.grad), group=group)

    def _loss(self, terms: Tensor, targets: Tensor) -> Tensor:
        return self._scale(terms.sum() * self.averaged)

    def _schedule(self, batch: Batch, parts: int, backward: bool) -> Any:
        """The schedule for batches like this one: torch's have buffers of the streams' shape."""
        check_rows(self.stage.model, batch)
        shapes = [(name, batch[name].shape) for name in ("tokens", "source") if name in batch]
        known, made = self._made.get(backward, (None, None))
        if known != (shapes, parts):
            stage = PipelineStage(
                self._terms, self.index, self.count, self.device,
                input_args=self._streams(batch, parts, self.index),
                output_args=self._streams(batch, parts, self.index + 1),
                group=self.group,
            )  # fmt: skip
            kind = SCHEDULES[self.schedule] if backward else ScheduleGPipe
            made = kind(stage, parts, loss_fn=self._loss if backward else None, scale_grads=False)
            self._made[backward] = ((shapes, parts), made)
        return made

    def _streams(self, batch: Batch, parts: int, index: int) -> tuple[Tensor, ...]:
        """Tensors without memory like those that the stage with this index takes."""
        if index == self.count:  # at most two results of a model, which torch sends nowhere
            return (torch.empty(0, device="meta"),) * 2
        config, rows = self.stage.model.config, len(batch["tokens"]) // parts
        tokens = self.stage.streams(index)
        return tuple(
            torch.empty(
                rows, length(config, batch[name]), config.dim, dtype=self.stage.dtype,
                device="meta",
                requires_grad=True,
            )
            for name in tokens
        )  # fmt: skip

    def _find_shared(self) -> None:
        """Finds the parameters that other stages have, too, and groups of these stages."""
        parameters = dict(self.stage.named_parameters())
        names = gathered(list(parameters), self.group)
        groups: dict[tuple[int, ...], Any] = {tuple(range(self.count)): self.group}
        self._shared: list[tuple[nn.Parameter, ProcessGroup]] = []
        borrowed = set()
        for name in sorted(parameters):
            if not parameters[name].requires_grad:
                continue
            stages = tuple(i for i in range(self.count) if name in names[i])
            if len(stages) == 1:
                continue
            if stages not in groups:
                ranks = [distributed.get_global_rank(self.group, i) for i in stages]
                groups[stages] = distributed.new_group(ranks, use_local_synchronization=True)
            self._shared.append((parameters[name], groups[stages]))
            if stages[0] != self.index:
                borrowed.add(parameters[name])
        self.borrowed = frozenset(borrowed)
