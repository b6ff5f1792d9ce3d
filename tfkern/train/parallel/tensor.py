"""Tensor parallelism: each process has some heads, some of the hidden units of MLPs, and some of
the vocabulary (Shoeybi et al. 2019, "Megatron-LM"; Korthikanti et al. 2022 for the stream).

Parameters become DTensors, and so optimisers, FSDP and checkpoints know what they are. Our kernels
take plain tensors: while a module runs, hooks put in place of its parameters what this process
computes with. Between blocks the residual stream is cut along T, and so are norms and dropout:

    stream, cut along T -> norm -> gather along T -> sublayer of this process's heads or hidden
    units -> sum over processes, cut along T -> stream

Everything outside of the blocks, as embeddings, poolers and classifiers, computes whole tensors
with whole gradients, the same ones on all processes.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.nn import functional as F

from tfkern.models import Transformer, TransformerConfig
from tfkern.models.blocks import Attention
from tfkern.models.embedding import TokenEmbedding, rows
from tfkern.models.heads import DeferredLogits, VocabularyHead, VocabularyPart
from tfkern.models.positions import RelativeBias
from tfkern.models.stack import Stack
from tfkern.nn import MLP, GatedMLP
from tfkern.nn.lora import has_adapters

Use = Callable[[DTensor], Tensor]  # what a process computes with, of a parameter
ROWS, COLUMNS = Shard(0), Shard(1)  # of weights (outputs, inputs)


def split(model: nn.Module, mesh: DeviceMesh) -> None:
    """Makes a model one of tensor parallelism, in place.

    In training its vocabulary head returns `DeferredLogits`, whose loss never has the logits whole.

    Args:
        model: a `Transformer` with the same weights on all processes.
        mesh: the processes along one axis.

    Raises:
        ValueError: parts that cannot be cut into as many equal ones, or layers whose results depend
            on more than a process has.
    """
    if not isinstance(model, Transformer):
        raise ValueError(f"tensor parallelism needs a Transformer, got {type(model).__name__}")
    if has_adapters(model):
        raise ValueError("tensor parallelism takes no adapters: use dp, fsdp, or unload the model")
    if (reason := why_not(model.config, mesh.size())) is not None:
        raise ValueError(reason)
    both = model.encoder is not None and model.decoder is not None
    for child in model.children():
        if isinstance(child, Stack):
            if not any(child.blocks):  # they are in other stages of a pipeline
                continue
            # Decoders read an encoder's output by the heads that they have: gradients are parts.
            memory = both and child is model.encoder and child.blocks[-1] is not None
            _split_stack(child, mesh, Partial() if memory else Replicate())
        else:
            summed = isinstance(child, (TokenEmbedding, VocabularyHead))
            _compute_with_parts(child, mesh, summed)
    if isinstance(model.embedding, TokenEmbedding):
        _split_embedding(model.embedding, mesh)
    if model.vocabulary is not None:
        _split_vocabulary(model.vocabulary, rows(model.config), mesh)


def why_not(config: TransformerConfig, world: int) -> str | None:
    """Why a model cannot be cut into `world` equal parts, or None."""
    sizes = {"kv_heads": config.kv_heads or config.heads, "hidden_dim": config.hidden_size}
    if config.vocab_size is not None:
        sizes["vocab_size, rounded up to vocab_multiple"] = rows(config)
    for name, size in sizes.items():
        if size % world:
            return f"{name} must be a multiple of tp, got {size} and tp {world}"
    if config.vocab_size is not None and config.vocab_size <= rows(config) * (world - 1) // world:
        return (
            f"the last of {world} tp ranks would have no tokens: vocab_size {config.vocab_size} is "
            f"rounded up to {rows(config)}"
        )
    if config.norm in ("batch_norm", "weight_norm"):
        return f"tensor parallelism takes no {config.norm}: it needs all tokens or rows"
    if config.query_key_norm == "all":
        return "tensor parallelism takes no norm of all heads together"
    return "tensor parallelism takes no int8 weights" if config.int8 else None


# Parameters


def _compute_with_parts(module: nn.Module, mesh: DeviceMesh, summed: bool = False) -> None:
    """Makes the parameters of a module DTensors, of which it computes with the part here.

    Args:
        summed: whether gradients of replicated parameters have to be summed over processes, as
            each has seen only a part of the stream, or only a part of what follows.
    """
    uses: list[tuple[nn.Module, str, Use]] = []
    for layer, name, placement, use in placed(module):
        p = layer._parameters[name]
        if p is None:
            continue
        # All processes have the same weights: each takes its part without asking another one.
        cut = distribute_tensor(p.detach(), mesh, [placement], src_data_rank=None)
        layer.register_parameter(name, nn.Parameter(cut, p.requires_grad))
        if use is None:
            use = _summed if summed and placement == Replicate() else DTensor.to_local
        uses.append((layer, name, use))
    kept: list[Any] = []

    def before(module: nn.Module, args: Any) -> None:
        for layer, name, use in uses:
            held: dict[str, Any] = layer._parameters
            kept.append(held[name])
            held[name] = use(held[name])

    def after(module: nn.Module, args: Any, y: Any) -> None:
        for (layer, name, _), p in zip(uses, kept, strict=False):  # a failure may leave some out
            layer._parameters[name] = p
        kept.clear()

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)


def placed(module: nn.Module) -> Iterator[tuple[nn.Module, str, Placement, Use | None]]:
    """The parameters in a module, how each is cut, and what is made of it for a call, if that does
    not follow from how it is cut."""
    cut: dict[nn.Module, Placement] = {}
    for m in module.modules():
        if isinstance(m, Attention):
            into = (m.q, m.kv_by_head) if m.cross else (m.qkv_by_head,)
            cut |= {**dict.fromkeys(into, ROWS), m.out: COLUMNS}
        elif isinstance(m, MLP):
            cut |= {m.fc1: ROWS, m.fc2: COLUMNS}
        elif isinstance(m, GatedMLP):
            cut |= {m.gate: ROWS, m.up: ROWS, m.down: COLUMNS}
        elif isinstance(m, RelativeBias):
            cut[m] = COLUMNS  # heads
        elif isinstance(m, TokenEmbedding):
            cut[m] = ROWS
    for m in module.modules():
        for name in m._parameters:
            placement = cut.get(m, Replicate())
            use = None
            if isinstance(m, VocabularyHead) and name == "weight":
                placement = ROWS
            if placement == COLUMNS and name == "bias":
                placement, use = Replicate(), _on_first
            yield m, name, placement, use


def _summed(p: DTensor) -> Tensor:
    """A replicated parameter, whose gradient here is one of the parts of the whole one."""
    return p.redistribute(placements=p.placements).to_local(grad_placements=[Partial()])


def _on_first(p: DTensor) -> Tensor:
    """A bias that is added before a sum over processes, and so counts on one of them.

    The gradient of the sum, and so that of the bias, is whole on all processes: zeros stand for the
    bias on the others, and pass their gradient on.
    """
    bias = p.to_local()
    return bias if p.device_mesh.get_local_rank() == 0 else bias - bias.detach()


# The residual stream


class _Stream:
    """The residual stream of a stack, cut along T, which is `length` in all."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh, self.length = mesh, 0

    def cut(self, x: Tensor) -> Tensor:
        """This process's part of x (B, T, ...), which is the same on all."""
        self.length = x.shape[1]
        whole = DTensor.from_local(x, self.mesh, [Replicate()], run_check=False)
        return whole.redistribute(placements=[Shard(1)]).to_local()

    def gather(self, x: Tensor, gradient: Placement) -> Tensor:
        """All of the parts x. The gradient is whole on each process, or Partial."""
        shape = torch.Size((x.shape[0], self.length, *x.shape[2:]))
        stride = torch.empty(shape, device="meta").stride()
        parts = DTensor.from_local(
            x.contiguous(), self.mesh, [Shard(1)], run_check=False, shape=shape, stride=stride
        )
        return parts.redistribute(placements=[Replicate()]).to_local(grad_placements=[gradient])

    def sum(self, x: Tensor) -> Tensor:
        """This process's part of the sum of all x (B, T, ...)."""
        summands = DTensor.from_local(x, self.mesh, [Partial()], run_check=False)
        return summands.redistribute(placements=[Shard(1)]).to_local()


def _split_stack(stack: Stack, mesh: DeviceMesh, gradient: Placement) -> None:
    """Cuts the stream in front of the first block, and gathers it behind the last norm."""
    stream, blocks = _Stream(mesh), [block for block in stack.blocks if block is not None]
    random = _Random(mesh) if stack.config.dropout or stack.config.attention_dropout else None
    for name, child in stack.named_children():
        if name != "blocks":
            _compute_with_parts(child, mesh, summed=name == "norm")
    for block in blocks:
        _compute_with_parts(block, mesh, summed=True)
        for name, child in block.named_children():
            if name in ("attention", "cross", "mlp"):
                _split_sublayer(child, stream)

    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if random is not None and module.training:
            random.enter()  # also when the block is computed again in backward
        return stream.cut(args[0]), *args[1:]

    def leave(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        if random is not None and module.training:
            random.leave()
        return stream.gather(y, gradient)

    blocks[0].register_forward_pre_hook(enter)
    stack.register_forward_hook(leave)


def _split_sublayer(sublayer: nn.Module, stream: _Stream) -> None:
    """Gathers the stream in front of a sublayer, and sums what the processes make of it."""
    rank, world = stream.mesh.get_local_rank(), stream.mesh.size()

    def before(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        slopes = options.get("alibi_slopes")
        if slopes is not None:
            options = options | {"alibi_slopes": slopes.chunk(world)[rank]}
        return (stream.gather(args[0], Partial()), *args[1:]), options

    sublayer.register_forward_pre_hook(before, with_kwargs=True)
    sublayer.register_forward_hook(lambda module, args, y: stream.sum(y))


class _Random:
    """Random numbers that differ by process, for dropout where each has its own part."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.rank = mesh.get_local_rank()
        self.generators: list[Any] = [torch.random]
        if mesh.device_type == "cuda":
            self.generators.append(torch.cuda)

    def enter(self) -> None:
        seed = int(torch.randint(2**48, ()))  # the same on all processes
        self.states = [generator.get_rng_state() for generator in self.generators]
        torch.manual_seed(seed + self.rank)

    def leave(self) -> None:
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_rng_state(state)


# The vocabulary


def _split_embedding(embedding: TokenEmbedding, mesh: DeviceMesh) -> None:
    """Looks up the tokens whose vectors are here, and sums over processes."""
    rows = _Rows(embedding.num_embeddings, mesh)
    pad = embedding.padding_idx
    embedding.padding_idx = None
    if pad is not None and rows.first <= pad < rows.last:
        embedding.padding_idx = pad - rows.first
    embedding.register_forward_pre_hook(rows.before)
    embedding.register_forward_hook(rows.after)


class _Rows:
    """The rows of a table of `count` that this process has."""

    def __init__(self, count: int, mesh: DeviceMesh) -> None:
        self.count, self.mesh = count, mesh
        size = count // mesh.size()
        self.first = size * mesh.get_local_rank()
        self.last = self.first + size

    def before(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        (tokens,) = args
        here = (tokens >= self.first) & (tokens < self.last)
        # Numbers that no process has stay out of range, for torch to refuse them.
        self.elsewhere = ~here & (tokens >= 0) & (tokens < self.count)
        return ((tokens - self.first).masked_fill(self.elsewhere, 0),)

    def after(self, module: nn.Module, args: Any, y: Tensor) -> Tensor:
        y = y.masked_fill(self.elsewhere[..., None], 0)
        summands = DTensor.from_local(y, self.mesh, [Partial()], run_check=False)
        return summands.redistribute(placements=[Replicate()]).to_local()


def _split_vocabulary(head: VocabularyHead, count: int, mesh: DeviceMesh) -> None:
    """Makes the logits of the tokens whose rows of the table are here; `count` in all processes.

    In training they are left to the loss, and otherwise gathered.
    """
    size = count // mesh.size()
    first, classes = size * mesh.get_local_rank(), head.vocab_size
    own = min(size, classes - first)
    head.part, head.deferred = VocabularyPart(mesh, first, own, classes), True

    def before(module: nn.Module, args: tuple[Tensor], options: dict[str, Any]) -> Any:
        y = DTensor.from_local(args[0], mesh, [Replicate()], run_check=False)
        table = options["table"]
        table = table.to_local() if isinstance(table, DTensor) else table
        return (y.to_local(grad_placements=[Partial()]),), {"table": table}

    def after(module: nn.Module, args: Any, y: Tensor | DeferredLogits) -> Tensor | None:
        if isinstance(y, DeferredLogits):
            return None
        parts = DTensor.from_local(F.pad(y, (0, size - own)), mesh, [Shard(-1)], run_check=False)
        return parts.redistribute(placements=[Replicate()]).to_local()[..., :classes]

    head.register_forward_pre_hook(before, with_kwargs=True)
    head.register_forward_hook(after)
