"""The README's pictures from the rows: a roofline, and speed-ups over eager PyTorch, `torch.compile` and the peers."""

import io
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from latentfast.benchmarks.rows import Row, Times
from latentfast.benchmarks.table import size
from latentfast.benchmarks.targets import CHOSEN

INK, FAINT = "#1f2933", "#d5dbe1"
COLOURS = {"ours": "#00756f", "compiled": "#d9731a", "eager": "#8a94a0", "peer": "#7b4bb3"}
#: Behind a name, so that no line runs through it.
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
#: Marker, its area, and how far in front it lies.
MARKERS = {"ours": ("o", 52, 4), "compiled": ("s", 26, 3), "eager": ("s", 26, 2)}
LABELS = {"ours": "latentfast", "compiled": "torch.compile", "eager": "eager PyTorch", "peer": "the peer's own code"}
#: Baselines and the forms of which the fastest counts.
BASELINES = (
    ("eager", ("eager", "field_eager")),
    ("compiled", ("compiled", "field_compiled")),
    ("peer", ("peer_eager",)),
)


def speedups(row: Row, clock: str) -> dict[str, float]:
    """How many times longer the fastest form of each of BASELINES takes; the peer's by what a caller waits for."""
    found = {}
    for key, forms in BASELINES:
        ratios = [row.speedup(form, "call_us" if key == "peer" else clock) for form in forms]
        known = [ratio for ratio in ratios if ratio]
        if known:
            found[key] = min(known)
    return found


def chosen(rows: Iterable[Row]) -> list[Row]:
    """Of each case the row of the backend that the library picks by itself."""
    best: dict[tuple[str, ...], Row] = {}
    for row in rows:
        other = best.get(row.case)
        if other is None or CHOSEN.index(row.backend) < CHOSEN.index(other.backend):
            best[row.case] = row
    return list(best.values())


def _label(row: Row, common: str) -> str:
    """The operation, and what of its size and dtype is not said for the whole panel."""
    own = f"{size(row)}, {row.dtype}"
    if own == common:
        return row.title
    shown = size(row) if own.endswith(common.rsplit(", ", 1)[-1]) else own
    return f"{row.title}  ({shown})"


def _most_common(values: list[str]) -> str:
    return max(values, key=values.count)


def _bars(axes: Any, rows: list[Row], clock: str, title: str) -> None:
    """A group of bars a case from 1, "as fast", on a logarithmic axis; the largest gain over eager on top."""
    from matplotlib import ticker

    values = {i: speedups(row, clock) for i, row in enumerate(rows)}
    order = sorted((i for i, v in values.items() if v), key=lambda i: -max(values[i].values()))
    common = _most_common([f"{size(row)}, {row.dtype}" for row in rows])
    keys = [key for key, _ in BASELINES if any(key in v for v in values.values())]
    height = 0.8 / len(keys)
    for k, key in enumerate(keys):
        shift = (k - (len(keys) - 1) / 2) * height
        points = [(y + shift, values[i][key]) for y, i in enumerate(order) if key in values[i]]
        # From 1 on: on a logarithmic axis a bar has no zero to start from.
        axes.barh([y for y, _ in points], [x - 1 for _, x in points], height * 0.88, left=1, color=COLOURS[key])
        for y, x in points:
            text, place, side = _ratio(x), (4 if x >= 1 else -4), ("left" if x >= 1 else "right")
            axes.annotate(text, (x, y), (place, 0), textcoords="offset points", va="center", ha=side, fontsize=8)
    axes.axvline(1, color=INK, linewidth=1.2)
    axes.set_xscale("log")
    ratios = [x for v in values.values() for x in v.values()]
    low, high = min([1.0, *ratios]), max([2.0, *ratios])
    room = (high / low) ** 0.12  # for the numbers at the bars' ends
    axes.set_xlim(low / room**1.5 if low < 1 else 0.9, high * room)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}×")
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel(f"times as fast (log); {common} unless said")
    axes.set_yticks(range(len(order)), [_label(rows[i], common) for i in order])
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_title(title, loc="left")
    _plain(axes, "x")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _ratio(x: float) -> str:
    return f"{x:.0f}×" if x >= 9.95 else f"{x:.1f}×" if x >= 0.995 else f"{x:.2f}×"


def _plain(axes: Any, grid: str) -> None:
    axes.grid(axis=grid, color=FAINT, linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _rate(row: Row, forms: Iterable[str]) -> float | None:
    times = [t for form in forms if (t := row.baselines.get(form, Times()).device_us)]
    return row.bytes / min(t[1] for t in times) / 1e3 if times else None


def _roof(axes: Any, rows: list[Row], title: str) -> None:
    """GB/s against the bytes of a call, the copy rate as the roof, a line from the slowest way up to ours."""
    from matplotlib import ticker

    # What multiplies matrices has another roof, and the slower backends of a case only hide it.
    best = sorted((row for row in chosen(rows) if row.gbs and not row.flops), key=lambda row: row.gbs or 0.0)
    lowest = copy = rows[0].environment.copy_tbs * 1e3
    for row in best:
        # Without the peers, which would press all others together under the roof: they are in the other picture.
        points = [(key, _rate(row, forms)) for key, forms in BASELINES if key != "peer"]
        found = [(key, y) for key, y in [*points, ("ours", row.gbs)] if y]
        rates = [y for _, y in found]
        axes.plot([row.bytes] * 2, [min(rates), max(rates)], color=FAINT, linewidth=1.2, zorder=1)
        for key, y in found:
            lowest = min(lowest, y)
            marker, area, front = MARKERS[key]
            axes.scatter([row.bytes], [y], s=area, color=COLOURS[key], marker=marker, zorder=front, linewidths=0)
    axes.axhline(copy, color=INK, linewidth=1.4)
    rate = f"{copy / 1e3:.2f} TB/s" if copy >= 1e3 else f"{copy:.0f} GB/s"
    axes.set_xscale("log")
    axes.set_yscale("log")
    low, high = lowest / 1.4, max([copy, *(row.gbs or 0.0 for row in best)]) * 1.5
    axes.set_ylim(low, high)
    sizes = [row.bytes for row in best]
    # Names stand beside the cloud, on a quarter of the width: of single clips at its left, of batches at its right.
    batches = any(row.batch > 1 for row in best)
    quarter = max(math.log(max(sizes) / min(sizes)), math.log(10)) * (0.6 if batches else 0.4)
    axes.set_xlim(min(sizes) / math.exp(quarter), max(sizes) * (math.exp(quarter) if batches else 1.5))
    for left in (True, False):
        side = [row for row in best if (row.batch == 1) == left]
        edge = min(row.bytes for row in side) / 1.4 if left and side else max(sizes) * 1.4
        for row, y in zip(side, _apart([row.gbs or 0.0 for row in side], low, high), strict=True):
            axes.plot([edge, row.bytes], [y, row.gbs], color=FAINT, linewidth=0.8, zorder=0)
            name = f"{row.title}  " if left else f"  {row.title}, {size(row)}"
            axes.annotate(
                *(name, (edge, y)), ha="right" if left else "left", va="center", fontsize=8, bbox=PAPER, zorder=5
            )
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1,) if batches else (1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e9:g} GB" if x >= 1e9 else f"{x / 1e6:g} MB")
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("bytes that a call has to move, logarithmic")
    axes.set_ylabel("GB/s, logarithmic  (higher is better)")
    axes.set_title(f"{title}; the line: copying within its memory, {rate}", loc="left")
    _plain(axes, "y")


def _apart(values: list[float], low: float, high: float) -> list[float]:
    """Ascending places for names at `values`, at least a line apart, on a logarithmic axis of `_height`."""
    step = math.log(high / low) / max(34, 1.5 * len(values))
    places: list[float] = []
    for value in values:
        wanted = math.log(value)
        places.append(max(wanted, places[-1] + step) if places else max(wanted, math.log(low) + step))
    # Pushed up only, the last would lie too high: back down from the roof.
    for i in range(len(places) - 1, -1, -1):
        places[i] = min(places[i], math.log(high) - step * (len(places) - i))
    return [math.exp(place) for place in places]


def _height(rows: list[Row]) -> float:
    """Inches of a roofline: as many lines as there are names on its fuller side, and half as many again."""
    clips = sum(row.batch == 1 for row in chosen(rows))
    return max(6.2, 0.25 * max(clips, len(chosen(rows)) - clips) + 1)


def draw(rows: list[Row]) -> dict[str, bytes]:
    """Both pictures as PNG, by file name; no panel without rows.

    Raises:
        ValueError: there are no rows, or they come from more than one GPU.
    """
    import matplotlib

    matplotlib.use("Agg")
    gpu = [row for row in rows if row.on_gpu]
    cpu = [row for row in rows if not row.on_gpu]
    cards = sorted({row.environment.card for row in gpu})
    if not rows or len(cards) > 1:
        raise ValueError(
            f"the pictures are of one GPU's and one CPU's rows, got {len(rows)} rows of {cards or 'no GPU'}"
        )
    made = {"speedups.png": _speedups(gpu, cpu)}
    if any(row.gbs and not row.flops for row in rows):
        made["roofline.png"] = _roofline(gpu, cpu)
    return made


def _speedups(gpu: list[Row], cpu: list[Row]) -> bytes:
    batches = [row for row in chosen(gpu) if row.batch > 1 or row.flops]
    clips = [row for row in chosen(gpu) if row.batch == 1 and row.host_us]
    panels = {
        "device": (batches, "device_us", "On the device"),
        "host": (clips, "host_us", "Until a call returns to the host"),
        "cpu": (chosen(cpu), "device_us", _machine(cpu)),
    }
    panels = {name: panel for name, panel in panels.items() if any(speedups(row, panel[1]) for row in panel[0])}
    heights = [0.34 * len(panel[0]) + 0.9 for panel in panels.values()]
    title = f"Times as fast: {_machine(gpu or cpu)}"
    with _figure([[name] for name in panels], (11.5, sum(heights) + 0.6), heights, title) as figure:
        axes, finish = figure
        for name, (rows, clock, title) in panels.items():
            _bars(axes[name], rows, clock, title)
        return finish([(f"over {LABELS[key]}", COLOURS[key], "s") for key, _ in BASELINES])


def _roofline(gpu: list[Row], cpu: list[Row]) -> bytes:
    panels = {name: rows for name, rows in (("gpu", gpu), ("cpu", cpu)) if any(r.gbs and not r.flops for r in rows)}
    title = "Memory rate of a call against its size"
    heights = [_height(rows) for rows in panels.values()]
    with _figure([[name] for name in panels], (11.5, sum(heights) + 0.4), heights, title) as figure:
        axes, finish = figure
        for name, rows in panels.items():
            _roof(axes[name], rows, _machine(rows))
        return finish([(LABELS[key], COLOURS[key], marker) for key, (marker, _, _) in MARKERS.items()])


def _machine(rows: list[Row]) -> str:
    if not rows:
        return ""
    e = rows[0].environment
    return e.card if rows[0].on_gpu else f"{e.card}, {e.threads} threads"


@contextmanager
def _figure(
    layout: list[list[str]], inches: tuple[float, float], heights: list[float] | None, title: str
) -> Iterator[tuple[dict[str, Any], Callable[[list[tuple[str, str, str]]], bytes]]]:
    """The axes by name, and what adds the legend (label, colour, marker) and gives the picture."""
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    inked = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    style: Any = {"font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlepad": 10}
    style |= dict.fromkeys(inked, INK)
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplot_mosaic(layout, figsize=inches, height_ratios=heights, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")

        def finish(entries: list[tuple[str, str, str]]) -> bytes:
            drawn = {to_hex(colour) for one in axes.values() for colour in _colours(one)}
            marks = [
                Line2D([], [], color=colour, marker=marker, linestyle="", label=label)
                for label, colour, marker in entries
                if colour in drawn
            ]
            figure.legend(handles=marks, loc="outside upper right", ncols=len(marks), frameon=False)
            buffer = io.BytesIO()
            # White, not transparent: dark ink on a dark page could not be read. No date inside: same rows, same bytes.
            figure.savefig(buffer, dpi=130, facecolor="white", metadata={"Software": None}, format="png")
            return buffer.getvalue()

        from matplotlib.colors import to_hex

        try:
            yield axes, finish
        finally:
            pyplot.close(figure)


def _colours(axes: Any) -> Iterator[Any]:
    """Of the bars and the points."""
    yield from (bar.get_facecolor() for bar in axes.patches)
    yield from (colour for cloud in axes.collections for colour in cloud.get_facecolor())
