"""Tables of the rows: plain text for a terminal, and the README's between its markers."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.rows import RESULTS, Row, Times, load_all

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
#: The sizes as a reader knows them.
SIZE_NAMES = {"wan480": "Wan 480p", "wan720": "Wan 720p", "hunyuan720": "Hunyuan 720p", "tiny": "tiny"}


def number(x: float | None) -> str:
    """Three digits, thousands apart; a dash for what was not measured."""
    if x is None:
        return "–"
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def size(row: Row) -> str:
    """`Wan 480p, B 1`, with the dtype where it is not the device's usual one."""
    name = SIZE_NAMES.get(row.workload.rsplit("_b", 1)[0], row.workload)
    return f"{name}, B {row.batch}"


def _median(times: list[float] | None) -> float | None:
    return times[1] if times else None


def _times(x: float | None) -> str:
    return "–" if x is None else f"{x:.1f}×" if x < 100 else f"{x:.0f}×"


def _of(row: Row, baseline: str, clock: str) -> float | None:
    return _median(getattr(row.baselines.get(baseline, Times()), clock))


def plain(rows: Iterable[Row]) -> str:
    """Every row, for a terminal: device and host time, floor, and the baselines as device/host times."""
    head = f"{'operation':34s} {'size':16s} {'backend':10s}"
    head += f" {'device':>8s} {'floor':>8s} {'share':>6s} {'host':>7s} {'add_':>6s}"
    head += "".join(f" {name:>17s}" for name in ("eager", "compiled", "field", "field compiled")) + f" {'ulp':>5s}"
    lines = [head]
    for row in rows:
        name = f"{row.title} {'' if row.dtype == 'bfloat16' else row.dtype}"
        share = "–" if row.floor_share is None else f"{row.floor_share:.0%}"
        line = f"{name:34s} {row.workload:16s} {row.backend:10s} {number(_median(row.device_us)):>8s} "
        line += f"{number(row.floor_us):>8s} {share:>6s} {number(_median(row.host_us)):>7s} {number(row.add_us):>6s}"
        for baseline in ("eager", "compiled", "field_eager", "field_compiled"):
            pair = f"{number(_of(row, baseline, 'device_us'))}/{number(_of(row, baseline, 'host_us'))}"
            line += f" {pair:>17s}"
        lines.append(f"{line} {row.error_ulp:5.2f}{'' if row.correct else ' WRONG'}")
    return "\n".join(lines)


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---", "---", "---"] + ["---:"] * (len(header) - 3)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def _device_table(rows: list[Row]) -> str:
    header = ["operation", "latents", "backend", "µs", "of copy rate", "eager µs", "`torch.compile` µs"]
    header += ["usual expression µs", "…compiled µs", "× eager", "× compile", "error, ulp"]
    lines = []
    for row in rows:
        lines.append(
            [
                f"`{row.title}`",
                f"{size(row)}, {row.dtype}",
                row.backend,
                f"**{number(_median(row.device_us))}**",
                "–" if row.floor_share is None else f"{row.floor_share:.0%}",
                *(number(_of(row, b, "device_us")) for b in ("eager", "compiled", "field_eager", "field_compiled")),
                _times(row.speedup("eager", "device_us")),
                _times(row.speedup("compiled", "device_us")),
                f"{row.error_ulp:.2f}",
            ]
        )
    return _markdown(header, lines)


def _host_table(rows: list[Row]) -> str:
    header = ["operation", "latents", "backend", "µs", "× `add_`", "eager µs", "`torch.compile` µs"]
    header += ["usual expression µs", "…compiled µs", "× eager", "× compile"]
    lines = []
    for row in rows:
        host = _median(row.host_us)
        lines.append(
            [
                f"`{row.title}`",
                f"{size(row)}, {row.dtype}",
                row.backend,
                f"**{number(host)}**",
                number(host / row.add_us) if host and row.add_us else "–",
                *(number(_of(row, b, "host_us")) for b in ("eager", "compiled", "field_eager", "field_compiled")),
                _times(row.speedup("eager", "host_us")),
                _times(row.speedup("compiled", "host_us")),
            ]
        )
    return _markdown(header, lines)


def markdown(rows: list[Row]) -> str:
    """The README's tables: for each machine its device times, and on a GPU the host's at batch 1."""
    machines: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        e = row.environment
        machines.setdefault((e.card, e.driver, e.torch, e.commit, e.date, str(e.threads)), []).append(row)
    parts = []
    for (card, driver, torch_version, commit, date, threads), found in sorted(machines.items(), reverse=True):
        gpu = driver != "none"
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


def inserted(readme: str, table: str) -> str:
    """`readme` with what stands between its markers replaced; ValueError if it has not exactly one pair."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"the README must hold {BEGIN} and after it {END}, each once")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Write the tables into the README; with --check say whether they are there already."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the tables are not these rows'")
    arguments = parser.parse_args()
    rows = load_all(arguments.results)
    if not rows:
        sys.exit(f"no rows in {arguments.results}")
    old = arguments.readme.read_text(encoding="utf-8")
    new = inserted(old, markdown(rows))
    if arguments.check:
        print("the README holds these rows" if new == old else "the README's tables are not those of the rows")
        return int(new != old)
    arguments.readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
