"""The house plan holds: a room imports only from rooms to its left, no file from its own door."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import llmprune

HOME = Path(llmprune.__file__).parent
ROOMS = (
    "base", "remote", "catalog", "recipe", "arch", "stats", "score", "mask", "solver",
    "allocation", "checkpoint", "calibration", "vocabulary", "walk", "hidden", "repair",
    "evaluation", "analysis", "delivery", "engine", "recovery", "report", "pages", "pushing",
    "asking", "steps", "resident_steps", "collecting", "recovering", "runs", "deltas", "measuring",
    "analyzing", "comparison", "comparing", "api", "commands", "cli",
)  # fmt: skip
FILES = sorted(HOME.rglob("*.py"))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    """Return the dotted name of a file of the package."""
    parts = path.relative_to(HOME.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def is_module(name: str) -> bool:
    """Tell whether a dotted name is a file or folder of the package."""
    path = HOME.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imported(nodes: Iterable[ast.AST]) -> Iterator[tuple[int, str]]:
    """Yield (line, module) of every import among these nodes."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the whole name of the module"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield node.lineno, whole if is_module(whole) else str(node.module)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)


def room_of(module: str) -> str | None:
    """Return the room of a module; none for the package itself and for other packages."""
    parts = module.split(".")
    return parts[1] if parts[0] == "llmprune" and len(parts) > 1 else None


def test_every_file_of_the_package_lies_in_a_known_room_at_most_two_deep() -> None:
    entrances = {"__init__", "__main__"}
    for path in FILES:
        parts = path.relative_to(HOME).with_suffix("").parts
        assert len(parts) <= 2, f"{path} lies too deep"
        assert parts[0] in ROOMS or parts[0] in entrances, f"{path} lies in no room of the order"


def test_a_room_imports_only_from_rooms_to_its_left() -> None:
    order = {room: place for place, room in enumerate(ROOMS)}
    wrong = []
    for path in FILES:
        own = room_of(module_name(path))
        if own not in order:
            continue
        for line, module in imported(ast.walk(parsed(path))):
            other = room_of(module)
            if other is not None and order[other] > order[own]:
                wrong.append(f"{path.relative_to(HOME.parent)}:{line} imports {module}")
    assert not wrong, "\n" + "\n".join(wrong)


def test_a_file_never_imports_the_door_of_its_own_room() -> None:
    wrong = []
    for path in FILES:
        name = module_name(path)
        room = room_of(name)
        if path.name == "__init__.py" or room is None or not (HOME / room).is_dir():
            continue
        for line, module in imported(ast.walk(parsed(path))):
            if module == f"llmprune.{room}":
                wrong.append(f"{path.relative_to(HOME.parent)}:{line} imports {module}")
    assert not wrong, "\n" + "\n".join(wrong)


def test_files_of_a_room_do_not_import_each_other_in_a_circle() -> None:
    edges: dict[str, set[str]] = {}
    for path in FILES:
        edges[module_name(path)] = {module for _, module in imported(parsed(path).body)}
    finished: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name in finished:
            return
        for other in sorted(edges.get(name, ())):
            visit(other, (*trail, name))
        finished.add(name)

    for name in edges:
        visit(name, ())


def test_no_file_and_no_room_has_the_name_of_a_function_that_it_exports() -> None:
    wrong = []
    for path in FILES:
        functions = {node.name for node in parsed(path).body if isinstance(node, ast.FunctionDef)}
        own = path.parent.name if path.name == "__init__.py" else path.stem
        if own in functions:
            wrong.append(str(path.relative_to(HOME.parent)))
    rooms = {path.name for path in HOME.iterdir() if path.is_dir()} | {
        path.stem for path in HOME.glob("*.py")
    }
    wrong += sorted(set(llmprune.__all__) & rooms)
    assert not wrong, "\n" + "\n".join(wrong)


def test_every_file_begins_with_a_sentence_about_its_purpose() -> None:
    for path in FILES:
        text = ast.get_docstring(parsed(path))
        assert text and text.partition("\n\n")[0].endswith((".", ".`")), f"{path}: say its purpose"
