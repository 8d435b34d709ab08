"""Who assigns attributes: the object's own constructor; later the object, where its class says what it counts or keeps.

    self.a = x                in `__init__`, `__new__`, `__post_init__`: always with a value
    self.a = x                elsewhere: if a constructor bound `a` and the class docstring names it in backticks
    other.a = x               never, but for Megatron's arguments (`args`), torch's modules and optimizers (local names
                              whose annotation, or the class that makes them, says so), and inside `rebound/`

`setattr` and `delattr` are assignments. The rule is read from the syntax; classes are looked up in the module itself.
"""

import ast
import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_mosaic"
REBOUND = PACKAGE / "parallel_state_ext" / "rebound"

CONSTRUCTORS = ("__init__", "__new__", "__post_init__")
SETTERS = ("setattr", "delattr", "object.__setattr__", "object.__delattr__")


def is_foreign(kind: object) -> bool:
    """Whether instances of the class live by being assigned to: torch's modules with their parameters, optimizers."""
    import torch
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    known = (torch.nn.Module, torch.nn.Parameter, torch.optim.Optimizer, MegatronOptimizer)
    return isinstance(kind, type) and issubclass(kind, known)


@dataclass(frozen=True)
class Scope:
    """Where a statement stands: in which method of which class, and what is known of local names."""

    class_node: ast.ClassDef | None = None
    method: str = ""
    own_name: str = ""
    local_kinds: Mapping[str, str] = field(default_factory=dict)  # name -> source of an annotation, or of what made it

    def inside(self, node: ast.AST) -> "Scope":
        """The scope of the node's children."""
        if isinstance(node, ast.ClassDef):
            return Scope(class_node=node)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return self
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        kinds = {one.arg: ast.unparse(one.annotation) for one in arguments if one.annotation}
        for child in ast.walk(node):
            if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
                kinds[child.target.id] = ast.unparse(child.annotation)
            elif isinstance(child, ast.Assign) and isinstance(child.value, ast.Call):
                made = {target.id for target in child.targets if isinstance(target, ast.Name)}
                kinds |= dict.fromkeys(made - kinds.keys(), ast.unparse(child.value.func))
        decorators = {ast.unparse(one) for one in node.decorator_list}
        is_method = self.class_node is not None and not self.method and arguments
        is_method = is_method and decorators.isdisjoint({"staticmethod", "classmethod"})
        return Scope(
            class_node=self.class_node,
            method=f"{self.method}.{node.name}" if self.method else node.name,
            own_name=arguments[0].arg if is_method else self.own_name,  # a function inside a method has the same `self`
            local_kinds={**self.local_kinds, **kinds},
        )


def assigned(node: ast.AST) -> Iterator[tuple[ast.expr, str, bool]]:
    """(receiver, attribute, whether it gets a value) of every attribute that the node itself assigns or deletes."""
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
        yield node.value, node.attr, True
    elif isinstance(node, ast.AnnAssign) and node.value is None and isinstance(node.target, ast.Attribute):
        yield node.target.value, node.target.attr, False
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in SETTERS:
        name = node.args[1]
        yield node.args[0], name.value if isinstance(name, ast.Constant) else ast.unparse(name), True


def counted_or_kept(node: ast.ClassDef) -> set[str]:
    """Attributes that the class docstring names and the class body or a constructor binds."""
    named = set(re.findall(r"`(\w+)`", ast.get_docstring(node) or ""))
    bound = {child.target.id for child in node.body if isinstance(child, ast.AnnAssign) and _is_name(child.target)}
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and method.name in CONSTRUCTORS:
            own = method.args.args[0].arg
            bound |= {name for child in ast.walk(method) for at, name, _ in assigned(child) if _is_name(at, own)}
    return named & bound


def _is_name(node: ast.expr, name: str | None = None) -> bool:
    return isinstance(node, ast.Name) and (name is None or node.id == name)


def find_faults(tree: ast.AST, names: Mapping[str, Any]) -> list[str]:
    """Line and text of every assignment that breaks the rule. `names`: those of the module, to look classes up."""
    faults = []

    def is_allowed(receiver: ast.expr, attribute: str, has_value: bool, scope: Scope) -> bool:
        if not has_value:
            return False
        if _is_name(receiver, scope.own_name):
            if scope.method in CONSTRUCTORS:
                return True
            return scope.class_node is not None and attribute in counted_or_kept(scope.class_node)
        last = receiver.attr if isinstance(receiver, ast.Attribute) else getattr(receiver, "id", "")
        if last.lstrip("_") == "args":
            return True
        source = scope.local_kinds.get(last) if isinstance(receiver, ast.Name) else None
        return source is not None and is_foreign(_look_up(source, names))

    def visit(node: ast.AST, scope: Scope) -> None:
        for child in ast.iter_child_nodes(node):
            for receiver, attribute, has_value in assigned(child):
                if not is_allowed(receiver, attribute, has_value, scope):
                    faults.append(f"{child.lineno}: {ast.unparse(receiver)}.{attribute}")
            visit(child, scope.inside(child))

    visit(tree, Scope())
    return faults


def _look_up(source: str, names: Mapping[str, Any]) -> object:
    """What a dotted name means in the module; None if it is something else or unknown."""
    first, *rest = source.split(".")
    found = names.get(first)
    for part in rest:
        found = getattr(found, part, None)
    return found


class _LazyNames(Mapping[str, Any]):
    """The names of a module, which is imported when the first is asked for."""

    def __init__(self, path: Path) -> None:
        self._module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")

    def __getitem__(self, name: str) -> Any:
        return vars(importlib.import_module(self._module))[name]

    def __iter__(self) -> Iterator[str]:
        return iter(vars(importlib.import_module(self._module)))

    def __len__(self) -> int:
        return len(vars(importlib.import_module(self._module)))


def test_attributes_are_assigned_by_their_own_object_alone() -> None:
    faults, files = [], [path for path in sorted(PACKAGE.rglob("*.py")) if not path.is_relative_to(REBOUND)]
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        faults += [f"{path.relative_to(ROOT)}:{fault}" for fault in find_faults(tree, _LazyNames(path))]
    assert len(files) > 100, "where is the package?"
    assert not faults, (
        "bind it in the constructor, or name a counter or buffer in the class docstring; what belongs to another "
        "object is given to its constructor:\n" + "\n".join(faults)
    )


CLASS = '''
class Meter:
    """Counts in `count`. `late` is never bound."""
    def __init__(self, args, start):
        self.count, self.hidden, self._args = start, 0, args
'''
REFUSED = {
    "an attribute that the docstring does not name": CLASS + "    def add(self): self.hidden = 1",
    "one that the constructor does not bind": CLASS + "    def add(self): self.late = 1",
    "adding in place": CLASS + "    def add(self): self.hidden += 1",
    "deleting": CLASS + "    def add(self): del self.hidden",
    "a loop's target": CLASS + "    def add(self, many):\n        for self.hidden in many: pass",
    "a with's target": CLASS + "    def add(self, one):\n        with one as self.hidden: pass",
    "one of several targets": CLASS + "    def add(self, pair): a, (self.hidden, *b) = pair",
    "setattr": CLASS + "    def add(self): setattr(self, 'hidden', 1)",
    "setattr of a name that is not known": CLASS + "    def add(self, name): setattr(self, name, 1)",
    "an annotation without a value": CLASS + "        self.late: int",
    "within a function of a method": CLASS + "    def add(self):\n        def inner(): self.hidden = 1",
    "within a function of a constructor": CLASS + "        def later(): self.hidden = 1",
    "another object": "def use(meter): meter.count = 1",
    "another object from a constructor": "class A:\n    def __init__(self, meter): meter.count = 1",
    "another object of its own class": CLASS + "    def add(self, other): other.count = 1",
    "what belongs to another object": CLASS + "    def add(self): self._args.meter.count = 1",
    "another object's attribute of an own one": CLASS + "    def add(self): self.hidden.x = 1",
    "an object that was just made": CLASS + "def make():\n    meter = Meter(1, 2)\n    meter.count = 3",
    "a module": "import sys\nsys.argv = []",
    "a function": "def f(): pass\nf.is_known = True",
    "a class": CLASS + "Meter.count = 1",
    "another class by annotation": "def use(size: int): size.x = 1",
    "a class method": CLASS + "    @classmethod\n    def reset(cls): cls.hidden = 1",
}
ACCEPTED = {
    "a counter": CLASS + "    def add(self): self.count += 1",
    "a counter, within a function of a method": CLASS + "    def add(self):\n        def inner(): self.count = 1",
    "a field of a dataclass": 'class A:\n    """`n` counts."""\n    n: int = 0\n    def add(self): self.n += 1',
    "an item": CLASS + "    def add(self): self.hidden[0] = 1",
    "a frozen value's constructor": "class A:\n    def __post_init__(self): object.__setattr__(self, 'x', 1)",
    "Megatron's arguments": "def use(args): args.world_size = 1",
    "kept arguments": CLASS + "    def add(self): setattr(self._args, 'world_size', 1)",
    "a parameter that is a module": "def use(stage: nn.Module): stage.groups = 1",
    "a local that is a module": "def use(build):\n    stage: nn.Linear = build()\n    stage.groups, y = 1, 2",
    "a module that was just made": "def use():\n    stage = nn.Linear(1, 2)\n    stage.groups = 1",
    "parameters in a loop": "def use(stage):\n    p: nn.Parameter\n    for p in stage: p.grad = None",
    "an optimizer": "def use(one: optim.Adam): one.around = 1",
}


@pytest.mark.parametrize("code", REFUSED.values(), ids=REFUSED)
def test_refuses(code: str) -> None:
    import torch

    assert len(find_faults(ast.parse(code), {"nn": torch.nn, "optim": torch.optim, "int": int})) == 1


@pytest.mark.parametrize("code", ACCEPTED.values(), ids=ACCEPTED)
def test_accepts(code: str) -> None:
    import torch

    assert find_faults(ast.parse(code), {"nn": torch.nn, "optim": torch.optim}) == []
