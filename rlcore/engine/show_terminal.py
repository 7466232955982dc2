"""Answers in a terminal: three coloured lines each, or a table of numbers where there are no colours."""

from __future__ import annotations

from typing import Any

from rlcore.engine.show import MEASURES, Measure, Sample, colour, heading, scales, told


def print_samples(samples: list[Sample], console: Any = None) -> None:
    """Prints answers to a rich console, by default the terminal."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console(highlight=False)
    most = scales(samples)
    for sample in samples:
        console.print(Text(heading(sample), style="bold"))
        console.print(Text(sample.prompt, style="dim"))
        if console.color_system is None:
            console.print(table(sample))
        else:
            for measure in MEASURES:
                console.print(coloured(sample, measure, most[measure.key]))
        console.print()
    if console.color_system is not None:
        console.print(Text("full colour: " + ", ".join(f"{m.title} {most[m.key]:.3f}" for m in MEASURES), style="dim"))


def coloured(sample: Sample, measure: Measure, scale: float) -> Any:
    """The answer with the values of one measure as background colours."""
    from rich.text import Text

    text = Text(f"{measure.title:>9} ")
    for token, value in zip(sample.tokens, sample.values[measure.key]):
        r, g, b = colour(measure, value, scale)
        text.append(token, style=f"black on #{r:02x}{g:02x}{b:02x}")
    return text


def table(sample: Sample) -> Any:
    """The values as numbers, a row per token."""
    from rich.table import Table
    from rich.text import Text

    rows = Table("token", *(measure.title for measure in MEASURES), box=None)
    for i, token in enumerate(sample.tokens):
        rows.add_row(Text(token), *(told(sample.values[measure.key][i]) for measure in MEASURES))
    return rows
