"""Reads the machine code of a GPU: the hot loop of a kernel, and the least time that it takes.

`kernels` splits what `nvdisasm -c` prints into kernels, and `hot` counts the instructions of the
part of a kernel that runs most, by the pipe that executes them. Clocks are those of a scheduler,
one of four in an SM, for one warp and one turn of the loop, if its pipe never waits: a bound, which
no run can beat, and no time.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

# The first pattern that matches an opcode names its pipe.
_PIPES = (
    ("tensor", r"[A-Z]*MMA$"),
    ("copy", r"UTMA|UBLK|UTCCP|LDTM|STTM"),  # engines that copy by themselves
    ("shuffle", r"SHFL|REDUX|MATCH"),
    ("lsu", r"LD[GSLC]?$|ST[GSL]?$|LDSM|STSM|LDGSTS|ATOM|RED$|REDG"),
    ("sync", r"BAR|SYNCS|WARP|\w*DEPBAR|VOTE|MEMBAR|FENCE|ERRBAR|CCTL|ELECT|ARRIVES|UTCBAR"),
    ("mufu", r"MUFU|F2I|I2F|F2F$|FRND|POPC|FLO|BREV|S2R|S2UR|R2UR"),
    ("control", r"BR[AX]|JMP|EXIT|BS|BREAK|CALL|RET|NOP|YIELD|NANOSLEEP|KILL|BPT|PLOP3|P2R|R2P"),
    ("uniform", r"U[A-Z]"),
    ("fma", r"[FH](FMA|MUL|ADD)2?(32I)?"),
    ("alu", r""),  # integers, logic, comparisons, selections, packing of 16-bit pairs
)
_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z]\w*)([.\w]*)\s*(.*?)\s*;"
)
_LABEL = re.compile(r"\.L_x_\d+")


@functools.cache
def _pipe(op: str) -> str:
    return next(pipe for pipe, pattern in _PIPES if re.match(pattern, op))


@dataclass(frozen=True)
class Instruction:
    address: int
    conditional: bool
    op: str
    modifiers: str
    operands: str

    @property
    def pipe(self) -> str:
        return _pipe(self.op)

    @property
    def bytes(self) -> int:
        """What a lane reads or writes, if this is an access to memory."""
        found = re.search(r"\.[US]?(256|128|64|16|8)\b", self.modifiers)
        return int(found[1]) // 8 if found else 4

    @property
    def is_global(self) -> bool:
        return self.op in ("LDG", "LD", "LDGSTS", "STG", "ST")


@dataclass(frozen=True)
class Kernel:
    name: str
    code: list[Instruction]
    labels: dict[str, int]  # label -> address


@dataclass(frozen=True)
class Rates:
    """Clocks of a scheduler for an instruction of a warp, from the throughputs that the CUDA C++
    programming guide has for each compute capability (table of native arithmetic instructions)."""

    fma: float  # float32 multiplications and additions
    mma: float  # a product of 16x16 and 16x8 by mma.sync
    flop: int  # FLOPs of the tensor cores of an SM in a clock, of 16-bit numbers


# mma.sync reaches 63 % of the peak of sm_90 (Luo et al. 2024, arXiv 2402.13499); sm_100 has no
# published figure, and here counts as able to reach the rate of sm_90's own products.
RATES = {80: Rates(2, 8, 2048), 90: Rates(1, 6.4, 4096), 100: Rates(1, 4, 8192)}

_CLOCKS = {"copy": 0, "shuffle": 4, "sync": 1, "mufu": 8, "control": 1, "uniform": 1, "alu": 2}


def kernels(text: str) -> Iterator[Kernel]:
    """The kernels of a text that `nvdisasm -c` has printed."""
    name, code, labels, waiting = "", [], {}, []
    for line in text.splitlines():
        if found := re.match(r"^\.text\.(\S+):", line):
            if name:
                yield Kernel(name, code, labels)
            name, code, labels, waiting = found[1], [], {}, []
        elif found := re.match(rf"^({_LABEL.pattern}):", line):
            waiting.append(found[1])
        elif name and (found := _LINE.match(line)):
            address = int(found[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting = []
            code.append(Instruction(address, bool(found[2]), *found.groups()[2:]))
    if name:
        yield Kernel(name, code, labels)


def _target(kernel: Kernel, instruction: Instruction) -> int | None:
    found = _LABEL.search(instruction.operands)
    return kernel.labels.get(found[0]) if found else None


def _loops(kernel: Kernel) -> Iterator[list[Instruction]]:
    """The bodies of all branches backward. Behind the last EXIT lie parts that a compiler moved out
    of the way, such as polls of barriers: they jump back, too, and are no loops."""
    last = max((i.address for i in kernel.code if i.op == "EXIT"), default=1 << 62)
    for branch in kernel.code:
        start = _target(kernel, branch) if branch.op == "BRA" else None
        if start is not None and start < branch.address < last:
            yield [i for i in kernel.code if start <= i.address <= branch.address]


def _path(kernel: Kernel, body: list[Instruction]) -> list[Instruction]:
    """The instructions of one turn, or of a kernel without a loop from its beginning to its end.

    Where branches part, this is the way with the most products, of equals the most bytes in
    accesses of 16 bytes or more, of equals the fewest instructions: the main case, without the
    options of a launch and the tails of rows, and with the widest of several types. A loop inside
    the body counts once.
    """
    at = {instruction.address: n for n, instruction in enumerate(body)}
    head = body[0].address
    joins = _joins(kernel, body)
    best: list[tuple[tuple, int | None] | None] = [None] * len(body)
    for n in range(len(body) - 1, -1, -1):
        i = body[n]
        wide = i.bytes if i.is_global and i.bytes >= 16 else 0
        weight = (i.pipe == "tensor", wide, -1)
        target = _target(kernel, i) if i.op in ("BRA", "BRX", "JMP") else None
        if i.op == "BSYNC":
            target = joins.get(i.address)
        parts = i.conditional or bool(re.match(r"!?U?P\d|~?URZ|U?R\d", i.operands))
        ends = target == head or (i.op == "EXIT" and not i.conditional) or n == len(body) - 1
        choices: list[tuple[tuple, int | None]] = [((0, 0, 0), None)] if ends else []
        nexts = [at.get(target)] if target is not None else []
        if target is None or parts:
            nexts.append(n + 1)
        if i.op == "EXIT" and not i.conditional:
            nexts = []
        for to in nexts:
            if to is not None and n < to < len(body) and (after := best[to]):
                choices.append((after[0], to))
        if choices:
            most, to = max(choices, key=lambda choice: choice[0])
            best[n] = (tuple(a + b for a, b in zip(weight, most, strict=True)), to)
    path, n = [], 0
    while n is not None and best[n]:
        path.append(body[n])
        n = best[n][1]
    return path


def _joins(kernel: Kernel, body: list[Instruction]) -> dict[int, int | None]:
    """The address of each BSYNC -> where the lanes that wait there go on together."""
    meeting: dict[str, int | None] = {}
    found = {}
    for i in body:
        barrier = i.operands.split(",")[0]
        if i.op == "BSSY":
            meeting[barrier] = _target(kernel, i)
        elif i.op == "BSYNC" and barrier in meeting:
            found[i.address] = meeting[barrier]
    return found


def _hot(kernel: Kernel) -> tuple[bool, list[Instruction]]:
    """Whether the part that runs most is a loop, and its body: the loop with most products, of
    equals the shortest, since those with masks are longer and rarer; without products the one that
    reads more than the rest of the kernel, if there is one; else the whole kernel."""

    def products(body):
        return sum(i.pipe == "tensor" for i in body)

    def read(body):
        return sum(i.bytes for i in body if i.op in ("LDG", "LD", "LDGSTS") and i.bytes >= 16)

    found = list(_loops(kernel))
    multiplying = [body for body in found if products(body)]
    inner = [b for b in multiplying if not any(o is not b and _holds(b, o) for o in multiplying)]
    if inner:
        return True, max(inner, key=lambda body: (products(body), -len(body)))
    reading = [b for b in found if 2 * read(b) > read(kernel.code)]
    inner = [b for b in reading if not any(o is not b and _holds(b, o) for o in reading)]
    if inner:
        return True, max(inner, key=lambda body: (read(body), -len(body)))
    return False, kernel.code


def _holds(outer: list[Instruction], inner: list[Instruction]) -> bool:
    return outer[0].address <= inner[0].address and inner[-1].address <= outer[-1].address


def _flop_of_tcgen05(body: list[Instruction]) -> int:
    """FLOPs of a block's tcgen05.mma, whose descriptor of M and N is a constant in a register."""
    constants, flop = {}, 0
    for i in body:
        if found := re.match(r"(UR\d+), (0x[0-9a-f]+)$", i.operands):
            constants[found[1]] = int(found[2], 16)
        if i.op.startswith("UTC") and i.op.endswith("MMA"):
            register = re.search(r"idesc\[(UR\d+)\]", i.operands)
            word = constants.get(register[1], 0) if register else 0
            flop += 2 * 16 * 8 * (word >> 17 & 63) * 16 * (word >> 24 & 31)
    return flop


def _clocks(i: Instruction, arch: int) -> float:
    rates = RATES[arch]
    if i.op == "HGMMA":  # 64 x N x 16 by four warps, one on each scheduler
        return 2 * 64 * 16 * int(re.search(r"64x(\d+)x", i.modifiers)[1]) / rates.flop
    if i.pipe == "tensor":
        return 0 if i.op.startswith("UTC") else rates.mma / (1 if "16816" in i.modifiers else 2)
    if i.pipe == "fma":
        return rates.fma
    if i.pipe == "lsu":  # an SM moves 128 bytes in a clock, for its four schedulers
        matrices = re.search(r"M88\.(\d)", i.modifiers)
        return 4 * (int(matrices[1]) if matrices else max(1, i.bytes / 4))
    return _CLOCKS[i.pipe]


def _in_flight(path: list[Instruction]) -> int:
    """Bytes of a lane under way at most: loads before the first use of any of them, and copies to
    shared memory, of which a turn makes as many as it waits for."""
    most, now, waiting = 0, 0, set()
    for i in path:
        registers = [int(n) for n in re.findall(r"\bR(\d+)", i.operands)]
        load = i.op in ("LDG", "LD")
        if waiting & set(registers[1:] if load else registers):
            now, waiting = 0, set()
        if load and registers:
            waiting |= set(range(registers[0], registers[0] + max(1, i.bytes // 4)))
            now += i.bytes
            most = max(most, now)
    return most + sum(i.bytes for i in path if i.op == "LDGSTS")


@dataclass(frozen=True)
class Hot:
    """What a warp does in one turn of the hot loop, or in a whole kernel that has none."""

    loop: bool
    instructions: int
    pipes: Counter[str]  # instructions by pipe
    clocks: dict[str, float]  # by pipe, and "issue": the scheduler itself, which issues one a clock
    flop: float  # of the tensor cores, in 16-bit products
    bytes: int  # to and from global memory
    in_flight: int  # bytes of a lane
    barriers: int  # of a block
    waits: int  # for asynchronous products of sm_90: one a product means that none overlap
    spills: int  # accesses to the stack
    spills_elsewhere: int  # in the rest of the kernel

    @property
    def pipe(self) -> str:
        """The pipe that takes longest."""
        return max(self.clocks, key=self.clocks.__getitem__)


def hot(kernel: Kernel, arch: int, warps: int | None = None) -> Hot:
    """Counts the hot loop of a kernel. `warps` are those of a block, which only tcgen05 needs."""
    is_loop, body = _hot(kernel)
    path = _path(kernel, body) or body
    pipes = Counter(i.pipe for i in path)
    clocks = Counter({"issue": float(len(path))})
    for i in path:
        clocks[i.pipe] += _clocks(i, arch)
    flop = clocks["tensor"] * RATES[arch].flop / 4
    if arch < 100 and any(i.op != "HGMMA" for i in path if i.pipe == "tensor"):
        flop = sum(4096 / (1 if "16816" in i.modifiers else 2) for i in path if i.pipe == "tensor")
    if of_block := _flop_of_tcgen05(body):
        assert warps, "the products of tcgen05 belong to the warps of a block together"
        flop = of_block / warps
        clocks["tensor"] = 4 * flop / RATES[arch].flop
    stack = Counter(i.op in ("LDL", "STL") for i in path)[True]
    return Hot(
        loop=is_loop,
        instructions=len(path),
        pipes=pipes,
        clocks=dict(clocks),
        flop=flop,
        bytes=32 * sum(i.bytes for i in path if i.is_global),
        in_flight=_in_flight(path),
        barriers=sum(i.op == "BAR" for i in path),
        waits=sum(i.op == "WARPGROUP" and ".DEPBAR" in i.modifiers for i in path),
        spills=stack,
        spills_elsewhere=sum(i.op in ("LDL", "STL") for i in kernel.code) - stack,
    )
