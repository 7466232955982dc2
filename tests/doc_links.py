"""Links of the documentation. `python tests/doc_links.py` sets links to lines right after code has moved.

A link to a line of code says in backticks what stands there: [`gae`](rlcore/algorithms/segments_scan.py#L82) is right
where line 82 defines gae, or has the word in it where no line of the file defines it. Of a.b.c the last word counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(!?\[(?P<text>[^\[\]]*)\]\((?P<path>[^)#\s]*))(#(?P<anchor>[^)\s]*))?\)")
ELSEWHERE = ("http://", "https://", "mailto:")


class Link(NamedTuple):
    """A link in a page, by the number of its line; `line` is the line of `file` that it points at, if it does."""

    page: Path
    number: int
    text: str
    file: Path
    anchor: str

    @property
    def line(self) -> int | None:
        found = re.fullmatch(r"L(\d+)", self.anchor)
        return int(found[1]) if found else None

    @property
    def name(self) -> str:
        """The last word between backticks."""
        words = [word for code in re.findall(r"`([^`]*)`", self.text) for word in re.findall(r"\w+", code)]
        return words[-1] if words else ""

    def problem(self) -> str | None:
        if not self.file.exists():
            return f"there is no {self.file.relative_to(ROOT)}"
        if not self.anchor:
            return None
        lines = self.file.read_text(encoding="utf-8").splitlines()
        if self.file.suffix == ".md":
            return None if self.anchor in headings(lines) else f"{self.file.name} has no heading #{self.anchor}"
        if self.line is None or not self.name:
            return "a link into code has the form [`name`](file#L12)"
        if self.line not in places(lines, self.name):
            return f"{self.name} is not at line {self.line} of {self.file.name}; python tests/doc_links.py looks for it"
        return None

    def corrected(self) -> int | None:
        """The nearest line for the name; None where there is none."""
        found = places(self.file.read_text(encoding="utf-8").splitlines(), self.name)
        return min(found, key=lambda number: abs(number - (self.line or 1)), default=None)


def places(lines: list[str], name: str) -> list[int]:
    """The lines that define a name as function or class; else those that assign it; else those that have it."""
    for pattern in (rf"\s*(def|class) {name}\b", rf"\s*{name}\b\s*[:=]", rf".*\b{name}\b"):
        if found := [number for number, line in enumerate(lines, 1) if re.match(pattern, line)]:
            return found
    return []


def headings(lines: list[str]) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    titles = [line.lstrip("#").strip().lower() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def links(page: Path) -> Iterator[Link]:
    """The links of a page that stay in the repository, outside of code blocks."""
    fenced = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fenced ^= line.lstrip().startswith("```")
        for found in [] if fenced else LINK.finditer(line):
            if not found["path"].startswith(ELSEWHERE):
                file = (page.parent / found["path"]).resolve() if found["path"] else page
                yield Link(page, number, found["text"], file, found["anchor"] or "")


def set_right(page: Path) -> int:
    """Rewrites the numbers of a page's links to lines that do not hold; returns how many there were."""
    lines, changed = page.read_text(encoding="utf-8").split("\n"), 0
    for link in links(page):
        if link.line is None or link.problem() is None or (line := link.corrected()) is None:
            continue
        old, new = (f"[{link.text}]({{}}#L{line_number})" for line_number in (link.line, line))
        path = re.search(re.escape(f"[{link.text}](") + r"([^)#]*)#", lines[link.number - 1])
        assert path is not None
        lines[link.number - 1] = lines[link.number - 1].replace(old.format(path[1]), new.format(path[1]))
        changed += 1
    page.write_text("\n".join(lines), encoding="utf-8")
    return changed


if __name__ == "__main__":
    for page in pages():
        if changed := set_right(page):
            print(f"{page.relative_to(ROOT)}: {changed} set right")
        for link in links(page):
            if problem := link.problem():
                print(f"{page.relative_to(ROOT)}, line {link.number}: {problem}")
