"""The house's import rules: which room may import which, read from the sources with `ast`.

A rule that fails names the line. Imports inside functions count as well: what is forbidden is forbidden late,
too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# files of sana_edge/ itself: the floor, which every room may stand on, and the roof, which only `cli` may use
FLOOR = {
    *("config", "decoding", "errors", "image", "image_metrics", "init_image", "noise", "progress"),
    *("prompt", "request", "sampler", "sizes", "system"),
}
ROOF = {"__init__", "__main__", "generation", "pipeline", "runtime"}

# a room, and the rooms that it may import beside the floor and itself
ROOMS: dict[str, set[str]] = {
    "floor": set(),
    "store": set(),
    "kernels": {"int8.quant"},
    "int8": {"store", "kernels"},
    "nets": {"int8", "store"},
    "fused": {"nets", "int8", "store", "kernels"},
    "torch_runtime": {"fused", "nets", "int8", "plan", "store"},
    "plan": {"store"},
    "engines": {"plan", "store"},
    # the package's own face has a name of the series
    "roof": {"torch_runtime", "engines", "store", "series"},
    "series": {"pipeline"},
    "serve": {"pipeline"},
    "bench": {"pipeline", "torch_runtime", "engines", "nets", "int8", "store", "calib", "export"},
    "calib": {"torch_runtime", "nets", "int8", "store"},
    "export": {"torch_runtime", "engines", "nets", "int8", "store"},
    "training": {"torch_runtime", "nets", "int8", "store"},
    # the world that its judge knows
    "evaluate": {"pipeline", "store", "training.art", "training.captions"},
}
# who may import everything
FREE = {"cli"}
# what only the command line imports, and those that name it
TOOLS = {"bench", "calib", "evaluate", "export", "training", "serve"}
# modules that import no torch, nor anything that does: whole rooms, and the store's and the roof's files
TORCH_FREE = {"engines", "evaluate", "floor", "plan", "roof", "series", "serve"}

MAX_FILES_AT_THE_ROOT = 16


def sources() -> Iterator[Path]:
    for folder in ("sana_edge", "kernels", "calib", "export"):
        yield from (p for p in (ROOT / folder).rglob("*.py") if not _through_a_link(p))


def _through_a_link(path: Path) -> bool:
    return any(parent.is_symlink() for parent in path.parents if parent.is_relative_to(ROOT))


def room_of(module: str) -> str:
    """The room of "sana_edge.a.b"; "floor" and "roof" for files of the root."""
    parts = module.split(".")[1:]
    if not parts or parts[0] in ROOF:
        return "roof"
    return "floor" if parts[0] in FLOOR else parts[0]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    inside = parts if parts[0] == "sana_edge" else ("sana_edge", *parts)
    return ".".join(inside[:-1] if inside[-1] == "__init__" and len(inside) > 1 else inside)


MODULES = {module_of(path): path for path in sources()}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Lines and modules of sana_edge that a file imports, also within functions and under TYPE_CHECKING."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names if name.name.startswith("sana_edge"))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            if base.split(".")[0] == "sana_edge":
                for name in node.names:
                    whole = f"{base}.{name.name}"
                    yield node.lineno, whole if whole in MODULES else base


def allowed(importer: str, imported: str) -> bool:
    room, other = room_of(importer), room_of(imported)
    if room in FREE or other in (room, "floor") or imported == "sana_edge":
        return True
    if other in FREE:
        return importer == "sana_edge.__main__"
    if other in TOOLS and other not in {name.split(".")[0] for name in ROOMS[room]}:
        return False
    inside = imported.removeprefix("sana_edge.")
    return any(inside == name or inside.startswith(f"{name}.") for name in ROOMS[room])


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_room_imports_only_what_it_may(module: str) -> None:
    path = MODULES[module]
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {room_of(module)} may not import {imported}"
        for line, imported in imports(path)
        if not allowed(module, imported)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", sorted(name for name in MODULES if room_of(name) in TORCH_FREE))
def test_torch_free_rooms_import_no_torch(module: str) -> None:
    """At the top of a file: what asks for torch inside of a function says so where it is missing."""
    lines = []
    for node in ast.parse(MODULES[module].read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if {name.split(".")[0] for name in names} & {"torch", "transformers"}:
            lines.append(f"{MODULES[module].relative_to(ROOT)}:{node.lineno}")
    assert not lines, f"{lines} may not import torch"


def test_no_circle() -> None:
    """Depth first through the imports at the top of files and inside functions; a circle is shown whole."""
    arrows = {
        module: sorted({to for _, to in imports(path) if to in MODULES and to not in (module, "sana_edge")})
        for module, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " > ".join([*way[way.index(module) :], module])
        if module in done:
            return
        for other in arrows[module]:
            visit(other, (*way, module))
        done.add(module)

    for module in arrows:
        visit(module, ())


def test_the_root_stays_small() -> None:
    assert len(list((ROOT / "sana_edge").glob("*.py"))) <= MAX_FILES_AT_THE_ROOT


def test_every_room_says_what_belongs_there() -> None:
    rooms = [path for path in MODULES.values() if path.name == "__init__.py"]
    silent = [
        str(path.relative_to(ROOT)) for path in rooms if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent, f"rooms without a docstring: {silent}"


def test_no_name_leads_around_the_package() -> None:
    """``import kernels`` finds another package of that name; only sana_edge.kernels is ours."""
    wrong = []
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            wrong += [
                f"{path.relative_to(ROOT)}:{node.lineno}"
                for name in names
                if name.split(".")[0] in ("kernels", "calib", "export")
            ]
    assert not wrong, wrong
