"""The documentation: links lead to what they name, options and keys exist, every method has its page."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import rlcore as rl
from rlcore.engine.config import Config
from rlcore.engine.config_file import flatten

ROOT = Path(__file__).resolve().parents[1]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


doc_links = load("doc_links")
PAGES = {str(page.relative_to(ROOT)): page for page in doc_links.pages()}


def to_be_drawn() -> set[Path]:
    """The pictures of recipes that the committed table does not have yet: `make learn` draws them."""
    table = ROOT / "bench" / "results" / "learning.json"
    runs = json.loads(table.read_text())["runs"] if table.exists() else []
    recipes = {path.stem for path in (ROOT / "bench" / "learning").glob("*.toml")} - {run["recipe"] for run in runs}
    return {ROOT / "docs" / "algorithms" / f"{recipe}.png" for recipe in recipes}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_what_they_name(name: str) -> None:
    found = [(link, link.problem()) for link in doc_links.links(PAGES[name]) if link.file not in to_be_drawn()]
    assert not [f"line {link.number}: [{link.text}] {problem}" for link, problem in found if problem]


@pytest.mark.parametrize("name", PAGES)
def test_options_and_configuration_keys_exist(name: str) -> None:
    keys, text = flatten(Config()), PAGES[name].read_text(encoding="utf-8")
    sections = "|".join({key.split(".")[0] for key in keys if "." in key})
    options = {option.replace("-", "_") for option in re.findall(rf"--((?:{sections})\.[a-z0-9-]+)", text)}
    named = set(re.findall(rf"`((?:{sections})\.[a-z0-9_]+)`", text))
    free = ("reward.weights.", "task.mixture.", "task.options.")
    named = {key for key in named if not key.endswith(".py")}
    assert not {key for key in options | named if key not in keys and not f"{key}.".startswith(free)}


def test_every_method_has_a_page_that_says_how_to_run_it() -> None:
    index = PAGES["docs/algorithms/README.md"].read_text(encoding="utf-8")
    for key, method in rl.methods().items():
        page = PAGES[f"docs/algorithms/{key}.md"].read_text(encoding="utf-8")
        assert f"[`{key}`]({key}.md)" in index
        assert re.search(r"\d{4}\.\d{5}", method.paper)[0] in page
        assert (ROOT / "bench" / "learning" / f"{key}.toml").exists()
        assert f"rlcore train --config bench/learning/{key}.toml\n" in page
        assert f"({key}.png)" in page


def test_a_moved_line_is_noticed_and_set_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doc_links, "ROOT", tmp_path)
    code, page = tmp_path / "code.py", tmp_path / "page.md"
    code.write_text("# y\n\n\ndef y():\n    pass\n\n\nz = y()\n")
    text = "# A\n\n[`y`](code.py#L{}), [`a.z`](code.py#L{}), [A](#a)\n"
    page.write_text(text.format(4, 8))
    assert [link.problem() for link in doc_links.links(page)] == [None] * 3

    code.write_text("import x\n\n" + code.read_text())
    assert all(link.problem() for link in doc_links.links(page) if link.line)
    assert doc_links.set_right(page) == 2
    assert page.read_text() == text.format(6, 10)

    page.write_text("[`gone`](code.py#L1) [B](#b) [c](c.md)\n```\n[d](d.md)\n```\n")
    doc_links.set_right(page)
    assert len([link for link in doc_links.links(page) if link.problem()]) == 3
