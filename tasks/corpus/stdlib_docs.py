"""The standard library's documentation as data, read from the installed interpreter.

Reprs of live values never enter: a naive pydoc rendering prints host paths, object addresses and
even `os.environ`, and a model trained on the pages would learn them.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from tasks.corpus.extension_docs import import_extension, module_from_extension
from tasks.corpus.inheritance import with_inherited
from tasks.corpus.module_docs import ModuleDoc, first_sentence, is_public_name
from tasks.corpus.source_docs import library_root, module_from_source, parse_source

__all__ = ["first_sentence", "read_modules"]

# Tests and applications (an editor, demos) that happen to be installed beside the library, and
# modules that only repeat another page (posix is documented as os) or hold data.
SKIPPED_DIRECTORIES = frozenset(
    {"test", "tests", "idle_test", "site-packages", "idlelib", "turtledemo", "pydoc_data"}
    | {"ensurepip"}
)
MOST_NAMES = 3
SKIPPED_MODULES = frozenset({"antigravity", "this", "posix", "nt", "xxsubtype"})


def read_modules() -> list[ModuleDoc]:
    """Every public standard-library module of this interpreter, sorted by name."""
    found: dict[str, ModuleDoc] = {}
    for name, path in _python_modules(library_root()):
        parsed = parse_source(path)
        if parsed is not None:
            found[name] = module_from_source(name, path.name == "__init__.py", *parsed)
    for name in sorted(sys.stdlib_module_names):
        if name not in found and not name.startswith("_") and name not in SKIPPED_MODULES:
            module = import_extension(name)
            if module is not None:
                found[name] = module_from_extension(name, module)
    members: dict[str, dict[str, str]] = {}
    for documented in found.values():
        _members(documented, found, members)
    found = with_inherited(found, members)
    named = other_names(found)
    return [_with_names(found[name], named) for name in sorted(found) if not found[name].is_empty]


def other_names(modules: Mapping[str, ModuleDoc]) -> dict[str, list[str]]:
    """Full name of a function or class → the other names it is imported by, shortest first.

    `asyncio.run` is what people call `asyncio.runners.run`, `os.path.join` is `posixpath.join`.
    """
    found: dict[str, set[str]] = defaultdict(set)
    members: dict[str, dict[str, str]] = {}
    for module in modules.values():
        for name, owner in _members(module, modules, members).items():
            found[owner].add(f"{module.name}.{name}")
        places: set[str] = set()
        for export in module.exports:
            inner = modules.get(export.origin)
            if export.original or inner is None or export.name not in module.public - places:
                continue
            places.add(export.name)
            for name, owner in _members(inner, modules, members).items():
                found[owner].add(f"{module.name}.{export.name}.{name}")
    return {
        owner: sorted(names - {owner}, key=lambda name: (len(name), name))
        for owner, names in found.items()
        if names - {owner}
    }


def _members(
    module: ModuleDoc, modules: Mapping[str, ModuleDoc], known: dict[str, dict[str, str]]
) -> dict[str, str]:
    """Public name → full name of where it is documented, re-exports followed.

    `known` remembers every module's answer; a module asked again while its own is being found
    (an import cycle) answers with what it has so far.
    """
    if module.name in known:
        return known[module.name]
    members = known[module.name] = {n: f"{module.name}.{n}" for n in module.own_names}
    below = module.name + "."
    for export in module.exports:
        origin = modules.get(export.origin)
        if origin is None or origin is module or not export.original:
            continue
        inner = _members(origin, modules, known)
        everything = export.original == "*"
        names = origin.public & inner.keys() if everything else {export.original} & inner.keys()
        for original in sorted(names):
            name = original if everything else export.name
            # A package re-exports its own parts; anything else is only imported for use.
            if is_public_name(name) and (name in module.public or origin.name.startswith(below)):
                members.setdefault(name, inner[original])
    missing = module.public - members.keys()
    if missing and any(name.startswith(below) for name in modules):
        # Packages may load a part only when it is asked for.
        for part in modules.values():
            if part.name.rpartition(".")[0] == module.name:
                for name in sorted(missing & part.own_names):
                    members.setdefault(name, f"{part.name}.{name}")
    return members


def _with_names(module: ModuleDoc, names: Mapping[str, list[str]]) -> ModuleDoc:
    return replace(
        module,
        functions=tuple(
            replace(f, also=tuple(names.get(f"{module.name}.{f.name}", ()))[:MOST_NAMES])
            for f in module.functions
        ),
        classes=tuple(
            replace(c, also=tuple(names.get(f"{module.name}.{c.name}", ()))[:MOST_NAMES])
            for c in module.classes
        ),
    )


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
