"""Layers whose own code spells out what tfkern computes in one pass: a sum and the norm of it, two
linear layers with an activation between them, rotary positions. Their forward is compiled again
from its source with these statements exchanged.

What takes the statements' place asks at every call whether it may, and otherwise does just what
they did. The rest of the code stays as it is, globals of its file included.
"""

import __future__

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tfkern.integrations.hf import norms, worth
from tfkern.integrations.hf.plain import (
    activation,
    alike,
    idle,
    is_linear,
    linear,
    named_activation,
)
from tfkern.integrations.hf.residual import add_norm
from tfkern.integrations.hf.rotation import NAME, rotation
from tfkern.ops import mlp

# The keys are forwards of classes, not the classes, since other libraries replace the former.
_FORWARDS: dict[Callable[..., Any], Callable[..., Any] | None] = {}


def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a patched layer."""
    own = type(module).forward
    return (_FORWARDS.get(own) or rewritten(module) or own)(module, *args, **kwargs)


def rewritten(module: nn.Module) -> Callable[..., Any] | None:
    """The forward of the module's class with tfkern's calls, None if it has no place for one.
    Children of this module tell which statements to look at."""
    own: Any = type(module).forward
    if own not in _FORWARDS:
        if torch.compiler.is_compiling():  # Dynamo cannot trace a compiler, which `patch` has run
            return None
        try:
            _FORWARDS[own] = _compiled(own, _roles(module))
        except Exception:  # there is no source, or it needs more than the names of its file
            _FORWARDS[own] = None
    return _FORWARDS[own]


def _roles(module: nn.Module) -> dict[str, str]:
    roles = {}
    for name, child in module._modules.items():
        if child is None:
            continue
        if is_linear(type(child)):
            roles[name] = "linear"
        elif isinstance(child, nn.Dropout):
            roles[name] = "dropout"
        elif norms.known(child) is not None:
            roles[name] = "norm"
        elif named_activation(child) is not None:
            roles[name] = "activation"
    return roles


def _compiled(own: Any, roles: dict[str, str]) -> Callable[..., Any] | None:
    function = inspect.unwrap(own)
    turn = None
    if NAME in function.__code__.co_names and NAME in function.__globals__:
        turn = rotation(function.__globals__[NAME])
    if turn is None and not {"norm", "linear"} & set(roles.values()):
        return None
    names = {_ADD_NORM: add_norm, _MLP: _mlp}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        names[name] = cell.cell_contents  # __class__, for super()
    lines, start = inspect.getsourcelines(function)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    definition: Any = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        return None
    definition.decorator_list = []
    # Names that begin with two underscores mean something else outside of their class.
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    used |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    if any(name.startswith("__") and not name.endswith("__") for name in used):
        return None
    ast.increment_lineno(tree, start - 1)  # for tracebacks
    change = _Change(roles)
    change.visit(tree)
    if turn is None and not change.changes:
        return None
    if turn is not None:
        names[NAME] = turn
    # A function around theirs holds our names, so that none is entered into their file.
    outer = ast.parse(f"def make({', '.join(names)}):\n    return {function.__name__}")
    outer.body[0].body.insert(0, definition)  # type: ignore[attr-defined]
    flags = function.__code__.co_flags & __future__.annotations.compiler_flag
    code = compile(ast.fix_missing_locations(outer), inspect.getfile(function), "exec", flags, True)
    made: dict[str, Any] = {}
    exec(code, function.__globals__, made)
    return _around(own, function, made["make"](**names))


def _around(outer: Any, inner: Any, new: Any) -> Any:
    """What stands around the inner function, decorators and gradient checkpointing, around the new
    one. They hold the inner function in their closures."""
    if outer is inner:
        return new
    held = outer.__wrapped__
    changed = CellType(_around(held, inner, new))
    closure = tuple(changed if c.cell_contents is held else c for c in outer.__closure__)
    if changed not in closure:
        raise TypeError("a wrapper that does not hold what it wraps")
    copied = FunctionType(
        outer.__code__, outer.__globals__, outer.__name__, outer.__defaults__, closure
    )
    copied.__kwdefaults__ = outer.__kwdefaults__
    return copied


_ADD_NORM, _MLP = "tfkern_add_norm", "tfkern_mlp"


class _Change(ast.NodeTransformer):
    def __init__(self, roles: dict[str, str]) -> None:
        self.roles, self.changes = roles, 0

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list):
                setattr(node, field, self._block(block))
        return node

    def _block(self, block: list[Any]) -> list[Any]:
        result, i = [], 0
        while i < len(block):
            found = self._branch(block[i:]) or self._sum(block[i:]) or self._mlp(block[i:])
            if found is None:
                found = [block[i]], 1
            else:
                self.changes += 1
            result += found[0]
            i += found[1]
        return result

    def _child(self, node: Any, *roles: str) -> bool:
        """Whether the node is self.name with a child of one of these roles."""
        return (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
            and self.roles.get(node.attr) in roles
        )

    def _call(self, node: Any, *roles: str) -> bool:
        """Whether the node calls such a child with one argument."""
        return (
            isinstance(node, ast.Call)
            and self._child(node.func, *roles)
            and len(node.args) == 1
            and not isinstance(node.args[0], ast.Starred)
            and not node.keywords
        )

    def visit_Call(self, node: Any) -> ast.AST:
        """self.norm(a + b)."""
        super().generic_visit(node)
        if not self._call(node, "norm") or not _is_sum(node.args[0]):
            return node
        self.changes += 1
        add: Any = node.args[0]
        new = ast.Call(ast.Name(_ADD_NORM, ast.Load()), [node.func, add.left, add.right], [])
        return ast.Subscript(new, ast.Constant(0), ast.Load())

    def _sum(self, block: list[Any]) -> tuple[list[Any], int] | None:
        """x = a + b, perhaps r = x, and a statement with self.norm(x)."""
        x = _target(block[0])
        if x is None or not _is_sum(block[0].value):
            return None
        rest = block[1:]
        kept = []
        if rest and _target(rest[0]) and _named(rest[0].value, x):
            kept, rest = rest[:1], rest[1:]
        if not rest or not isinstance(rest[0], ast.Assign | ast.Return | ast.Expr):
            return None
        nodes: list[Any] = list(ast.walk(rest[0]))
        calls = [n for n in nodes if self._call(n, "norm") and _named(n.args[0], x)]
        if len(calls) != 1 or any(isinstance(n, _CONDITIONAL) for n in ast.walk(rest[0])):
            return None
        norm, y, add = calls[0].func, "tfkern_normed", block[0].value
        head = _parsed(f"{y}, {x} = {_ADD_NORM}(norm, a, b)")
        head.value.args = [norm, add.left, add.right]
        last = _Exchange(calls[0], ast.Name(y, ast.Load())).visit(rest[0])
        return [head, *kept, last], 2 + len(kept)

    def _branch(self, block: list[Any]) -> tuple[list[Any], int] | None:
        """x = a + b; if c is not None: ...; r = x; x = norm(x), where the branch is seldom taken:
        the sum and what follows go into both branches."""
        if len(block) < 3 or not isinstance(block[1], ast.If) or block[1].orelse:
            return None
        x, test = _target(block[0]), block[1].test
        simple = isinstance(test, ast.Compare) and all(
            isinstance(n, ast.Name | ast.Constant) for n in (test.left, *test.comparators)
        )
        if x is None or not simple or any(_named(n, x) for n in ast.walk(test)):
            return None
        for length in (2, 1):
            after = block[2 : 2 + length]
            found = self._sum(copy.deepcopy([block[0], *after]))
            if found is not None and found[1] == 1 + length:
                taken = [block[0], *block[1].body, *after]
                return [ast.If(test, copy.deepcopy(taken), found[0])], 2 + length
        return None

    def _mlp(self, block: list[Any]) -> tuple[list[Any], int] | None:
        """x = act(fc1(e)); x = dropout(x); x = fc2(x), also with less in a statement."""
        x, start = _target(block[0]), None
        chain: list[tuple[str, Any]] = []
        for i, statement in enumerate(block[:4]):
            if x is None or _target(statement) != x:
                break
            *inner, argument = self._chain(statement.value)
            if not inner or (i and not _named(argument, x)):
                break
            start = start or argument
            chain += inner[::-1]
            kinds = [kind for kind, _ in chain]
            if kinds in (["linear", "activation", "linear"],
                         ["linear", "activation", "dropout", "linear"]):  # fmt: skip
                first, act, *drop, last = [node for _, node in chain]
                head = _parsed(f"{x} = {_MLP}(e)")
                head.value.args = [start, first, act, last, *(drop[0] if drop else ())]
                return [head], i + 1
        return None

    def _chain(self, node: Any) -> list[Any]:
        """Calls, the outermost first, and their argument at the end."""
        calls: list[Any] = []
        while True:
            if self._call(node, "linear", "activation"):
                calls.append((self.roles[node.func.attr], node.func))
            elif self._call(node, "dropout"):
                calls.append(("dropout", [node.func]))
            elif (
                isinstance(node, ast.Call)
                and ast.unparse(node.func) in ("nn.functional.dropout", "F.dropout")
                and len(node.args) == 1
                and [k.arg for k in node.keywords] == ["p", "training"]
            ):
                calls.append(("dropout", [k.value for k in node.keywords]))
            else:
                return [*calls, node]
            node = node.args[0]


_CONDITIONAL = (
    ast.IfExp, ast.BoolOp, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp
)  # fmt: skip


class _Exchange(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        return self.new if node is self.old else super().visit(node)


def _parsed(code: str) -> Any:
    return ast.parse(code).body[0]


def _target(node: Any) -> str | None:
    """The name that a statement assigns to, None for other statements."""
    one = isinstance(node, ast.Assign) and len(node.targets) == 1
    return node.targets[0].id if one and isinstance(node.targets[0], ast.Name) else None


def _named(node: Any, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _is_sum(node: Any) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)


def _mlp(x: Any, fc1: Any, act: Any, fc2: Any, *drop: Any) -> Any:
    """fc2(dropout(act(fc1(x)))), where `drop` is empty, a module, or probability and training."""
    idles = not drop or (idle(drop[0]) if len(drop) == 1 else not (drop[0] and drop[1]))
    known = activation(act) if idles and isinstance(x, Tensor) and worth.mlp(x) else None
    if known is not None and x.dim() > 0 and worth.mlp(x, known.operators - 1):
        first, last = linear(fc1), linear(fc2)
        if first is not None and last is not None and alike(x, *first, *last):
            return mlp(x, *first, *last, activation=known.name)
    h = act(fc1(x))
    if drop:
        h = drop[0](h) if len(drop) == 1 else F.dropout(h, p=drop[0], training=drop[1])
    return fc2(h)
