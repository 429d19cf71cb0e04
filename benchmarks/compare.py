"""Two files of rows: what got slower, what faster, and whether the difference is more than noise."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from rich.table import Table

from latentfast.benchmarks.rows import Row
from latentfast.benchmarks.table import headed, number, size

CLOCKS = {"device_us": "device", "host_us": "host"}
#: From the 20th to the 80th percentile of a normal distribution, in standard deviations.
_SIGMAS = 2 * 0.8416


@dataclass(frozen=True)
class Change:
    """One clock of one case on one backend in both files, medians in microseconds."""

    row: Row
    clock: str
    before: float
    after: float
    noise: float  # standard deviation of the ratio, relative, from the repeats of both
    verdict: str  # "slower", "faster" or "same"

    @property
    def ratio(self) -> float:
        """How many times longer it takes now."""
        return self.after / self.before


@dataclass(frozen=True)
class Comparison:
    """All changes, the largest slowdown first, and what else is to be said."""

    changes: list[Change]
    remarks: list[str]
    wrong: list[str] = field(default_factory=list)

    @property
    def worse(self) -> bool:
        """Whether something got slower, or a right result wrong."""
        return bool(self.wrong) or any(change.verdict == "slower" for change in self.changes)


def _spread(times: list[float]) -> float:
    return (times[2] - times[0]) / (_SIGMAS * times[1])


def _change(row: Row, clock: str, before: list[float], after: list[float], slower_than: float) -> Change:
    # A median of seven repeats or more scatters by at most half as much as one repeat does: this is two of its
    # standard deviations, which leaves room for what differs between runs but not within one.
    noise = (_spread(before) ** 2 + _spread(after) ** 2) ** 0.5
    ratio, bound = after[1] / before[1], slower_than * (1 + noise)
    verdict = "slower" if ratio > bound else "faster" if ratio < 1 / bound else "same"
    return Change(row, CLOCKS[clock], before[1], after[1], noise, verdict)


def _by_case(rows: Iterable[Row], which: str) -> dict[tuple[str, ...], Row]:
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row.key in found:
            raise ValueError(f"the {which} file has more than one row of {_name(row)}")
        found[row.key] = row
    return found


def _name(row: Row) -> str:
    return f"{row.title}, {size(row)}, {row.dtype}, {row.backend}"


def compare(before: Iterable[Row], after: Iterable[Row], slower_than: float = 1.05) -> Comparison:
    """Match the rows by case and backend and judge each of their clocks.

    Args:
        before: rows of an earlier run.
        after: rows of a later one.
        slower_than: a time that grew by this factor, and beyond that by the noise, got slower.

    Raises:
        ValueError: a file has two rows of one case and backend, or the files have none in common.
    """
    old, new = _by_case(before, "first"), _by_case(after, "second")
    both = [key for key in old if key in new]
    if not both:
        raise ValueError("they have no case and backend in common")
    changes = [
        _change(new[key], clock, a, b, slower_than)
        for key in both
        for clock in CLOCKS
        if (a := getattr(old[key], clock)) and (b := getattr(new[key], clock))
    ]
    changes.sort(key=lambda change: -change.ratio)
    wrong = [_name(new[key]) for key in both if old[key].correct and not new[key].correct]
    remarks = [f"! wrong result now, right before: {name}" for name in wrong]
    remarks += [f"only in the first file: {_name(row)}" for key, row in old.items() if key not in new]
    remarks += [f"only in the second file: {_name(row)}" for key, row in new.items() if key not in old]
    remarks += _environments(old[both[0]], new[both[0]])
    for which, found in (("first", old), ("second", new)):
        notes = [tuple(found[key].notes) for key in both]
        shared = [note for note in notes[0] if all(note in others for others in notes)]
        remarks += [f"! the {which} file says: {note}" for note in shared]
    counts = {verdict: sum(c.verdict == verdict for c in changes) for verdict in ("slower", "faster", "same")}
    numbers = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    remarks.append(f"{len(changes)} times of {len(both)} rows: {numbers} (by more than {slower_than:g}× and the noise)")
    return Comparison(changes, remarks, wrong)


def _environments(a: Row, b: Row) -> list[str]:
    """What else differs between two runs than the code; the commit and the date may."""
    lines = []
    for name, label in (("card", "card"), ("driver", "driver"), ("torch", "torch"), ("threads", "threads")):
        one, two = getattr(a.environment, name), getattr(b.environment, name)
        if one != two:
            lines.append(f"! not measured alike: {label} {one} and {two}")
    return lines


def table(found: Comparison) -> Table:
    """The changes beyond the noise, the largest slowdown first; all of them if there are none."""
    shown = [change for change in found.changes if change.verdict != "same"] or found.changes
    result = headed(("", "operation", "size", "backend", "clock", "before µs", "after µs", "×", "noise"), 5)
    for change in shown:
        row = change.row
        result.add_row(
            *(change.verdict, row.title, f"{size(row)}, {row.dtype}", row.backend, change.clock),
            *(number(change.before), number(change.after), f"{change.ratio:.2f}", f"{change.noise:.0%}"),
            style={"slower": "red", "faster": "green"}.get(change.verdict),
        )
    return result
