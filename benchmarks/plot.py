"""The README's pictures from the rows: shares of the machine's limit, and speed-ups over eager PyTorch,
`torch.compile` and the peers. In both a case is a line: its points on an axis, its numbers in columns beside it."""

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from latentfast.benchmarks.rows import Row
from latentfast.benchmarks.table import size
from latentfast.benchmarks.targets import CHOSEN

INK, FAINT, BAND = "#1f2933", "#c3cad1", "#f3f5f7"


@dataclass(frozen=True)
class Mark:
    """How a way to compute is drawn: its name above its column, its colour and marker, whether only the outline."""

    name: str
    colour: str
    marker: str
    hollow: bool = False


MARKS = {
    "native": Mark("● native", "#00756f", "o"),
    "triton": Mark("○ Triton", "#00756f", "o", hollow=True),
    "compiled": Mark("■ compile", "#d9731a", "s"),
    "eager": Mark("■ eager", "#7b858f", "s"),
    "peer": Mark("◆ peer", "#7b4bb3", "D"),
}
#: Backends by their mark; "eager" is drawn once, as the baseline.
BACKENDS = {"native-cpu": "native", "cuda": "native", "triton": "triton"}
#: Baselines and the forms of which the fastest counts.
BASELINES = (
    ("eager", ("eager", "field_eager")),
    ("compiled", ("compiled", "field_compiled")),
    ("peer", ("peer_eager",)),
)
#: Calls that move less are for the most part served by a GPU's cache, and too short to fill the card.
LARGE = 100_000_000
#: Inches of a line (between two stems a GAP of lines), of a panel's title and axis, of the picture's head.
LINE, GAP, FRAME, HEAD = 0.215, 0.45, 0.85, 0.7
#: The axes' left and right edges in widths of the picture; in widths of the axes, where the stems' names stand and how
#: wide a column of numbers is.
LEFT, RIGHT = 0.46, 0.785
NAMES, COLUMN = (0.008 - LEFT) / (RIGHT - LEFT), 0.157


@dataclass(frozen=True)
class Line:
    """A case: its row of the backend that the library picks, and a value for each of MARKS that was measured."""

    row: Row
    values: dict[str, float]


@dataclass(frozen=True)
class Panel:
    """Lines with an axis of their own."""

    title: str
    lines: list[Line]
    marks: tuple[str, ...]
    written: Callable[[float], str]
    log: bool = False


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


def shares(rows: list[Row]) -> dict[str, float]:
    """Of a case's rows, one a backend: by mark, the floor (the least time that the machine allows) over the time."""
    found = {BACKENDS[row.backend]: row.floor_share for row in rows if row.backend in BACKENDS and row.floor_share}
    first = chosen(rows)[0]
    for key, forms in BASELINES:
        times = [t.device_us[1] for form in forms if (t := first.baselines.get(form)) and t.device_us]
        if key != "peer" and times:  # the peers, most of them at less than 1%, are in the other picture
            found[key] = first.floor_us / min(times)
    return found


def _grouped(lines: list[Line], rank: Callable[[Line], float]) -> list[tuple[str, list[Line]]]:
    """By stem; the best line first, and the stem with the best line first."""
    stems: dict[str, list[Line]] = {}
    for line in sorted(lines, key=rank, reverse=True):
        stems.setdefault(line.row.stem, []).append(line)
    return list(stems.items())


def _label(row: Row, common: str) -> str:
    """The operation, and what of its size and dtype is not said for the whole panel."""
    own = f"{size(row)}, {row.dtype}"
    if own == common:
        return row.title
    shown = size(row) if own.endswith(common.rsplit(", ", 1)[-1]) else own
    return f"{row.title}  ({shown})"


def _most_common(values: list[str]) -> str:
    return max(values, key=values.count)


def _dots(axes: Any, panel: Panel) -> None:
    """The panel's lines, stem by stem, and beside them their numbers: bold where latentfast is not the fastest."""
    common = _most_common([f"{size(line.row)}, {line.row.dtype}" for line in panel.lines])
    values = [x for line in panel.lines for x in line.values.values()]
    _axis(axes, panel, min([1.0, *values]), max([1.0, *values]))
    labels: dict[float, str] = {}
    y = 0.0
    beside = axes.get_yaxis_transform()  # x in widths of the axes, y in lines
    for i, (stem, lines) in enumerate(_grouped(panel.lines, _rank)):
        if i % 2 == 0:
            band = (y - 0.5 - GAP / 2, y + len(lines) - 0.5 + GAP / 2)
            axes.axhspan(*band, xmin=-2, xmax=2, color=BAND, linewidth=0, zorder=0, clip_on=False)
        axes.text(NAMES, y, stem, transform=beside, va="center", fontsize=9, fontweight="bold")
        for line in lines:
            labels[y] = _label(line.row, common)
            _line(axes, panel, line, y)
            y += 1
        y += GAP
    axes.set_yticks(list(labels), list(labels.values()))
    axes.set_ylim(y - GAP - 0.5 + GAP / 2, -0.5 - GAP / 2)
    above: Any = {"xycoords": "axes fraction", "textcoords": "offset points"}
    for k, key in enumerate(panel.marks):
        place = 1 + COLUMN * (k + 1), 1
        axes.annotate(MARKS[key].name, place, (0, 5), **above, ha="right", fontsize=7.5, color=MARKS[key].colour)
    axes.set_xlabel(f"{common} unless said", fontsize=9)
    axes.annotate(panel.title, (NAMES, 1), (0, 6), **above, fontsize=11, fontweight="bold")


def _rank(line: Line) -> float:
    """What a line is sorted by: our own share, or else the gain over the fastest other way."""
    own = _own(line.values)
    return own[0] if own else min(line.values.values())


def _own(values: dict[str, float]) -> list[float]:
    """Those of latentfast's backends, first that of the one it picks."""
    return [values[key] for key in ("native", "triton") if key in values]


def _line(axes: Any, panel: Panel, line: Line, y: float) -> None:
    drawn = {key: line.values[key] for key in panel.marks if key in line.values}
    ends = [*drawn.values()] if len(drawn) > 1 and not panel.log else [1.0, *drawn.values()]
    axes.plot([min(ends), max(ends)], [y, y], color=FAINT, linewidth=1.3, zorder=1, solid_capstyle="butt")
    for k, key in enumerate(panel.marks):
        if key not in drawn:
            continue
        mark = MARKS[key]
        area, inside = (34 if mark.marker == "o" else 22), ("white" if mark.hollow else mark.colour)
        look: Any = {"marker": mark.marker, "s": area, "facecolor": inside, "edgecolor": mark.colour, "linewidth": 1.2}
        axes.scatter([drawn[key]], [y], **look, zorder=4 - k / 10, clip_on=False)
        number: Any = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center", "fontsize": 8.5}
        weight = "bold" if _lost(panel, drawn, key) else "normal"
        written = panel.written(drawn[key])
        axes.text(1 + COLUMN * (k + 1), y, written, **number, color=mark.colour, fontweight=weight)


def _lost(panel: Panel, values: dict[str, float], key: str) -> bool:
    """Whether latentfast is slower there: by a ratio under 1, or by a share that is larger than its own."""
    if panel.log:
        return values[key] < 1
    return key not in BACKENDS.values() and values[key] > _own(values)[0]


def _axis(axes: Any, panel: Panel, low: float, high: float) -> None:
    from matplotlib import ticker

    if panel.log:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.15, high * 1.15)
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)))
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    else:
        axes.set_xlim(0, high * 1.03)
        axes.xaxis.set_major_locator(ticker.MultipleLocator(0.25))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}×" if panel.log else f"{x:.0%}")
    axes.axvline(1, color=INK, linewidth=1.2, zorder=2)
    axes.grid(axis="x", color=FAINT, linewidth=0.5, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0, pad=7, labelsize=8.5)
    axes.tick_params(axis="x", labelsize=8.5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _ratio(x: float) -> str:
    return f"{x:,.0f}×" if x >= 9.95 else f"{x:.1f}×" if x >= 0.995 else f"{x:.2f}×"


def _percent(x: float) -> str:
    return f"{x:.0%}" if x >= 0.0095 else f"{x:.1%}"


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
    what = "how many times longer the other ways take, on logarithmic axes; bold: less than 1, latentfast is slower"
    made = {"speedups.png": _drawn("Times as fast", what, _speedups(gpu, cpu))}
    if panels := _shares(gpu, cpu):
        what = (
            "the least time in which the machine can move a call's bytes or multiply its matrices, over the time taken;"
            " bold: faster than latentfast"
        )
        made["roofline.png"] = _drawn("Share of the machine's limit", what, panels)
    return made


def _speedups(gpu: list[Row], cpu: list[Row]) -> list[Panel]:
    large = [row for row in chosen(gpu) if row.batch > 1 or row.bytes >= LARGE or row.flops]
    clips = [row for row in chosen(gpu) if row.batch == 1 and row.host_us]
    wanted = (
        (f"{_machine(gpu)}: on the device", large, "device_us"),
        (f"{_machine(gpu)}: until a call returns to the host", clips, "host_us"),
        (_machine(cpu), chosen(cpu), "device_us"),
    )
    panels = []
    for title, rows, clock in wanted:
        lines = [Line(row, values) for row in rows if (values := speedups(row, clock))]
        if lines:
            marks = tuple(key for key in ("compiled", "eager", "peer") if any(key in line.values for line in lines))
            panels.append(Panel(title, lines, marks, _ratio, log=True))
    return panels


def _shares(gpu: list[Row], cpu: list[Row]) -> list[Panel]:
    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in [*gpu, *cpu]:
        cases.setdefault((str(row.on_gpu), *row.case), []).append(row)
    lines = [Line(chosen(rows)[0], values) for rows in cases.values() if _own(values := shares(rows))]
    panels = []
    for title, found in (
        ("calls that move 100 MB and more", [i for i in lines if i.row.on_gpu and i.row.bytes >= LARGE]),
        ("calls that move less", [i for i in lines if i.row.on_gpu and i.row.bytes < LARGE]),
        ("what lies in its cache comes in at more than 100%", [i for i in lines if not i.row.on_gpu]),
    ):
        if found:
            marks = tuple(key for key in MARKS if any(key in line.values for line in found))
            panels.append(Panel(f"{_machine([found[0].row])}: {title}", found, marks, _percent))
    return panels


def _machine(rows: list[Row]) -> str:
    if not rows:
        return ""
    e = rows[0].environment
    return e.card if rows[0].on_gpu else f"{e.card}, {e.threads} threads"


def _drawn(title: str, what: str, panels: list[Panel]) -> bytes:
    """The panels one below the other, as PNG."""
    heights = [LINE * (len(p.lines) + GAP * len({line.row.stem for line in p.lines})) + FRAME for p in panels]
    with _figure((11.5, sum(heights) + HEAD), heights) as (figure, axes):
        head = {"x": 0.008, "ha": "left", "va": "top"}
        figure.suptitle(title, y=1 - 0.1 / figure.get_figheight(), **head, fontsize=13, fontweight="bold")
        figure.text(y=1 - 0.38 / figure.get_figheight(), s=what, **head, fontsize=9.5)
        for one, panel in zip(axes, panels, strict=True):
            _dots(one, panel)
        buffer = io.BytesIO()
        # White, not transparent: dark ink on a dark page could not be read. No date inside: same rows, same bytes.
        figure.savefig(buffer, dpi=130, facecolor="white", metadata={"Software": None}, format="png")
        return buffer.getvalue()


@contextmanager
def _figure(inches: tuple[float, float], heights: list[float]) -> Iterator[tuple[Any, Any]]:
    from matplotlib import pyplot

    inked = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    style: Any = {"font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlepad": 12}
    style |= dict.fromkeys(inked, INK)
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(len(heights), figsize=inches, squeeze=False)
        # By hand: margins of the same inches in all panels, so that their names, points and numbers stand in line.
        top = inches[1] - HEAD
        for one, height in zip(axes[:, 0], heights, strict=True):
            bottom = top - height + 0.45
            one.set_position((LEFT, bottom / inches[1], RIGHT - LEFT, (height - FRAME) / inches[1]))
            top -= height
        try:
            yield figure, axes[:, 0]
        finally:
            pyplot.close(figure)
