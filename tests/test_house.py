"""The rules of the house: who may import whom."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("flows", "tasks", "model", "serve")
MODEL_MAY_IMPORT = {"torch", "numpy", "pyarrow", "safetensors", "sentencepiece", "model"}
# Imported where a byte-level vocabulary is met, and nowhere else.
MODEL_MAY_NEED = {"model/byte_level.py": "tokenizers"}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every imported module of a file, also inside functions; relative names made absolute."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                package = path.relative_to(ROOT).parts[: -node.level]
                yield node.lineno, ".".join([*package, node.module or ""])
            else:
                yield node.lineno, node.module or ""
                for alias in node.names:
                    yield node.lineno, f"{node.module}.{alias.name}"


def violations(room: str, allowed: object) -> list[str]:
    assert callable(allowed)
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sorted((ROOT / room).rglob("*.py"))
        for line, name in imports(path)
        if not allowed(path, name)
    ]


def test_model_runs_on_a_bare_machine() -> None:
    import sys

    def allowed(path: Path, name: str) -> bool:
        top = name.split(".")[0]
        extra = MODEL_MAY_NEED.get(str(path.relative_to(ROOT)))
        return top in MODEL_MAY_IMPORT or top in sys.stdlib_module_names or top == extra

    assert violations("model", allowed) == []


def test_tasks_import_neither_serve_nor_flows() -> None:
    assert violations("tasks", lambda _, n: n.split(".")[0] not in ("serve", "flows")) == []


def test_serve_imports_only_the_doors_it_may() -> None:
    def allowed(_: Path, name: str) -> bool:
        top = name.split(".")[0]
        if top == "tasks":
            doors = ("tasks.registry", "tasks.state", "tasks.runtime")
            return name == "tasks" or name.startswith(doors)
        return top != "flows"

    assert violations("serve", allowed) == []


def test_only_the_runtime_talks_to_ray_init_and_jobs() -> None:
    def allowed(path: Path, name: str) -> bool:
        inside = path.is_relative_to(ROOT / "tasks" / "runtime")
        return inside or not name.startswith("ray.job_submission")

    assert violations("tasks", allowed) == []
    calls = [
        f"{path.relative_to(ROOT)}:{number}"
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "ray.init(" in line and not path.is_relative_to(ROOT / "tasks" / "runtime")
    ]
    assert calls == []


def test_only_the_registry_talks_to_mlflow() -> None:
    for room in ROOMS:

        def allowed(path: Path, name: str) -> bool:
            inside = path.is_relative_to(ROOT / "tasks" / "registry")
            return inside or name.split(".")[0] != "mlflow"

        assert violations(room, allowed) == []
