"""Answers as one HTML page: no scripts, nothing from elsewhere, every text escaped."""

from __future__ import annotations

from html import escape

from rlcore.engine.show import MEASURES, Measure, Sample, colour, heading, scales, told

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 15px/1.6 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }}
body {{ color: #111; background: #fff }}
article {{ border-top: 1px solid #ccc; padding: .6em 0 }}
h2 {{ font-size: 1em; margin: 0 }}
pre, td.text {{ font-family: ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .3em 0 }}
pre {{ color: #555 }}
th {{ text-align: right; font-weight: normal; color: #555; padding-right: 1em; vertical-align: top }}
td.text span {{ border-radius: 2px }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>Full colour: {legend}. Values of a token: point at it.</p>
{articles}
</body>
</html>
"""


def page(title: str, samples: list[Sample]) -> str:
    """The page. Texts come already without control characters."""
    most = scales(samples)
    legend = ", ".join(f"{swatch(measure)} {measure.title} {most[measure.key]:.3f}" for measure in MEASURES)
    articles = "\n".join(article(sample, most) for sample in samples)
    return PAGE.format(title=escape(title), legend=legend, articles=articles)


def swatch(measure: Measure) -> str:
    """The colours of a measure, of two the one of negative values first."""
    ends = {"−": measure.low, "+": measure.high} if measure.low != measure.high else {" ": measure.high}
    return "".join(f'<span style="background:{css(end)}">&nbsp;{sign}&nbsp;</span>' for sign, end in ends.items())


def article(sample: Sample, most: dict[str, float]) -> str:
    """One answer: prompt, and a row for each measure."""
    rows = "".join(
        f'<tr><th>{measure.title}</th><td class="text">{tokens(sample, measure, most[measure.key])}</td></tr>'
        for measure in MEASURES
    )
    head = f"<h2>{escape(heading(sample))}</h2><pre>{escape(sample.prompt)}</pre>"
    return f"<article>{head}<table>{rows}</table></article>"


def tokens(sample: Sample, measure: Measure, scale: float) -> str:
    """The tokens, coloured by one measure, with all values as a tooltip."""
    parts = []
    for i, token in enumerate(sample.tokens):
        title = ", ".join(f"{m.title} {told(sample.values[m.key][i])}" for m in MEASURES)
        background = css(colour(measure, sample.values[measure.key][i], scale))
        parts.append(f'<span style="background:{background}" title="{title}">{escape(token)}</span>')
    return "".join(parts)


def css(colour: tuple[int, int, int]) -> str:
    r, g, b = colour
    return f"rgb({r},{g},{b})"
