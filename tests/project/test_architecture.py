"""Imports go down only, the pure parts stay pure, and no file or function grows past its limit.

The source is read as text; nothing of kvswap is imported. The last tests apply the rules to small trees that break
them, so that a rule that finds nothing any more is noticed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "kvswap"

# From the top. A room imports only from rows below its own, or from itself.
ROOMS = (
    ("front",),
    ("cli",),
    ("lab", "serve"),
    ("tuning",),
    ("app",),
    ("sessions",),
    ("core",),
    ("models",),
    ("memory", "weights"),
    ("store",),
    ("selection", "disk"),
    ("native",),
    ("words",),
)
FOLDERS = {room for row in ROOMS for room in row} - {"front", "words"}
RANK = {room: rank for rank, row in enumerate(ROOMS) for room in row}
FRONT = ("__init__", "__main__")
WORDS = ("config", "errors", "terms", "units")
"""Loose modules: the package's own door, and the words that every room uses."""

PURE = ("store.layout", "store.read_plan", "selection.window", "memory.budget", "tuning.cost", "terms", "units")
IMPURE_LIBRARIES = ("torch", "os")
TRANSFORMERS_USERS = ("models", "core")
QUICK_TO_LOAD = (
    *("__init__", "cli", "tuning.machine", "tuning.measure_disk", "disk", "config"),
    *("sessions.catalog", "sessions.check", "sessions.sharing", "sessions.quota", "sessions.export_import"),
)
SLOW_LIBRARIES = {"torch", "transformers"}

FILE_LINES = 400
FUNCTION_LINES = 60

Modules = dict[str, ast.Module]


def load(root: Path) -> Modules:
    """Syntax trees by dotted name below the package: ``cli.doctor``; a folder's ``__init__`` has the folder's name."""
    trees = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts if len(parts) == 1 or parts[-1] != "__init__" else parts[:-1])
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def nodes(tree: ast.AST, *, when_loaded: bool) -> Iterator[ast.AST]:
    """All nodes, or only those that run when the module is loaded."""
    for child in ast.iter_child_nodes(tree):
        if when_loaded and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if when_loaded and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from nodes(child, when_loaded=when_loaded)


def imports(modules: Modules, name: str, *, when_loaded: bool = False) -> set[str]:
    """What a module imports: ``numpy.typing`` for others, ``kvswap.disk.files`` for ours, whole modules."""
    found: set[str] = set()
    for node in nodes(modules[name], when_loaded=when_loaded):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import in line {node.lineno}; write the whole name"
            source = node.module or ""
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                found.add(whole if whole.removeprefix("kvswap.") in modules else source)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module"):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return found


def own_imports(modules: Modules, name: str, *, when_loaded: bool = False) -> set[str]:
    """Modules of kvswap that a module imports, as names of ``load``."""
    found = imports(modules, name, when_loaded=when_loaded)
    ours = {full.removeprefix("kvswap").removeprefix(".") for full in found if full.split(".")[0] == "kvswap"}
    return {own or "__init__" for own in ours}


def reach(modules: Modules, name: str, *, when_loaded: bool = False) -> set[str]:
    """The module and everything of kvswap that it imports, directly or not."""
    seen: set[str] = set()
    waiting = {name}
    while waiting:
        current = waiting.pop()
        if current in modules and current not in seen:
            seen.add(current)
            waiting |= own_imports(modules, current, when_loaded=when_loaded)
    return seen


def inside(name: str, parts: tuple[str, ...]) -> bool:
    return any(name == part or name.startswith(part + ".") for part in parts)


def room_of(name: str) -> str:
    """The room that a module is in; empty for one that is in none."""
    if name in FRONT:
        return "front"
    if name in WORDS:
        return "words"
    top = name.partition(".")[0]
    return top if top in FOLDERS else ""


def upward(modules: Modules) -> list[str]:
    wrong = []
    for name in modules:
        room = room_of(name)
        if not room:
            wrong.append(f"{name} is in no room: put it into one of the folders, or add a folder to ROOMS")
            continue
        for target in sorted(own_imports(modules, name)):
            other = room_of(target)
            if other != room and RANK.get(other, -1) <= RANK[room]:
                wrong.append(f"{name} imports {target}, which is not below it")
    return wrong


def impure(modules: Modules) -> list[str]:
    wrong = []
    for name in modules:
        for other in sorted(reach(modules, name)) if inside(name, PURE) else ():
            libraries = {full.split(".")[0] for full in imports(modules, other)} & set(IMPURE_LIBRARIES)
            via = "" if other == name else f" through {other}"
            wrong += [f"{name} is pure but imports {library}{via}" for library in sorted(libraries)]
    return wrong


def users_of_transformers(modules: Modules) -> set[str]:
    return {name for name in modules if any(full.split(".")[0] == "transformers" for full in imports(modules, name))}


def slow_to_load(modules: Modules) -> list[str]:
    """What --help and doctor load, because they have to be quick."""
    wrong = []
    for name in modules:
        for other in sorted(reach(modules, name, when_loaded=True)) if inside(name, QUICK_TO_LOAD) else ():
            libraries = {full.split(".")[0] for full in imports(modules, other, when_loaded=True)}
            wrong += [
                f"loading {name} loads {library} through {other}" for library in sorted(libraries & SLOW_LIBRARIES)
            ]
    return wrong


def too_long(root: Path) -> list[str]:
    wrong = []
    for path in sorted(root.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        count = len(text.splitlines())
        if count > FILE_LINES:
            wrong.append(f"{path.relative_to(root)}: {count} lines, {FILE_LINES} are allowed")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = (node.end_lineno or node.lineno) - node.lineno + 1
                if count > FUNCTION_LINES:
                    place = f"{path.relative_to(root)}: {node.name}"
                    wrong.append(f"{place} has {count} lines, {FUNCTION_LINES} are allowed")
    return wrong


@pytest.fixture(scope="module")
def modules() -> Modules:
    return load(SOURCE)


def test_imports_go_down(modules: Modules) -> None:
    assert upward(modules) == []


def test_pure_parts_import_neither_torch_nor_os(modules: Modules) -> None:
    assert impure(modules) == []


def test_transformers_stays_at_the_model(modules: Modules) -> None:
    assert [name for name in users_of_transformers(modules) if not inside(name, TRANSFORMERS_USERS)] == []


def test_command_line_loads_without_torch(modules: Modules) -> None:
    assert slow_to_load(modules) == []


def test_files_and_functions_keep_their_size() -> None:
    assert too_long(SOURCE) == []


def test_every_rule_still_sees_the_source(modules: Modules) -> None:
    assert "store.layout" in modules
    assert {"disk.backend", "store.layout"} <= own_imports(modules, "store.groups")
    assert inside("memory.budget", PURE)
    assert "models.adapter" in users_of_transformers(modules)


def plant(root: Path, **files: str) -> Modules:
    for name, text in files.items():
        path = root / (name if name in FRONT else name.replace("__", "/"))
        path = path.with_suffix(".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return load(root)


@pytest.mark.parametrize(
    "files",
    [
        {"disk__files": "from kvswap.store.layout import GroupLayout", "store__layout": ""},
        {"disk__files": "from kvswap.store import layout", "store__layout": ""},
        {"disk__files": "def late():\n    import kvswap.store.layout", "store__layout": ""},
        {"disk__files": "import importlib\nimportlib.import_module('kvswap.app.engine')", "app__engine": ""},
        {"disk__files": "from kvswap.selection import choose", "selection__choose": ""},  # beside it, not below
        {"core__attach": "from kvswap.lab.rivals import find", "lab__rivals": ""},
        {"errors": "from kvswap.disk.files import free_bytes", "disk__files": ""},
        {"app__engine": "from kvswap import load"},
        {"helpers": ""},
    ],
)
def test_upward_import_is_found(files: dict[str, str], tmp_path: Path) -> None:
    assert len(upward(plant(tmp_path, **files))) == 1


def test_downward_imports_are_free(tmp_path: Path) -> None:
    planted = plant(
        tmp_path,
        __main__="from kvswap.cli.doctor import doctor",
        cli__doctor="from kvswap.tuning.machine import facts\nfrom kvswap.errors import UserError",
        tuning__machine="import os\nimport kvswap.disk.files",
        disk__files="from kvswap.disk import slab\nfrom kvswap.units import MIB",
        disk__slab="import numpy",
        errors="from kvswap.units import MIB",
        units="",
    )
    assert upward(planted) == []


def test_unknown_module_says_what_to_do(tmp_path: Path) -> None:
    assert "add a folder to ROOMS" in upward(plant(tmp_path, helpers=""))[0]


@pytest.mark.parametrize(
    "files",
    [
        {"store__read_plan": "import torch.nn"},
        {"store__layout": "from os import path"},
        {"memory__budget": "from kvswap.errors import KVSwapError", "errors": "import os"},
    ],
)
def test_impure_import_is_found(files: dict[str, str], tmp_path: Path) -> None:
    assert len(impure(plant(tmp_path, **files))) == 1


def test_torch_at_load_time_is_found_but_not_a_late_import(tmp_path: Path) -> None:
    late = plant(tmp_path, cli__run="def run():\n    import torch")
    assert slow_to_load(late) == []
    load = "from kvswap.app.engine import load"
    early = plant(tmp_path, cli__run=load, app__engine="try:\n    import torch\nfinally: ...")
    assert slow_to_load(early) == ["loading cli.run loads torch through app.engine"]


def test_long_files_and_functions_are_found(tmp_path: Path) -> None:
    body = "def long():\n" + "    pass\n" * FUNCTION_LINES
    plant(tmp_path, engine=body + "\n" * (FILE_LINES - FUNCTION_LINES))
    assert [line.split(":")[0] for line in too_long(tmp_path)] == ["engine.py", "engine.py"]
    plant(tmp_path, engine="def short():\n" + "    pass\n" * (FUNCTION_LINES - 1))
    assert too_long(tmp_path) == []
