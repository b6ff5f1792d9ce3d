"""Which meshes a model fits on, what each process then holds and sends, and the time of a step.

Nothing is run: parameters are counted on a model without memory, activations by what the blocks of
`tfkern.models` keep for backward. Rates and memory of the machines are given.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.distributed.tensor import Shard

from tfkern.models import Transformer, TransformerConfig
from tfkern.models.embedding import rows
from tfkern.ops.flops import visible_pairs
from tfkern.train.parallel import tensor
from tfkern.train.parallel.mesh import AXES, conflict

STATES = {"adamw": 2, "lion": 1}  # float32 numbers that an optimiser keeps of each parameter
SIZES = {"float32": 4, "bfloat16": 2}  # bytes
MACHINE = 8  # processes of a machine, between which links are fast


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is trained, and on what.

    Attributes:
        config: of a model with one stack of blocks and a head for each token.
        length: tokens of a row.
        batch: rows of a batch, of all processes together.
        precision: "float32" or "bfloat16", in which blocks compute. Weights, their gradients, the
            optimiser and the residual stream are float32.
        optimiser: one of `STATES`.
        recompute: whether only the inputs of blocks are kept.
        flops: operations a second of a process.
        inside, between: bytes a second that a process sends within a machine and to others.

    A pipeline has micro-batches of one row by the schedule 1f1b, and the loss makes the logits in
    pieces. What operators need while they run does not count.

    Raises:
        ValueError: a value out of its range, or a model of another kind.
    """

    config: TransformerConfig
    length: int
    batch: int
    precision: str = "bfloat16"
    optimiser: str = "adamw"
    recompute: bool = False
    flops: float = 400e12
    inside: float = 450e9
    between: float = 50e9

    def __post_init__(self) -> None:
        for name in ("length", "batch", "flops", "inside", "between"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name, choices in (("precision", SIZES), ("optimiser", STATES)):
            if getattr(self, name) not in choices:
                told = f"expected one of {', '.join(choices)}"
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: {told}")
        c = self.config
        if c.architecture == "encoder_decoder" or c.vocab_size is None or c.head != "lm":
            raise ValueError(f"plans are for language models of one stack, got head {c.head!r}")
        if c.norm not in ("layer_norm", "rms_norm") or c.post_norm or c.parallel or c.int8:
            raise ValueError(
                f"plans are for norm layer_norm or rms_norm before sublayers, got {c.norm}"
            )
        if c.norm_place != "before" or c.query_key_norm != "none":
            raise ValueError("plans are for blocks without norms of outputs and of queries")
        if c.positions == "learned" and c.max_length is not None and self.length > c.max_length:
            raise ValueError(f"length {self.length} is above max_length {c.max_length}")


class Weight(NamedTuple):
    """A parameter: its block (None outside of blocks), name, shape, and the axis that tp cuts."""

    block: int | None
    name: str
    shape: tuple[int, ...]
    axis: int | None


@dataclass(frozen=True)
class Plan:
    """A mesh, and what it costs.

    Attributes:
        sizes: of the mesh, by axis.
        memory: bytes of the process that holds most, by what they are.
        sent: bytes that a process sends in a step, by axis.
        seconds: of a step at least: arithmetic with the bubble of a pipeline or the traffic of dp
            and fsdp, which runs beside it, and the traffic of tp, cp and pp, which does not.
    """

    sizes: dict[str, int]
    memory: dict[str, int]
    sent: dict[str, float]
    seconds: float = field(default=0.0)

    @property
    def total(self) -> int:
        return sum(self.memory.values())


def weights(config: TransformerConfig) -> list[Weight]:
    """The parameters of a model, each once."""
    with torch.device("meta"):
        model = Transformer(config)
    names = {p: name for name, p in model.named_parameters()}  # a tied one under its first name
    found = {}
    for layer, name, placement, _ in tensor.placed(model):
        p = layer._parameters[name]
        if p is None or p in found:
            continue
        number = re.match(r"(?:encoder|decoder)\.blocks\.(\d+)\.", names[p])
        axis = placement.dim if isinstance(placement, Shard) else None
        # A bias of a layer whose inputs are cut is whole on all ranks.
        found[p] = Weight(int(number[1]) if number else None, names[p], tuple(p.shape), axis)
    return list(found.values())


def plan(work: Work, sizes: dict[str, int], counted: list[Weight] | None = None) -> Plan:
    """What a mesh costs.

    Args:
        sizes: of the mesh, by axis; 1 where absent.
        counted: `weights(work.config)`, if known.

    Raises:
        ValueError: a mesh on which the model or the batch cannot be cut into equal parts.
    """
    sizes = {axis: sizes.get(axis, 1) for axis in AXES}
    if (problem := why_not(work, sizes)) is not None:
        raise ValueError(problem)
    counted = weights(work.config) if counted is None else counted
    stages = [stage_memory(work, sizes, counted, stage) for stage in range(sizes["pp"])]
    memory, held = max(stages, key=lambda found: sum(found[0].values()))
    sent = _sent(work, sizes, max(stages, key=lambda found: sum(found[1]))[1])
    return Plan(sizes, memory, sent, _seconds(work, sizes, sent))


def plans(work: Work, gpus: int, memory: float) -> list[Plan]:
    """The meshes of so many processes on which the model fits, the fastest first.

    Args:
        memory: bytes of a process.

    Raises:
        ValueError: there is none. It tells the least memory that a mesh needs.
    """
    counted = weights(work.config)
    found = [plan(work, s, counted) for s in meshes(gpus) if why_not(work, s) is None]
    if not found:
        raise ValueError(f"batch {work.batch} and the model have no equal parts for {gpus} ranks")
    fits = [p for p in found if p.total <= memory]
    if not fits:
        least = min(found, key=lambda p: p.total)
        raise ValueError(
            f"no mesh of {gpus} ranks fits: the least, {shown(least.sizes)}, needs "
            f"{least.total / 1e9:.1f} GB a rank"
        )
    return sorted(fits, key=lambda p: (p.seconds, p.total))


def shown(sizes: dict[str, int]) -> str:
    """A mesh as `tfkern train` takes it, without axes of size 1."""
    return " ".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1) or "dp=1"


def meshes(gpus: int) -> Iterator[dict[str, int]]:
    """All sizes of meshes of so many processes."""
    divisors = [n for n in range(1, gpus + 1) if gpus % n == 0]

    def fill(left: int, axes: tuple[str, ...]) -> Iterator[dict[str, int]]:
        if len(axes) == 1:
            yield {axes[0]: left}
            return
        for n in divisors:
            if left % n == 0:
                for rest in fill(left // n, axes[1:]):
                    yield {axes[0]: n} | rest

    return fill(gpus, AXES)


def why_not(work: Work, sizes: dict[str, int]) -> str | None:
    """Why a mesh does not serve, or None."""
    c, tp, data = work.config, sizes["tp"], sizes["dp"] * sizes["fsdp"]
    if work.batch % data:
        return f"batch {work.batch} has no {data} equal parts"
    if tp > MACHINE:
        return f"tp {tp} is more than a machine has, which are {MACHINE}"
    if tp > 1 and (reason := tensor.why_not(c, tp)) is not None:
        return reason
    if sizes["pp"] > c.layers:
        return f"pp {sizes['pp']} is more than the {c.layers} blocks"
    if (reason := conflict(sizes)) is not None:
        return reason
    if work.length % (2 * sizes["cp"]) and sizes["cp"] > 1:
        return f"length {work.length} must be a multiple of 2 cp = {2 * sizes['cp']}"
    return None


def stage_memory(
    work: Work, sizes: dict[str, int], counted: list[Weight], stage: int
) -> tuple[dict[str, int], tuple[int, int]]:
    """The bytes that a rank of a stage of the pipeline holds, by what they are, and how many
    parameters it has in and outside of blocks before fsdp cuts them.
    """
    c, tp, pp = work.config, sizes["tp"], sizes["pp"]
    shards = sizes["fsdp"] * sizes["cp"] if sizes["fsdp"] > 1 else 1
    own = torch.arange(c.layers).tensor_split(pp)[stage].tolist()
    held = {True: 0, False: 0}
    parameters = 0
    for w in counted:
        first = w.name.startswith("embedding") or ".positions" in w.name
        tied = w.name == "embedding.weight" and c.tie_embeddings
        last = w.block is None and (tied or not first)
        if w.block not in own and not (
            w.block is None and (first and stage == 0 or last and stage == pp - 1)
        ):
            continue
        shape = [-(-n // tp) if axis == w.axis else n for axis, n in enumerate(w.shape)]
        held[w.block is not None] += math.prod(shape)
        parameters += -(-shape[0] // shards) * math.prod(shape[1:])
    b, rows_here = SIZES[work.precision], work.batch // (sizes["dp"] * sizes["fsdp"])
    gathered = 0
    if shards > 1:  # two blocks, since the next one is gathered while one runs, and what is outside
        gathered = b * (held[False] + 2 * held[True] // max(1, len(own)))
    # A pipeline keeps the rows of as many micro-batches as there are stages from here on.
    kept = min(rows_here, pp - stage) if pp > 1 else rows_here
    each = block_bytes(work, tp)
    here = work.length // sizes["cp"] * kept
    activations = here * len(own) * each
    if work.recompute:
        activations = here * (len(own) * (4 + b) * c.dim // tp) + work.length // sizes[
            "cp"
        ] * each * (1 if pp > 1 else rows_here)
    if stage == pp - 1:  # the last norm, its output, and the gradient of that by the loss in pieces
        activations += here * (4 * c.dim // tp + 2 * b * c.dim)
    memory = {
        "parameters": 4 * parameters,
        "gradients": 4 * parameters,
        "optimiser": 4 * parameters * STATES[work.optimiser],
        "gathered": gathered,
        "activations": activations,
    }
    return memory, (held[True], held[False])


def block_bytes(work: Work, tp: int = 1) -> int:
    """What a block keeps of a token for backward."""
    c, b = work.config, SIZES[work.precision]
    q = c.heads * c.head_size
    kv = (c.kv_heads or c.heads) * c.head_size
    turned, grouped = c.positions == "rotary", q != kv
    # v is a view of the product that makes q, k and v, and keeps all of it. Rotation makes new
    # queries and keys, whose order of axes the result of attention has, so that it is copied.
    projected = q + 2 * kv + (q + kv if turned else q if grouped else 0)
    heads = projected + q + (q if turned else 0)
    numbers = 1 if c.norm == "rms_norm" else 2
    stream = 2 * 4 * (c.dim + numbers) // tp  # of both norms
    inputs = 2 * b * c.dim  # of both sublayers, gathered by tp
    hidden = c.hidden_size * (2 if c.gated else 1)
    return stream + inputs + (b * (heads + hidden) + 2 * 4 * c.heads) // tp


def flops(work: Work, tile: tuple[int, int] = (128, 64)) -> int:
    """The arithmetic of a step of all processes: products, and attention by the tiles it visits.

    Args:
        tile: queries and keys of a tile of the kernel of attention.
    """
    c, tokens = work.config, work.batch * work.length
    q = c.heads * c.head_size
    kv = (c.kv_heads or c.heads) * c.head_size
    block = c.dim * (2 * q + 2 * kv) + c.dim * c.hidden_size * (3 if c.gated else 2)
    head = rows(c) * (c.embedding_dim or c.dim)
    narrow = 2 * c.dim * c.embedding_dim if c.embedding_dim is not None else 0
    causal = c.architecture == "decoder"
    pairs = 0
    for window in c.windows if causal else (None,) * c.layers:
        band = (None if window is None else window - 1, 0 if causal else None)
        pairs += visible_pairs(work.length, work.length, band, tile)
    forward = 2 * tokens * c.layers * block + 4 * work.batch * q * pairs
    # Backward makes two products for each of forward, and five for the two of attention.
    backward = 4 * tokens * c.layers * block + 10 * work.batch * q * pairs
    # Recomputing ends with what backward needs last: the output layer of an MLP has no part in it.
    output = 2 * tokens * c.layers * c.dim * c.hidden_size
    again = forward - output if work.recompute else 0
    return forward + again + backward + 6 * tokens * (head + narrow)


def _sent(work: Work, sizes: dict[str, int], held: tuple[int, int]) -> dict[str, float]:
    """Bytes that a process sends in a step, by axis. Sums and gathers go around a ring."""
    c, b = work.config, SIZES[work.precision]
    rows_here = work.batch // (sizes["dp"] * sizes["fsdp"])
    tokens = rows_here * work.length // sizes["cp"]
    dp, fsdp, cp, tp, pp = (sizes[axis] for axis in ("dp", "fsdp", "cp", "tp", "pp"))
    layers, again = math.ceil(c.layers / pp), int(work.recompute)
    sent = dict.fromkeys(AXES, 0.0)
    if fsdp > 1:
        n = fsdp * cp
        times = rows_here if pp > 1 else 1  # a pipeline gathers for each of its micro-batches
        gathers = times * (2 * held[0] + held[1])
        sent["fsdp"] = (b * gathers + 4 * sum(held)) * (n - 1) / n
        sent["dp"] = 2 * (dp - 1) / dp * 4 * sum(held) / n
    else:
        n = dp * cp
        sent["dp"] = 2 * (n - 1) / n * 4 * sum(held)
    stream = b * tokens * c.dim
    if tp > 1:  # two gathers and two sums cut along T in forward, and as many in backward
        ends = 6  # two gathers, and the sums of what is embedded and of the gradient of the head
        sent["tp"] = (layers * (8 + 3 * again) + ends) * (tp - 1) / tp * stream
    q = c.heads * c.head_size
    kv = (c.kv_heads or c.heads) * c.head_size
    if cp > 1 and (c.kv_heads or c.heads) % cp == 0:  # by heads
        each = (2 + again) * b * (2 * q + 2 * kv) + (1 + again) * 4 * c.heads  # lse has no gradient
        sent["cp"] = layers * (cp - 1) / cp * tokens * each
    elif cp > 1:  # around a ring, with gradients in float32
        X = tokens * 2 * kv * b
        sent["cp"] = layers * ((2 + again) * (cp - 1) * X + cp * tokens * 2 * kv * 4)
    if pp > 1:  # the stream to the next stage, its gradient to the one before, and a tied table's
        table = 4 * rows(c) * (c.embedding_dim or c.dim) / tp if c.tie_embeddings else 0
        sent["pp"] = (1 if pp == 2 else 2) * stream + table
    return sent


def _seconds(work: Work, sizes: dict[str, int], sent: dict[str, float]) -> float:
    rows_here = work.batch // (sizes["dp"] * sizes["fsdp"])
    arithmetic = flops(work) / math.prod(sizes.values()) / work.flops
    arithmetic *= (rows_here + sizes["pp"] - 1) / rows_here  # stages wait at both ends
    times, span = {}, 1
    for axis in reversed(AXES):
        span *= sizes[axis]
        times[axis] = sent[axis] / (work.inside if span <= MACHINE else work.between)
    return max(arithmetic, times["dp"] + times["fsdp"]) + sum(times[a] for a in ("tp", "cp", "pp"))
