"""Modules with Python source: parsed, never imported.

Nothing runs, and a default value appears as its author wrote it.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tasks.corpus.extension_docs import import_extension, module_from_extension
from tasks.corpus.module_docs import (
    ClassDoc,
    Export,
    FunctionDoc,
    ModuleDoc,
    clean_doc,
    is_public_name,
    split_signature,
)


def library_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


@cache
def parse_source(path: Path) -> tuple[ast.Module, str] | None:
    """The tree and text of a source file; None for one this interpreter cannot parse."""
    try:
        source = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        source = path.read_text(encoding="latin-1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source), source
    except SyntaxError:
        return None


def module_from_source(name: str, package: bool, tree: ast.Module, source: str) -> ModuleDoc:
    lines = source.splitlines()
    functions: dict[str, FunctionDoc] = {}
    classes: dict[str, ClassDoc] = {}
    for node in _statements(tree.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and is_public_name(node.name):
            functions.setdefault(node.name, _function(node, lines, method=False))
        elif isinstance(node, ast.ClassDef) and is_public_name(node.name):
            classes.setdefault(node.name, _class(node, lines))
    doc = _docstring(tree)
    public, complete = _literal_all(tree)
    exports: list[Export] = []
    for node in _statements(tree.body):
        if isinstance(node, ast.Import):
            exports += [Export(a.asname, a.name, "") for a in node.names if a.asname]
        if not isinstance(node, ast.ImportFrom):
            continue
        module = _absolute(node, name, package)
        if not _is_private(module):
            for alias in node.names:
                exports.append(Export(alias.asname or alias.name, module, alias.name))
        elif origin := _implementation(module):
            for alias in node.names:
                if alias.name == "*":
                    wanted = [(n, n) for n in origin.names if not complete or n in public]
                else:
                    exported = alias.asname or alias.name
                    wanted = [(alias.name, exported)] if not public or exported in public else []
                for original, exported in wanted:
                    if not is_public_name(exported):
                        continue
                    if original in origin.functions:
                        functions.setdefault(exported, origin.functions[original])
                    elif original in origin.classes:
                        classes.setdefault(exported, origin.classes[original])
                if alias.name == "__doc__" and not doc:
                    doc = origin.doc
    for exported in functions.keys() & classes.keys():
        del functions[exported]
    return ModuleDoc(
        name,
        doc or _leading_comment(lines),
        tuple(functions[n] for n in sorted(functions)),
        tuple(classes[n] for n in sorted(classes)),
        _imports(tree, name, package),
        tuple(exports),
        public,
        source,
    )


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Top-level statements, looking into `if` and `try` as the import system would."""
    for node in body:
        if isinstance(node, ast.If):
            yield from _statements(node.body)
            yield from _statements(node.orelse)
        elif isinstance(node, ast.Try):
            yield from _statements(node.body)
            yield from _statements(node.orelse)
            for handler in node.handlers:
                yield from _statements(handler.body)
        else:
            yield node


@dataclass(frozen=True)
class _Implementation:
    """What a private module (`_struct`, `_collections_abc`, `posix`) lends to a public one."""

    doc: str
    functions: dict[str, FunctionDoc]
    classes: dict[str, ClassDoc]

    @property
    def names(self) -> list[str]:
        return sorted(self.functions.keys() | self.classes.keys())


def _absolute(node: ast.ImportFrom, name: str, package: bool) -> str:
    """The module that `from … import` in module `name` names."""
    base = node.module or ""
    if not node.level:
        return base
    parent = (name if package else name.rpartition(".")[0]).split(".")
    return ".".join([*parent[: len(parent) - node.level + 1], *([base] if base else [])])


def _is_private(module: str) -> bool:
    return module.rpartition(".")[2].startswith("_") or module == "posix"


@cache
def _implementation(name: str) -> _Implementation | None:
    if name in _being_read:
        return None  # private modules may import each other
    _being_read.add(name)
    try:
        return _read_implementation(name)
    finally:
        _being_read.remove(name)


_being_read: set[str] = set()


def _read_implementation(name: str) -> _Implementation | None:
    path = library_root() / f"{name.replace('.', '/')}.py"
    if path.is_file():
        parsed = parse_source(path)
        if parsed is None:
            return None
        module = module_from_source(name, False, *parsed)
    else:
        extension = import_extension(name)
        if extension is None:
            return None
        module = module_from_extension(name, extension)
    return _Implementation(
        module.doc, {f.name: f for f in module.functions}, {c.name: c for c in module.classes}
    )


def _docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return clean_doc(ast.get_docstring(node, clean=False) or "")


def _leading_comment(lines: list[str]) -> str:
    """Old modules describe themselves in a comment at the top instead of a docstring."""
    comment: list[str] = []
    for line in lines:
        if line.startswith("#!") or re.match(r"#.*coding[:=]", line):
            continue
        if line.startswith("#"):
            comment.append(line.lstrip("#").removeprefix(" "))
        elif line.strip() or any(c.strip() for c in comment):
            break
    return _comment_text(comment)


def _comment_above(lines: list[str], first_line: int) -> str:
    comment: list[str] = []
    indent = lines[first_line - 1][: -len(lines[first_line - 1].lstrip())]
    for line in reversed(lines[: first_line - 1]):
        if not line.startswith(indent + "#"):
            break
        comment.append(line.strip().lstrip("#").removeprefix(" "))
    return _comment_text(comment[::-1])


def _comment_text(comment: list[str]) -> str:
    """Rulers and boxes drawn with punctuation are dropped; fewer than four words say nothing."""
    text = "\n".join("" if not re.search(r"\w", line) else line for line in comment)
    return clean_doc(text) if len(text.split()) >= 4 else ""


def _function(
    node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str], method: bool
) -> FunctionDoc:
    decorators = {ast.unparse(d).split("(")[0].rsplit(".", 1)[-1] for d in node.decorator_list}
    arguments = node.args
    bound = method and "staticmethod" not in decorators
    kind = "coroutine" if isinstance(node, ast.AsyncFunctionDef) else "function"
    if method:
        kind = "method"
        if decorators & {"property", "cached_property", "abstractproperty"}:
            kind = "property"
        elif "classmethod" in decorators or node.name == "__new__":
            kind = "class method"
        elif "staticmethod" in decorators:
            kind = "static method"
    signature = "" if kind == "property" else f"({_arguments(arguments, bound)})"
    if node.returns is not None and kind != "property":
        signature += f" -> {ast.unparse(node.returns)}"
    first_line = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    doc = split_signature(node.name, _docstring(node))[1] or _comment_above(lines, first_line)
    return FunctionDoc(node.name, kind, signature, doc)


def _arguments(arguments: ast.arguments, bound: bool) -> str:
    text = ast.unparse(arguments)
    if not bound or not (arguments.posonlyargs or arguments.args):
        return text
    head, *rest = text.split(", ")
    # `self, /, ...` leaves the slash without an argument before it.
    if rest[:1] == ["/"]:
        rest = rest[1:]
    return ", ".join(rest) if "=" not in head else text


def _class(node: ast.ClassDef, lines: list[str]) -> ClassDoc:
    methods: dict[str, FunctionDoc] = {}
    signature, extra = "", ""
    for child in _statements(node.body):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if any(
            isinstance(d, ast.Attribute) and d.attr in ("setter", "deleter", "getter")
            for d in child.decorator_list
        ):
            continue
        function = _function(child, lines, method=True)
        if child.name in ("__init__", "__new__"):
            if not signature or child.name == "__init__":
                signature, extra = function.signature, _docstring(child)
        elif is_public_name(child.name) or (child.name.startswith("__") and _docstring(child)):
            methods.setdefault(child.name, function)
    doc = _docstring(node) or _comment_above(
        lines, min([node.lineno, *(d.lineno for d in node.decorator_list)])
    )
    if extra and extra not in doc:
        doc = f"{doc}\n\n{extra}".strip()
    return ClassDoc(
        node.name,
        tuple(ast.unparse(base) for base in node.bases),
        signature.removesuffix(" -> None"),
        doc,
        tuple(methods[n] for n in sorted(methods)),
    )


def _imports(tree: ast.Module, name: str, package: bool) -> tuple[str, ...]:
    """Public modules this one imports at its top level, absolute names."""
    found: set[str] = set()
    for node in _statements(tree.body):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, name, package)
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return tuple(sorted(found - {name, ""}))


def _literal_all(tree: ast.Module) -> tuple[frozenset[str], bool]:
    """The names `__all__` spells out, and whether they are all of it (no `extend`, no `+=`)."""
    names: frozenset[str] = frozenset()
    complete = False
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            try:
                names, complete = frozenset(ast.literal_eval(node.value)), True
            except (ValueError, TypeError):
                return frozenset(), False
        elif isinstance(node, ast.AugAssign | ast.Expr | ast.For | ast.If | ast.Try) and any(
            isinstance(n, ast.Name) and n.id == "__all__" for n in ast.walk(node)
        ):
            complete = False
    return names, complete
