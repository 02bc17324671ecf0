"""Modules written in C: they have no source, so docstrings and signatures are read from the import.

Only `__doc__` and `__text_signature__` are read, never the repr of a value.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import types
import warnings

from tasks.corpus.module_docs import (
    ClassDoc,
    FunctionDoc,
    ModuleDoc,
    clean_doc,
    is_public_name,
    split_signature,
)


def import_extension(name: str) -> types.ModuleType | None:
    """A module written in C, imported; None where this interpreter was built without it."""
    if name not in sys.stdlib_module_names:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError:
        return None


def module_from_extension(name: str, module: types.ModuleType) -> ModuleDoc:
    functions, classes = [], []
    for attribute in sorted(vars(module)):
        if not is_public_name(attribute):
            continue
        # Programs replace hooks such as sys.excepthook; sys.__excepthook__ is still the original.
        value = vars(module).get(f"__{attribute}__", vars(module)[attribute])
        if inspect.isbuiltin(value):
            functions.append(_builtin(attribute, value, "function"))
        elif isinstance(value, type) and value.__name__ == attribute:
            classes.append(_builtin_class(attribute, value))
    return ModuleDoc(name, clean_doc(module.__doc__ or ""), tuple(functions), tuple(classes))


def _builtin_class(name: str, value: type) -> ClassDoc:
    methods = []
    for attribute in sorted(vars(value)):
        member = vars(value)[attribute]
        # Slots of C types carry the same sentence on every type ("Return self==value.").
        if not is_public_name(attribute):
            continue
        if isinstance(member, classmethod | types.ClassMethodDescriptorType):
            methods.append(_builtin(attribute, getattr(value, attribute), "class method"))
        elif isinstance(member, staticmethod):
            methods.append(_builtin(attribute, member.__func__, "static method"))
        elif inspect.ismethoddescriptor(member):
            methods.append(_builtin(attribute, member, "method"))
        elif inspect.isdatadescriptor(member) and isinstance(member.__doc__, str):
            methods.append(FunctionDoc(attribute, "property", "", clean_doc(member.__doc__)))
    own = _builtin(name, value, "function")
    signature = own.signature.partition(" ->")[0]
    bases = tuple(base.__name__ for base in value.__bases__ if base is not object)
    return ClassDoc(name, bases, signature, own.doc, tuple(methods))


def _builtin(name: str, value: object, kind: str) -> FunctionDoc:
    doc = clean_doc(value.__doc__ if isinstance(value.__doc__, str) else "")
    written, doc = split_signature(name, doc)
    text = getattr(value, "__text_signature__", None)
    if not isinstance(text, str):
        return FunctionDoc(name, kind, written, doc)
    text = re.sub(r"\(\$\w+(?:, /)?(?:, )?", "(", text, count=1)
    text = text.replace("<unrepresentable>", "...")
    return FunctionDoc(name, kind, " ".join(text.split()), doc)
