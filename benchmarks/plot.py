"""The README's picture from the rows of `results/`: `python -m benchmarks.plot`."""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.rows import RESULTS, Row, Times, load_all
from benchmarks.table import size

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "benchmarks.png"
INK, FAINT = "#1f2933", "#d5dbe1"
#: What is drawn, in this order: key, label, colour, marker. The baselines are the faster of their two forms: the
#: reference and the field's usual expression.
SERIES = (
    ("cuda", "latentfast, native (CUDA, C++)", "#00756f", "o"),
    ("native-cpu", "latentfast, native (CUDA, C++)", "#00756f", "o"),
    ("triton", "latentfast, Triton", "#58b5a9", "D"),
    ("compiled", "torch.compile", "#d9731a", "s"),
    ("eager", "eager PyTorch", "#8a94a0", "s"),
)
Case = tuple[str, str, str, str]


def _faster(row: Row, names: Iterable[str], clock: str) -> float | None:
    found = [getattr(row.baselines.get(name, Times()), clock) for name in names]
    return min((times[1] for times in found if times), default=None)


def times_of(rows: list[Row], clock: str) -> dict[Case, dict[str, float]]:
    """For each case, microseconds by the keys of SERIES."""
    found: dict[Case, dict[str, float]] = {}
    for row in rows:
        values = found.setdefault(row.case, {})
        own = getattr(row, clock)
        if own:
            values[row.backend] = own[1]
        for key in ("compiled", "eager"):
            value = _faster(row, (key, f"field_{key}"), clock)
            if value is not None:
                values[key] = value
    return found


def _labels(rows: list[Row], with_size: bool) -> dict[Case, str]:
    labels = {}
    for row in rows:
        dtype = f", {row.dtype}" if with_size and row.dtype != "bfloat16" else ""
        labels[row.case] = f"{row.title}\n{size(row)}{dtype}" if with_size else row.title
    return labels


def _panel(axes: Any, rows: list[Row], values: dict[Case, dict[str, float]], with_size: bool, bars: bool) -> None:
    """A line a case from the top: bars side by side from zero, or markers on a logarithmic axis."""
    from matplotlib import ticker

    labels = _labels(rows, with_size)
    present = [s for s in SERIES if any(s[0] in v for v in values.values())]
    height = 0.8 / max(len(present), 1)
    for k, (key, label, colour, marker) in enumerate(present):
        points = [(i, v[key]) for i, v in enumerate(values.values()) if key in v]
        ys, xs = [i for i, _ in points], [x for _, x in points]
        if bars:
            middles = [y + (k - (len(present) - 1) / 2) * height for y in ys]
            axes.barh(middles, xs, height * 0.9, color=colour, label=label)
        else:
            axes.scatter(xs, ys, s=44, color=colour, marker=marker, label=label, zorder=3)
    if not bars:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        for i, v in enumerate(values.values()):
            if v:
                axes.plot([min(v.values()), max(v.values())], [i, i], color=FAINT, linewidth=2, zorder=1)
    axes.set_yticks(range(len(values)), [labels[case] for case in values])
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=FAINT, linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _share_panel(axes: Any, rows: list[Row]) -> None:
    floors = {row.case: row.floor_us for row in rows}
    shares = {
        case: {key: 100 * floors[case] / us for key, us in v.items()} for case, v in times_of(rows, "device_us").items()
    }
    _panel(axes, rows, shares, with_size=True, bars=True)
    axes.axvline(100, color=INK, linewidth=1.2)
    axes.set_xlim(0, max(109.0, *(share + 5 for v in shares.values() for share in v.values())))
    axes.set_xlabel("share of the measured copy bandwidth, %  (longer is better)")
    rate = rows[0].environment.copy_tbs
    axes.set_title(f"Large batches on the device (100% = {rate:.2f} TB/s)", loc="left")


def _host_panel(axes: Any, rows: list[Row]) -> None:
    _panel(axes, rows, times_of(rows, "host_us"), with_size=False, bars=False)
    adds = sorted(row.add_us for row in rows if row.add_us)
    if adds:
        middle = adds[len(adds) // 2]
        axes.axvline(middle, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        text = f"add_ on one\nelement, {middle:.1f}"
        axes.annotate(text, (middle, 0), (-4, 2), textcoords="offset points", ha="right", va="center", fontsize=8.5)
        axes.set_xlim(left=min(adds) / 4)
    axes.set_xlabel("µs a call on the host, logarithmic  (left is better)")
    axes.set_title("Host time, Wan 480p latents, batch 1", loc="left")


def _cpu_panel(axes: Any, rows: list[Row]) -> None:
    times = times_of(rows, "device_us")
    _panel(axes, rows, {c: {k: us / 1e3 for k, us in v.items()} for c, v in times.items()}, with_size=False, bars=False)
    axes.set_xlabel("ms a call, logarithmic  (left is better)")
    e = rows[0].environment
    axes.set_title(f"{e.card}, {e.threads} threads, Wan 480p latents, batch 1, {rows[0].dtype}", loc="left")


def draw(rows: list[Row], path: Path) -> None:
    """Write the picture: large batches and host time of the GPU's rows, times of the CPU's; no panel without rows.

    Raises:
        ValueError: there are no rows, or they come from more than one GPU.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    gpu = [row for row in rows if row.environment.driver != "none"]
    cpu = [row for row in rows if row.environment.driver == "none"]
    cards = sorted({row.environment.card for row in gpu})
    if not rows or len(cards) > 1:
        raise ValueError(f"the picture is of one GPU's and one CPU's rows, got {len(rows)} rows of {cards or 'no GPU'}")
    large = [row for row in gpu if row.batch > 1 and row.device_us]
    small = [row for row in gpu if row.batch == 1 and row.host_us]
    panels: dict[str, tuple[Callable[[Any, list[Row]], None], list[Row]]] = {}
    if large:
        panels["share"] = _share_panel, large
    if small:
        panels["host"] = _host_panel, small
    if cpu:
        panels["cpu"] = _cpu_panel, cpu
    top = [name for name in ("share", "host") if name in panels]
    layout: Any = [top, ["cpu"] * len(top)] if top and cpu else [top or ["cpu"]]
    count = {name: len({row.case for row in found}) for name, (_, found) in panels.items()}
    heights = [max(2.0, 0.48 * max(count[name] for name in line)) for line in layout]
    if "cpu" in layout[-1]:
        heights[-1] = max(2.0, 0.27 * count["cpu"])
    inked = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    style: Any = {"font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlepad": 12}
    style |= dict.fromkeys(inked, INK)
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplot_mosaic(
            layout, figsize=(12.5, sum(heights) + 1.3 * len(layout) + 0.5), height_ratios=heights, layout="constrained"
        )
        for name, (paint, found) in panels.items():
            paint(axes[name], found)
        handles: dict[str, Any] = {}
        for one in axes.values():
            handles.update(zip(*reversed(one.get_legend_handles_labels()), strict=True))
        order = [label for label in dict.fromkeys(label for _, label, _, _ in SERIES) if label in handles]
        title = f"{cards[0]}, torch {gpu[0].environment.torch}" if gpu else f"torch {cpu[0].environment.torch}"
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        figure.legend(
            [handles[label] for label in order], order, loc="outside upper right", ncols=len(order), frameon=False
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        # White, not transparent: dark ink on a dark page could not be read. No date inside: same rows, same bytes.
        figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})
        pyplot.close(figure)


def main() -> int:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--out", type=Path, default=PICTURE)
    parser.add_argument("--card", default="", help="which GPU's rows, if there are several: a part of its name")
    arguments = parser.parse_args()
    rows = load_all(arguments.results)
    rows = [row for row in rows if row.environment.driver == "none" or arguments.card in row.environment.card]
    if not rows:
        sys.exit(f"no rows in {arguments.results}")
    draw(rows, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
