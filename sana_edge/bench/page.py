"""The page of a run: one HTML file with its plots as inline SVG, without scripts, for light and dark.

Lengths in a plot are percentages of its width, so that it is drawn at any width without smaller letters.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from sana_edge.bench.summary import drawn, notes, ratios, seconds, system, table
from sana_edge.bench.table import Table

Facts = Mapping[str, Any]

# of a picture, in their order; what is left of it is spent between them
_PARTS = {"text": "text", "loop": "steps", "decode": "decode", "save": "save"}
_REST = {"rest": "between"}
_UNTIL = {"load": "loading", "int8": "drawing in INT8", "float": "in float"}
_HEIGHT = 22
_STYLE = Path(__file__).with_name("page.css")

_HOW = """
<p>Each contender loads and draws in a process of its own, in turns: all of them once, then all again. Numbers
are medians over turns; a thin line spans the least and the most.</p>
<dl>
<dt>load</dt><dd>from the start of the process until the model is loaded; its files had been read before</dd>
<dt>first picture</dt><dd>from the start of the process until its file is saved</dd>
<dt>picture</dt><dd>a later one, of another prompt, with its file: what each further one takes</dd>
<dt>text, step, loop, decode, save</dt><dd>of such a picture: the prompt's encoding, one denoising step after
the first, all steps, the decoder, and the PNG</dd>
<dt>peak memory</dt><dd>of the whole process: the highest resident size; GPU memory is what was in use beyond
that before</dd>
<dt>energy</dt><dd>of a picture, of the whole CPU package and GPU, whatever else runs on them</dd>
<dt>PSNR</dt><dd>of the first picture to that of the contender that is named: equal noise, text and steps. Low
numbers mean another picture, not a worse one</dd>
</dl>
"""


def page(data: Facts) -> str:
    """The whole file, for the ``data`` of `sana_edge.bench.session.Session`."""
    partial = '<p class="tag">partial</p>' if data["partial"] else ""
    works = "\n".join(_work(work, line) for work, line in zip(data["works"], data["sentences"], strict=True))
    said = "".join(f"<li>{escape(line)}</li>" for line in notes(data))
    facts = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in system(data).items())
    commit = data["commit"]["hash"]
    version = f"commit {commit[:10]}" if commit else f"version {data['versions'].get('sana-edge')}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>sana-edge bench</title>
<style>{_STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
<header><p class="eyebrow">sana-edge bench</p>{partial}</header>
{works}
<section><h2>What to know of this run</h2><ul>{said or "<li>Nothing was left out.</li>"}</ul></section>
<section><h2>This machine</h2><dl class="facts">{facts}</dl></section>
<details><summary>How to read it</summary>{_HOW}</details>
<footer><code>{escape(data["command"])}</code><br>{escape(version)}, {escape(data["date"][:16])} UTC, \
{data["repeat"]} turn{"s" * (data["repeat"] != 1)}, {data["done"]} of {data["total"]} runs</footer>
</main>
</body>
</html>
"""


def _work(work: Facts, line: str) -> str:
    rows = drawn(work, ours=False)
    size = "x".join(map(str, work["size"]))
    weights = ' <span class="tag">random weights</span>' if work["random_weights"] else ""
    what = f"{escape(work['model'])} · {size} · {work['steps']} step{'s' * (work['steps'] != 1)}{weights}"
    head = f'<section class="work"><p class="what">{what}</p><h1>{_bound(line)}</h1>'
    if not rows:
        return f"{head}</section>"
    figures = [
        _figure("Seconds per picture", "lower is better", _pictures(work, rows), _keys({**_PARTS, **_REST})),
        _figure("Peak memory of the process", "host", _memory(rows, "peak")),
    ]
    if any(row["device_peak"] for row in rows):
        figures.append(_figure("Peak memory of the GPU", "", _memory(rows, "device_peak")))
    if any(row["joules"] for row in rows):
        figures.append(_figure("Energy of a picture", "whole package and GPU", _energy(rows)))
    figures.append(
        _figure("Until the first picture", "from the start of the process", _first(rows), _keys(_UNTIL))
    )
    if max(len(row["runs"]) for row in rows) > 1:
        figures.append(_figure("Every turn", "seconds per picture, a dot each", _turns(rows)))
    return f"{head}{''.join(figures)}{_table(table(work))}</section>"


def _bound(line: str) -> str:
    """Numbers stay with their units."""
    return re.sub(r"(?<=\d) (?=%|s\b|times\b)", "&nbsp;", escape(line))


def _figure(title: str, unit: str, rows: str, legend: str = "") -> str:
    return f"<figure><figcaption><b>{title}</b> <span>{unit}</span>{legend}</figcaption>{rows}</figure>"


def _keys(words: Mapping[str, str]) -> str:
    """The legend of a figure: what colours mean."""
    keys = "".join(f'<span class="key"><i class="{part}"></i>{word}</span>' for part, word in words.items())
    return f'<span class="legend">{keys}</span>'


def _pictures(work: Facts, rows: Sequence[Facts]) -> str:
    """Bars of stages, with a line from the least to the most, and how many times as fast as float."""
    most = max(row["most"]["picture"] for row in rows)
    floats = drawn(work, "float")

    def bars(row: Facts, x: Callable[[float], float]) -> Iterator[str]:
        median, start = row["median"], 0.0
        parts = {name: median[name] for name in _PARTS}
        parts["rest"] = max(median["picture"] - sum(parts.values()), 0.0)
        for name, value in parts.items():
            word = _PARTS.get(name, "between")
            yield _bar(x(start), x(value), name, f"{word}: {seconds(value)}")
            start += value
        if len(row["runs"]) > 1:
            ends = x(row["least"]["picture"]), x(row["most"]["picture"])
            yield f'<line class="spread" x1="{ends[0]:.2f}%" x2="{ends[1]:.2f}%" y1="11" y2="11"/>'

    def shown(row: Facts) -> str:
        took = seconds(row["median"]["picture"])
        if not floats or row is floats[0]:
            return f"<b>{took}</b>"
        times = statistics.median(ratios(row, floats[0]))
        return f"<b>{took}</b> <small>{times:.2f} &times;</small>"

    note = f'<p class="note">&times;: times as fast as {escape(floats[0]["name"])}</p>' if floats else ""
    return _plot(rows, most, bars, shown, _tick_seconds) + note


def _memory(rows: Sequence[Facts], key: str) -> str:
    return _single(rows, lambda row: row[key], lambda value: f"{value / 1e9:.2f} GB", _tick_gigabytes)


def _energy(rows: Sequence[Facts]) -> str:
    return _single(rows, lambda row: row["joules"], lambda value: f"{value:.3g} J", lambda v: f"{v:g} J")


def _single(
    rows: Sequence[Facts],
    read: Callable[[Facts], float | None],
    show: Callable[[float], str],
    tick: Callable[[float], str],
) -> str:
    """A bar for each row that has the value, in the colour of its kind."""
    known = [row for row in rows if read(row)]

    def bars(row: Facts, x: Callable[[float], float]) -> Iterator[str]:
        value = read(row) or 0.0
        yield _bar(0, x(value), row["kind"], show(value))

    most = max((read(row) or 0.0 for row in known), default=1.0)
    return _plot(known, most, bars, lambda row: f"<b>{show(read(row) or 0.0)}</b>", tick)


def _first(rows: Sequence[Facts]) -> str:
    """Loading, then the picture."""
    most = max(row["median"]["first"] for row in rows)

    def bars(row: Facts, x: Callable[[float], float]) -> Iterator[str]:
        load, first = row["median"]["load"], row["median"]["first"]
        yield _bar(0, x(load), "load", f"load: {seconds(load)}")
        yield _bar(x(load), x(first - load), row["kind"], f"first picture: {seconds(first - load)}")

    def shown(row: Facts) -> str:
        return f"<b>{seconds(row['median']['first'])}</b>"

    return _plot(rows, most, bars, shown, _tick_seconds)


def _turns(rows: Sequence[Facts]) -> str:
    most = max(row["most"]["picture"] for row in rows)

    def dots(row: Facts, x: Callable[[float], float]) -> Iterator[str]:
        for number, found in enumerate(row["runs"], start=1):
            value = found["seconds"]["picture"]
            title = f"<title>turn {number}: {seconds(value)}</title>"
            yield f'<circle class="{row["kind"]}" cx="{x(value):.2f}%" cy="11" r="5">{title}</circle>'

    def shown(row: Facts) -> str:
        spread = (row["most"]["picture"] - row["least"]["picture"]) / row["median"]["picture"] / 2
        return f"<small>±{100 * spread:.0f} %</small>"

    return _plot(rows, most, dots, shown, _tick_seconds)


def _plot(
    rows: Sequence[Facts],
    most: float,
    draw: Callable[[Facts, Callable[[float], float]], Iterator[str]],
    shown: Callable[[Facts], str],
    tick: Callable[[float], str],
) -> str:
    """Rows with a label, an SVG and a value, above an axis from 0."""
    ticks = _ticks(most)
    # room for the last dot
    end = max(most * 1.02, ticks[-1])

    def x(value: float) -> float:
        return 100 * value / end

    grid = "".join(
        f'<line class="grid" x1="{x(value):.2f}%" x2="{x(value):.2f}%" y1="0" y2="{_HEIGHT}"/>'
        for value in ticks
    )
    lines = []
    for row in rows:
        inside = grid + "".join(draw(row, x))
        label = f"{escape(row['name'])}: {row['kind']}"
        svg = f'<svg role="img" aria-label="{label}" width="100%" height="{_HEIGHT}">{inside}</svg>'
        name = f'<span class="name {row["kind"]}">{escape(row["name"])}</span>'
        lines.append(f'<div class="row">{name}{svg}<span class="value">{shown(row)}</span></div>')
    words = "".join(
        f'<span style="left:{x(value):.2f}%">{tick(value)}</span>' for value in ticks if value <= end
    )
    axis = f'<div class="row axis"><i></i><div>{words}</div><i></i></div>'
    return f'<div class="plot">{"".join(lines)}{axis}</div>'


def _bar(x: float, width: float, kind: str, title: str) -> str:
    inside = f"<title>{escape(title)}</title>"
    return f'<rect class="{kind}" x="{x:.2f}%" width="{max(width, 0):.2f}%" y="3" height="16">{inside}</rect>'


def _ticks(most: float) -> list[float]:
    """Two to six round numbers from 0 up to about the most."""
    if most <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(most / 2))
    step = next(unit * power for unit in (0.5, 1, 2, 5, 10) if most / (unit * power) <= 5.5)
    return [round(number * step, 10) for number in range(int(most / step) + 1)]


def _tick_seconds(value: float) -> str:
    return f"{value:g} s"


def _tick_gigabytes(value: float) -> str:
    return f"{value / 1e9:g} GB"


def _table(found: Table) -> str:
    def cells(tag: str, row: Sequence[object]) -> str:
        return "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in row)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in found.rows)
    said = "".join(f"<p class='note'>{escape(note)}</p>" for note in found.notes)
    head = f"<thead><tr>{cells('th', found.titles)}</tr></thead>"
    return f'<div class="scroll" tabindex="0"><table>{head}<tbody>{body}</tbody></table></div>{said}'
