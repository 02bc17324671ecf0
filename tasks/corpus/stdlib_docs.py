"""The standard library's documentation as data, read from the installed interpreter.

Modules with Python source are parsed (`ast`), never imported: nothing runs, and a default value
appears as its author wrote it. Modules written in C have no source, so their docstrings and
`__text_signature__` are read from the imported module. Reprs of live values never enter: a naive
pydoc rendering prints host paths, object addresses and even `os.environ`, and a model trained on
the pages would learn them.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import sysconfig
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

# Tests and applications (an editor, demos) that happen to be installed beside the library, and
# modules that only repeat another page (posix is documented as os) or hold data.
SKIPPED_DIRECTORIES = frozenset(
    {"test", "tests", "idle_test", "site-packages", "idlelib", "turtledemo", "pydoc_data"}
    | {"ensurepip"}
)
SKIPPED_MODULES = frozenset({"antigravity", "this", "posix", "nt", "xxsubtype"})


@dataclass(frozen=True)
class FunctionDoc:
    """`signature` starts at the parenthesis, `(text, width=70)`; a property has none."""

    name: str
    kind: str  # "function", "coroutine", "method", "class method", "static method", "property"
    signature: str
    doc: str


@dataclass(frozen=True)
class ClassDoc:
    name: str
    bases: tuple[str, ...]
    signature: str
    doc: str
    methods: tuple[FunctionDoc, ...]


@dataclass(frozen=True)
class ModuleDoc:
    name: str
    doc: str
    functions: tuple[FunctionDoc, ...]
    classes: tuple[ClassDoc, ...]
    imports: tuple[str, ...] = ()
    source: str | None = field(default=None, repr=False)

    @property
    def summary(self) -> str:
        return first_sentence(self.doc)

    @property
    def is_empty(self) -> bool:
        return not (self.doc or self.functions or self.classes)


def read_modules() -> list[ModuleDoc]:
    """Every public standard-library module of this interpreter, sorted by name."""
    found: dict[str, ModuleDoc] = {}
    for name, path in _python_modules(_library_root()):
        parsed = _parse(path)
        if parsed is not None:
            found[name] = _module_from_source(name, path.name == "__init__.py", *parsed)
    for name in sorted(sys.stdlib_module_names):
        if name not in found and not name.startswith("_") and name not in SKIPPED_MODULES:
            module = _import_extension(name)
            if module is not None:
                found[name] = _module_from_extension(name, module)
    return [found[name] for name in sorted(found) if not found[name].is_empty]


def first_sentence(doc: str) -> str:
    """The docstring's first sentence on one line, or its first paragraph when it has no full stop.

    Lines that only repeat a call form, `max(arg1, arg2, *args, *[, key=func]) -> value`, are passed
    over.
    """
    text = (
        re.sub(r"\A(?:\s*(?:async )?[\w.]+\([^\n]*\)(?: *-+> ?[^\n]*)?(?:\n|\Z))+", "", doc) or doc
    )
    text = " ".join(text.strip().split("\n\n", 1)[0].split())
    for end in re.finditer(r"[.!?](?=\s+[A-Z(\[`\"']|$)", text):
        sentence = text[: end.end()]
        if not re.search(r"\b(?:e\.g|i\.e|etc|vs|cf)\.$", sentence):
            return sentence
    return text


def _library_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _python_modules(directory: Path, prefix: str = "") -> Iterator[tuple[str, Path]]:
    for path in sorted(directory.iterdir()):
        stem = path.stem if path.suffix == ".py" else path.name
        name = prefix + stem
        if stem.startswith("_") or not stem.isidentifier() or name in SKIPPED_MODULES:
            continue
        if not prefix and stem not in sys.stdlib_module_names:
            continue
        if path.suffix == ".py":
            yield name, path
        elif path.is_dir() and stem not in SKIPPED_DIRECTORIES:
            initial = path / "__init__.py"
            if initial.is_file():
                yield name, initial
                yield from _python_modules(path, name + ".")


@cache
def _parse(path: Path) -> tuple[ast.Module, str] | None:
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


# --- modules with source -------------------------------------------------------------------------


def _module_from_source(name: str, package: bool, tree: ast.Module, source: str) -> ModuleDoc:
    lines = source.splitlines()
    functions: dict[str, FunctionDoc] = {}
    classes: dict[str, ClassDoc] = {}
    for node in _statements(tree.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _public(node.name):
            functions.setdefault(node.name, _function(node, lines, method=False))
        elif isinstance(node, ast.ClassDef) and _public(node.name):
            classes.setdefault(node.name, _class(node, lines))
    doc = _docstring(tree)
    public, complete = _literal_all(tree)
    for node in _statements(tree.body):
        if isinstance(node, ast.ImportFrom) and _private_implementation(node):
            origin = _implementation(str(node.module))
            if origin is None:
                continue
            for alias in node.names:
                if alias.name == "*":
                    wanted = [(n, n) for n in origin.names if not complete or n in public]
                else:
                    exported = alias.asname or alias.name
                    wanted = [(alias.name, exported)] if not public or exported in public else []
                for original, exported in wanted:
                    if not _public(exported):
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


def _public(name: str) -> bool:
    return not name.startswith("_")


def _docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return _clean(ast.get_docstring(node, clean=False) or "")


def _clean(doc: str) -> str:
    text = inspect.cleandoc(doc)
    return "".join(c for c in text if c in "\n\t" or (ord(c) >= 32 and c != "\x7f")).strip()


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
    return _clean(text) if len(text.split()) >= 4 else ""


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
    doc = _split_signature(node.name, _docstring(node))[1] or _comment_above(lines, first_line)
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
        elif _public(child.name) or (child.name.startswith("__") and _docstring(child)):
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
    parent = name if package else name.rpartition(".")[0]
    for node in _statements(tree.body):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                ancestors = parent.split(".")[: len(parent.split(".")) - node.level + 1]
                base = ".".join([*ancestors, *([base] if base else [])])
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


# --- modules and names implemented in C ----------------------------------------------------------


@dataclass(frozen=True)
class _Implementation:
    """What a private module (`_struct`, `_collections_abc`, `posix`) lends to a public one."""

    doc: str
    functions: dict[str, FunctionDoc]
    classes: dict[str, ClassDoc]

    @property
    def names(self) -> list[str]:
        return sorted(self.functions.keys() | self.classes.keys())


def _private_implementation(node: ast.ImportFrom) -> bool:
    module = node.module or ""
    return node.level == 0 and (module.startswith("_") or module == "posix")


@cache
def _implementation(name: str) -> _Implementation | None:
    path = _library_root() / f"{name}.py"
    if path.is_file():
        parsed = _parse(path)
        if parsed is None:
            return None
        module = _module_from_source(name, False, *parsed)
    else:
        extension = _import_extension(name)
        if extension is None:
            return None
        module = _module_from_extension(name, extension)
    return _Implementation(
        module.doc, {f.name: f for f in module.functions}, {c.name: c for c in module.classes}
    )


def _import_extension(name: str) -> types.ModuleType | None:
    """A module written in C, imported; None where this interpreter was built without it."""
    if name not in sys.stdlib_module_names:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError:
        return None


def _module_from_extension(name: str, module: types.ModuleType) -> ModuleDoc:
    functions, classes = [], []
    for attribute in sorted(vars(module)):
        if not _public(attribute):
            continue
        # Programs replace hooks such as sys.excepthook; sys.__excepthook__ is still the original.
        value = vars(module).get(f"__{attribute}__", vars(module)[attribute])
        if inspect.isbuiltin(value):
            functions.append(_builtin(attribute, value, "function"))
        elif isinstance(value, type) and value.__name__ == attribute:
            classes.append(_builtin_class(attribute, value))
    return ModuleDoc(name, _clean(module.__doc__ or ""), tuple(functions), tuple(classes))


def _builtin_class(name: str, value: type) -> ClassDoc:
    methods = []
    for attribute in sorted(vars(value)):
        member = vars(value)[attribute]
        # Slots of C types carry the same sentence on every type ("Return self==value.").
        if not _public(attribute):
            continue
        if isinstance(member, classmethod | types.ClassMethodDescriptorType):
            methods.append(_builtin(attribute, getattr(value, attribute), "class method"))
        elif isinstance(member, staticmethod):
            methods.append(_builtin(attribute, member.__func__, "static method"))
        elif inspect.ismethoddescriptor(member):
            methods.append(_builtin(attribute, member, "method"))
        elif inspect.isdatadescriptor(member) and isinstance(member.__doc__, str):
            methods.append(FunctionDoc(attribute, "property", "", _clean(member.__doc__)))
    own = _builtin(name, value, "function")
    signature = own.signature.partition(" ->")[0]
    bases = tuple(base.__name__ for base in value.__bases__ if base is not object)
    return ClassDoc(name, bases, signature, own.doc, tuple(methods))


def _builtin(name: str, value: object, kind: str) -> FunctionDoc:
    doc = _clean(value.__doc__ if isinstance(value.__doc__, str) else "")
    written, doc = _split_signature(name, doc)
    text = getattr(value, "__text_signature__", None)
    if not isinstance(text, str):
        return FunctionDoc(name, kind, written, doc)
    text = re.sub(r"\(\$\w+(?:, /)?(?:, )?", "(", text, count=1)
    text = text.replace("<unrepresentable>", "...")
    return FunctionDoc(name, kind, " ".join(text.split()), doc)


def _split_signature(name: str, doc: str) -> tuple[str, str]:
    """Old docstrings open with their own signature: `getattr(object, name[, default]) -> value`.

    Returns (signature, rest of the docstring); signature is empty where there is none.
    """
    head, _, rest = doc.partition("\n")
    if f"{name}(" not in head:
        return "", doc
    while head.count("(") > head.count(")") and rest:
        line, _, rest = rest.partition("\n")
        head = f"{head} {line.strip()}"
    match = re.match(rf"(?:\w+\.)*{re.escape(name)}(\(.*\).*)$", head)
    if match is None:
        return "", doc
    signature = match.group(1).rstrip(" :.").replace("-->", "->")
    described = re.match(r"(\([^()]*\)(?: ?->[^:.]*?)?)(?:\s+--?|:)\s+(.+)$", match.group(1))
    if described:
        return described.group(1).strip(), f"{described.group(2)}\n{rest}".strip()
    if re.match(r"\(.*\)\s*(?:->.*)?$", signature) is None:
        return "", doc  # a sentence that happens to begin with a call
    return signature, rest.strip() or doc
