"""Tables of the rows: for a terminal, and those of docs/benchmarks.md between its markers."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table

from latentfast.benchmarks.rows import Row, Times

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
#: The sizes as a reader knows them.
SIZE_NAMES = {
    "wan480": "Wan 480p",
    "wan720": "Wan 720p",
    "hunyuan720": "Hunyuan 720p",
    "wan21_1_3b_480p": "Wan 480p",
    "wan21_14b_720p": "Wan 720p",
    "wan22_ti2v_5b_720p": "Wan 2.2 5B 720p",
    "hunyuan_720p": "Hunyuan 720p",
    "ltx": "LTX 480p",
    "ltx_480p": "LTX 480p",
    "cogvideox_5b": "CogVideoX",
    "mochi_480p": "Mochi 480p",
    "svd_xt": "SVD-XT",
    "animatediff": "AnimateDiff",
    "wan14b_720p": "Wan 14B 720p",
    "wan1b_480p": "Wan 1.3B 480p",
    "wan720_grid": "Wan 720p tokens",
    "wan480_grid": "Wan 480p tokens",
}
#: A column: its header, and what stands in it.
Column = tuple[str, Callable[[Row], str]]


def headed(headers: Sequence[str], texts: int, title: str | None = None) -> Table:
    """A table without lines for a terminal: the first `texts` columns hold words, the others numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    for i, header in enumerate(headers):
        table.add_column(header, justify="left" if i < texts else "right")
    return table


def number(x: float | None) -> str:
    """Three digits, thousands apart; a dash for what was not measured."""
    if x is None:
        return "–"
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def size(row: Row) -> str:
    """Such as `Wan 480p, B 1`."""
    name = row.workload.rsplit("_b", 1)[0]
    name = SIZE_NAMES.get(name, name)
    return f"{name}, B {row.batch}"


def _median(times: list[float] | None) -> float | None:
    return times[1] if times else None


def _times(x: float | None) -> str:
    return "–" if x is None else f"{x:.1f}×" if x < 100 else f"{x:.0f}×"


def _of(row: Row, baseline: str, clock: str) -> float | None:
    return _median(getattr(row.baselines.get(baseline, Times()), clock))


def memory(count: int | None) -> str:
    """Bytes with a unit."""
    if count is None:
        return "–"
    for unit, size_of in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size_of:
            return f"{count / size_of:.3g} {unit}"
    return f"{count} B"


def _share(row: Row) -> str:
    return "–" if row.floor_share is None else f"{row.floor_share:.0%}"


def _dtype_size(row: Row) -> str:
    return f"{size(row)}, {row.dtype}"


def _pair(row: Row, name: str) -> str:
    return f"{number(_of(row, name, 'device_us'))}/{number(_of(row, name, 'host_us'))}"


def _launches(row: Row) -> str:
    """Ours, and the peer's where there is one, else the eager reference's."""
    other = row.baselines.get("peer_eager" if row.peer_note else "eager", Times()).launches
    return f"{'–' if row.launches is None else row.launches}/{'–' if other is None else f'{other:,}'}"


def _peaks(row: Row) -> str:
    return f"{memory(row.peak_bytes)}/{memory(row.baselines.get('eager', Times()).peak_bytes)}"


def terminal(rows: list[Row]) -> Table:
    """Every row: µs on the device and the host, floor, the baselines' as device/host, launches, memory."""
    columns: list[Column] = [
        ("operation", lambda row: row.title),
        ("size", _dtype_size),
        ("backend", lambda row: row.backend),
        ("µs", lambda row: number(_median(row.device_us))),
        ("floor", lambda row: number(row.floor_us)),
        ("of it", _share),
        ("host", lambda row: number(_median(row.host_us))),
        ("add_", lambda row: number(row.add_us)),
    ]
    for name in ("eager", "compiled", "field_eager", "field_compiled", "peer_eager"):
        if any(name in row.baselines for row in rows):
            columns.append((name.replace("_eager", "").replace("_", " "), lambda row, name=name: _pair(row, name)))
    columns.append(("launches", _launches))
    if any(row.peak_bytes is not None for row in rows):
        columns.append(("memory/eager's", _peaks))
    columns.append(("ulp", lambda row: f"{row.error_ulp:.2f}{'' if row.correct else ' WRONG'}"))
    table = headed([header for header, _ in columns], 3)
    for column in table.columns[2:]:
        column.no_wrap = True
    for row in rows:
        table.add_row(*(cell(row) for _, cell in columns))
    return table


def _markdown(columns: list[Column], rows: list[Row]) -> str:
    header = [name for name, _ in columns]
    rule = ["---", "---", "---"] + ["---:"] * (len(header) - 3)
    lines = [[cell(row) for _, cell in columns] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def _per_add(row: Row) -> str:
    host = _median(row.host_us)
    return number(host / row.add_us) if host and row.add_us else "–"


def _columns(rows: list[Row], clock: str) -> list[Column]:
    """Of one table of the page, by `device_us` or `host_us`; what the peers say only where there are peers."""
    share = "of the floor" if any(row.flops for row in rows) else "of copy rate"
    columns: list[Column] = [
        ("operation", lambda row: f"`{row.title}`"),
        ("latents", _dtype_size),
        ("backend", lambda row: row.backend),
        ("µs", lambda row: f"**{number(_median(getattr(row, clock)))}**"),
        (share, _share) if clock == "device_us" else ("× `add_`", _per_add),
    ]
    names = [("eager µs", "eager"), ("`torch.compile` µs", "compiled")]
    names += [("usual expression µs", "field_eager"), ("…compiled µs", "field_compiled")]
    for header, name in names:
        columns.append((header, lambda row, name=name: number(_of(row, name, clock))))
    peers = any("peer_eager" in row.baselines for row in rows)
    if peers:
        columns.append(("peer µs", lambda row: number(row.baselines.get("peer_eager", Times()).call_us)))
    columns += [
        ("× eager", lambda row: _times(row.speedup("eager", clock))),
        ("× compile", lambda row: _times(row.speedup("compiled", clock))),
    ]
    if peers:
        columns.append(("× peer", lambda row: _times(row.speedup("peer_eager", "call_us"))))
    if any(row.launches is not None for row in rows):
        columns.append(("launches", _launches))
    if any(row.peak_bytes is not None for row in rows) and clock == "device_us":
        columns.append(("memory/eager's", _peaks))
    if clock == "device_us":
        columns.append(("error, ulp", lambda row: f"{row.error_ulp:.2f}"))
    return columns


def _device_table(rows: list[Row]) -> str:
    return _markdown(_columns(rows, "device_us"), rows)


def _host_table(rows: list[Row]) -> str:
    return _markdown(_columns(rows, "host_us"), rows)


def markdown(rows: list[Row]) -> str:
    """The page's tables: for each machine its device times, and on a GPU the host's at batch 1."""
    machines: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        e = row.environment
        machines.setdefault((e.card, e.driver, e.torch, e.commit, e.date, str(e.threads)), []).append(row)
    parts = []
    for (card, driver, torch_version, commit, date, threads), found in sorted(machines.items(), reverse=True):
        gpu = found[0].on_gpu
        rate = f"{found[0].environment.copy_tbs:.2f} TB/s" if gpu else f"{1e3 * found[0].environment.copy_tbs:.0f} GB/s"
        where = f"driver {driver}" if gpu else f"{threads} threads"
        parts.append(f"**{card}**, {where}, torch {torch_version}, copy rate {rate}, commit {commit}, {date}.")
        if gpu:
            small = [row for row in found if row.batch == 1]
            large = [row for row in found if row.batch > 1]
            if small:
                parts += ["Until a call returns to the host, batch 1:", _host_table(small)]
            if large:
                parts += ["On the device, large batches, inputs not in cache:", _device_table(large)]
        else:
            parts += ["A call, inputs rotated over more memory than the caches hold:", _device_table(found)]
    return "\n\n".join(parts)


def inserted(page: str, table: str) -> str:
    """`page` with what stands between its markers replaced; ValueError if it has not exactly one pair."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the page must hold {BEGIN} and after it {END}, each once")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"
