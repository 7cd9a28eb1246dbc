"""One Python file with a model and all that it runs of cssbench, for folders that are read without cssbench.

The very source of the classes and functions is taken, so that the numbers are the same. From what is asked for, names
are followed from definition to definition; of a class only methods stay whose name occurs in code that stays (none of
`NEVER`), and its options (`Config`) go: options come from the folder's config.json. What is imported from other
packages stays an import. Two things of one name from two modules are told apart by the module's name.
"""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any

from cssbench.errors import ModelError

ALLOWED = {"torch", "torchvision", "timm", "safetensors", "numpy", "PIL"} | set(sys.stdlib_module_names)
ALWAYS = {"forward", "grow", "train"}  # methods that PyTorch, or the loading, calls
NEVER = {"loss", "param_groups", "no_decay_names", "training_inputs", "compiled_parts", "freeze_old"}  # of training
Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign | ast.Try
AT_ONCE = ast.Assign | ast.AnnAssign | ast.Try  # run while the file is read
Key = tuple[str, str]  # module, name


@dataclass
class _Source:
    """What a module defines and imports at its top level."""

    module: ModuleType

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(inspect.getsource(self.module))

    @cached_property
    def defined(self) -> dict[str, Definition]:
        found: dict[str, Definition] = {}
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[node.name] = node
            elif isinstance(node, ast.Assign):
                names = [n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)]
                found |= dict.fromkeys(names, node)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
                found[node.target.id] = node
            elif isinstance(node, ast.Try):  # an import that an older version does not have
                found |= dict.fromkeys(_bound(node), node)
        return found

    @cached_property
    def imported(self) -> dict[str, tuple[str, str | None]]:
        """Name -> (module, name in it; None: the module itself)."""
        found: dict[str, tuple[str, str | None]] = {}
        for node in self.tree.body:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    whole = alias.name if alias.asname else alias.name.split(".")[0]
                    found[alias.asname or whole] = (whole, None)
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
        return found


@dataclass
class _Bundle:
    """own: the packages whose source is taken. kept: what has been reached; attributes: names after a dot in it."""

    own: frozenset[str]
    sources: dict[str, _Source] = field(default_factory=dict)
    kept: dict[Key, Definition] = field(default_factory=dict)
    attributes: set[str] = field(default_factory=lambda: set(ALWAYS))
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    names: dict[Key, str] = field(default_factory=dict)  # as a module knows a thing -> as the file does

    def source(self, module: str) -> _Source:
        if module not in self.sources:
            self.sources[module] = _Source(importlib.import_module(module))
        return self.sources[module]

    def resolve(self, module: str, name: str) -> Key | tuple[str, str | None] | None:
        """Where a name of a module is defined: (module of ours, name), or an import; None: a local or built-in name."""
        source = self.source(module)
        if name in source.defined:
            return module, name
        if name not in source.imported:
            return None
        origin, inner = source.imported[name]
        if inner is not None and origin.split(".")[0] in self.own:
            return self.resolve(origin, inner)
        return origin, inner

    def is_own(self, module: str) -> bool:
        return module.split(".")[0] in self.own

    def reach(self, roots: list[Key]) -> None:
        """Keep all that the roots need; again while names after a dot let further methods stay."""
        todo, size = list(roots), -1
        while size != len(self.attributes) + len(self.kept):
            size = len(self.attributes) + len(self.kept)
            todo = [*roots, *self.kept]
            seen: set[Key] = set()
            while todo:
                key = todo.pop()
                if key in seen:
                    continue
                seen.add(key)
                node = self.pruned(self.source(key[0]).defined[key[1]])
                self.kept[key] = node
                self.attributes |= _attributes(node)
                todo += [found for name in _used(node) if (found := self._own(key[0], name))]

    def _own(self, module: str, name: str) -> Key | None:
        found = self.resolve(module, name)
        if found is None or found[1] is None or not self.is_own(found[0]):
            return None
        return found[0], found[1]

    def pruned(self, node: Definition) -> Definition:
        if not isinstance(node, ast.ClassDef):
            return node
        made = copy.copy(node)
        made.body = [part for part in node.body if self._stays(part)]
        return made

    def _stays(self, part: ast.stmt) -> bool:
        if isinstance(part, ast.ClassDef):
            return part.name != "Config"
        if isinstance(part, ast.FunctionDef):
            special = part.name.startswith("__") and part.name.endswith("__")
            return part.name not in NEVER and (special or part.name in self.attributes)
        return True

    def name_all(self) -> None:
        """Choose a name for everything kept, and collect the imports."""
        taken: dict[str, object] = {}
        for module, _ in self.kept:
            for name in sorted({n for key, node in self.kept.items() if key[0] == module for n in _used(node)}):
                found = self.resolve(module, name)
                if found is None or (module, name) in self.names:
                    continue
                if self.is_own(found[0]) and found[1] is not None:
                    self.names[module, name] = self._unique(found[1], found, taken, found[0])
                    continue
                top = found[0].split(".")[0]
                if top not in ALLOWED:
                    raise ModelError(
                        f"The model cannot be exported: {module} needs the package {top!r} to run it. An exported "
                        f"folder is read with PyTorch and timm alone."
                    )
                self.names[module, name] = self._unique(name, found, taken, module)
                self.imports[self.names[module, name]] = found
        for key in self.kept:
            self.names[key] = self._unique(key[1], key, taken, key[0])

    @staticmethod
    def _unique(name: str, thing: object, taken: dict[str, object], module: str) -> str:
        for candidate in (name, f"{name}_{module.rpartition('.')[2]}"):
            if taken.setdefault(candidate, thing) == thing:
                return candidate
        raise ModelError(f"The model cannot be exported: {module} has a second thing named {name!r}.")

    def ordered(self) -> list[Key]:
        """Everything kept, each after what its definition needs at once: bases, decorators, defaults, values."""
        done: dict[Key, None] = {}
        entered: set[Key] = set()

        def visit(key: Key, deep: bool) -> None:
            if key in done or key in entered:
                return
            entered.add(key)
            node = self.kept[key]
            whole = deep or isinstance(node, AT_ONCE)
            for name in sorted(_used(node) if whole else set(_at_once(node))):
                found = self._own(key[0], name)
                if found in self.kept and found is not None:
                    visit(found, whole)
            done[key] = None

        for key in self.kept:
            visit(key, False)
        return list(done)

    def text(self) -> str:
        lines = []
        for name, (module, inner) in sorted(self.imports.items(), key=lambda item: (item[1][0], item[1][1] or "")):
            if inner is None:
                lines.append(f"import {module}" + (f" as {name}" if name != module else ""))
            else:
                lines.append(f"from {module} import {inner}" + (f" as {name}" if name != inner else ""))
        parts, written = ["\n".join(lines)], set()
        for key in self.ordered():
            node = self.kept[key]
            if id(node) not in written:  # several names of one assignment
                written.add(id(node))
                parts.append(ast.unparse(_Renamed(self, key[0]).visit(ast.parse(ast.unparse(node)).body[0])))
        return "\n\n\n".join(parts) + "\n"


class _Renamed(ast.NodeTransformer):
    """Names of a module as the file has them."""

    def __init__(self, bundle: _Bundle, module: str):
        self.bundle, self.module = bundle, module

    def visit_Name(self, node: ast.Name) -> ast.Name:
        node.id = self.bundle.names.get((self.module, node.id), node.id)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._definition(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._definition(node)

    def _definition(self, node: ast.FunctionDef | ast.ClassDef) -> ast.AST:
        if node.col_offset == 0:
            node.name = self.bundle.names.get((self.module, node.name), node.name)
        return self.generic_visit(node)


def _used(node: ast.AST) -> set[str]:
    """Names that code reads, those in annotations left out: they are never evaluated."""
    return {n.id for n in _walk(node) if isinstance(n, ast.Name)}


def _bound(node: ast.Try) -> set[str]:
    """Names that a block imports or assigns."""
    aliases = {a.asname or a.name for n in ast.walk(node) if isinstance(n, ast.ImportFrom) for a in n.names}
    return aliases | {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _at_once(node: Definition) -> Iterator[str]:
    """Names that are read while the definition itself runs, not when what it defines is called."""
    parts: list[ast.AST] = []
    if isinstance(node, ast.ClassDef):
        parts = [*node.bases, *node.decorator_list, *(k.value for k in node.keywords)]
        for item in node.body:
            if isinstance(item, ast.FunctionDef | ast.ClassDef):
                yield from _at_once(item)
            else:
                parts.append(item)
    elif isinstance(node, ast.FunctionDef):
        parts = [*node.decorator_list, *node.args.defaults, *(d for d in node.args.kw_defaults if d)]
    for part in parts:
        yield from _used(part)


def _attributes(node: ast.AST) -> set[str]:
    """Names after a dot, and texts that may be such names (for getattr)."""
    found = {n.attr for n in _walk(node) if isinstance(n, ast.Attribute)}
    return found | {n.value for n in _walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but annotations."""
    yield node
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns", "type_comment"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _walk(child)


def bundle(roots: list[Any], whole: list[type]) -> str:
    """The source of a Python file that defines `roots` (classes and functions) and runs without cssbench. Of `whole`,
    classes too, every method stays.

    Raises ModelError when they need a package beyond PyTorch, torchvision, timm, safetensors, NumPy and Pillow.
    """
    keys = [(root.__module__, root.__qualname__) for root in [*roots, *whole]]
    made = _Bundle(frozenset({"cssbench", *(module.split(".")[0] for module, _ in keys)}))
    made.attributes |= {name for kind in whole for name in vars(kind)}
    made.reach(keys)
    made.name_all()
    return made.text()
