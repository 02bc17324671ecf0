"""What a class has from its bases: documentation shows it with the class, as pydoc does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tasks.corpus.module_docs import (
    Inherited,
    ModuleDoc,
    is_public_name,
)


def with_inherited(
    modules: Mapping[str, ModuleDoc], members: Mapping[str, Mapping[str, str]]
) -> dict[str, ModuleDoc]:
    """The modules, each class with what it inherits from documented classes.

    members: of each module, public name → full name of where it is documented.
    """
    classes = {
        f"{module.name}.{class_doc.name}": (module, class_doc)
        for module in modules.values()
        for class_doc in module.classes
    }

    def line_of(full: str, seen: list[str]) -> list[str]:
        """Full names of the bases of a class and of theirs, nearest first."""
        module, class_doc = classes[full]
        for base in class_doc.bases:
            found = _resolve(base, module, members)
            if found in classes and found not in seen:
                seen.append(found)
                line_of(found, seen)
        return seen

    def inherited(full: str) -> tuple[Inherited, ...]:
        known = {method.name for method in classes[full][1].methods}
        groups = []
        for base in line_of(full, [full])[1:]:
            methods = [
                method
                for method in classes[base][1].methods
                if is_public_name(method.name) and method.doc and method.name not in known
            ]
            known.update(method.name for method in methods)
            if methods:
                groups.append(Inherited(base.removeprefix("builtins."), tuple(methods)))
        return tuple(groups)

    return {
        module.name: replace(
            module,
            classes=tuple(
                replace(class_doc, inherited=inherited(f"{module.name}.{class_doc.name}"))
                for class_doc in module.classes
            ),
        )
        for module in modules.values()
    }


def _resolve(base: str, module: ModuleDoc, members: Mapping[str, Mapping[str, str]]) -> str | None:
    """The full name of a base as a class statement writes it; None when nobody documents it."""
    written = base.partition("[")[0]
    prefix, _, name = written.rpartition(".")
    if prefix:
        alias = {e.name: e.origin for e in module.exports if not e.original}
        return members.get(alias.get(prefix, prefix), {}).get(name)
    own = members.get(module.name, {}).get(name)
    if own is not None:
        return own
    for export in module.exports:
        if export.name == name and export.original:
            return members.get(export.origin, {}).get(export.original)
    return members.get("builtins", {}).get(name)
