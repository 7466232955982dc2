"""Imports point one way: layout, algorithms, ops, methods, engine, then adapters and the command line."""

from __future__ import annotations

import ast
from pathlib import Path

import rlcore

ORDER = ("layout", "algorithms", "kernels", "ops", "methods", "engine", "adapters", "cli")
GROUND = dict.fromkeys(("layout_checks", "metrics", "packing", "prefix_tree", "prefix_tree_build"), "layout")
# The loop's policy is a Hugging Face model: the one way in which the engine looks upward.
ALLOWED = {("engine", "rlcore.adapters.transformers")}


def imported(file: Path) -> set[str]:
    """The modules that a file imports, at any depth."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= set(whole) if node.module == "rlcore" else {node.module}
    return {name for name in names if name.startswith("rlcore.")}


def room(path: str) -> str:
    return GROUND.get(path, path)


def test_imports_point_one_way():
    root = Path(rlcore.__file__).parent
    wrong = [
        f"{file.relative_to(root)} imports {name}"
        for file in root.rglob("*.py")
        if file.name != "__init__.py" or file.parent != root
        for name in imported(file)
        for own, other in [(room(file.relative_to(root).parts[0].removesuffix(".py")), room(name.split(".")[1]))]
        if other in ORDER and ORDER.index(other) > ORDER.index(own) and (own, name) not in ALLOWED
    ]
    assert not wrong
