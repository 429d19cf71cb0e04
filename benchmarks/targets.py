"""The speeds that this project promised itself, and whether rows keep them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.rows import Row

#: The order in which the library picks a backend (latentfast/backends.py): a target is about what a user gets.
CHOSEN = ("native-cpu", "cuda", "triton", "eager")


@dataclass(frozen=True)
class Target:
    """`measure(row)` of one case must be at least (or at most) `bound`."""

    op: str
    variant: str
    workload: str
    dtype: str
    what: str
    measure: Callable[[Row], float | None]
    bound: float
    at_most: bool = False

    def met(self, value: float | None) -> bool:
        """Whether a measured value keeps the target; nothing measured keeps none."""
        return value is not None and (value <= self.bound if self.at_most else value >= self.bound)


def _faster(baseline: str, clock: str) -> Callable[[Row], float | None]:
    return lambda row: row.speedup(baseline, clock)


def _per_add(row: Row) -> float | None:
    return row.host_us[1] / row.add_us if row.host_us and row.add_us else None


def _share(row: Row) -> float | None:
    return row.floor_share


def _gpu() -> list[Target]:
    small = ("wan480_b1", "bfloat16")
    targets = []
    for op, variant in (("slerp", ""), ("edit", "N=1"), ("edit", "N=4"), ("blend", ""), ("temporal_loss_and_grad", "")):
        targets += [
            Target(op, variant, *small, "host time / add_", _per_add, 2.0, at_most=True),
            Target(op, variant, *small, "host, × torch.compile", _faster("compiled", "host_us"), 5.0),
            Target(op, variant, *small, "host, × eager", _faster("eager", "host_us"), 8.0),
        ]
    targets += [
        Target("temporal_loss", "autograd", *small, "host, × torch.compile", _faster("compiled", "host_us"), 5.0),
        Target("temporal_loss", "autograd", *small, "host, × eager", _faster("eager", "host_us"), 8.0),
    ]
    for op, variant in (("edit", "N=1"), ("edit", "N=4"), ("blend", ""), ("lerp", ""), ("temporal_loss", "")):
        targets.append(Target(op, variant, "wan720_b32", "bfloat16", "share of the copy rate", _share, 0.85))
    for op, variant, workload, share, times in (
        ("slerp", "", "wan720_b64", 0.70, 2.2),
        ("slerp_path", "K=8", "hunyuan720_b8", 0.75, 1.8),
        ("temporal_loss_and_grad", "", "wan720_b32", 0.75, 1.8),
    ):
        targets += [
            Target(op, variant, workload, "bfloat16", "share of the copy rate", _share, share),
            Target(
                op, variant, workload, "bfloat16", "device, × torch.compile", _faster("compiled", "device_us"), times
            ),
        ]
    return targets


def _cpu() -> list[Target]:
    small = ("wan480_b1", "float32")
    targets = []
    for op, variant, eager, compiled in (
        ("slerp", "", 5.0, 1.5),
        ("temporal_loss_and_grad", "", 5.0, 1.5),
        ("edit", "N=4", 4.0, 1.3),
    ):
        targets += [
            Target(op, variant, *small, "× eager", _faster("eager", "device_us"), eager),
            Target(op, variant, *small, "× torch.compile", _faster("compiled", "device_us"), compiled),
        ]
    return targets


GPU, CPU = _gpu(), _cpu()


def chosen(rows: Iterable[Row], target: Target) -> Row | None:
    """The row of the backend that the library picks by itself, if the target's case was measured."""
    case = (target.op, target.variant, target.workload, target.dtype)
    found = sorted((row for row in rows if row.case == case), key=lambda row: CHOSEN.index(row.backend))
    return found[0] if found else None


def report(rows: list[Row], targets: list[Target]) -> str:
    """A line a target: the value, the bound, met or not; beside torch.compile of the reference, that of the field's."""
    lines = []
    for target in targets:
        row = chosen(rows, target)
        value = target.measure(row) if row else None
        verdict = "met" if target.met(value) else "NOT MET" if row else "not measured"
        shown = "-" if value is None else f"{value:.2f}"
        extra = ""
        if row and "torch.compile" in target.what:
            clock = "host_us" if target.what.startswith("host") else "device_us"
            field = row.speedup("field_compiled", clock)
            extra = f"  ({row.field_note} compiled: {field:.2f})" if field else ""
        name = f"{target.op} {target.variant}".strip()
        where = f"{target.workload} {row.backend if row else ''}"
        sign = "≤" if target.at_most else "≥"
        lines.append(
            f"{verdict:12s} {name:24s} {where:22s} {target.what:24s} {shown:>7s} {sign} {target.bound:g}{extra}"
        )
    return "\n".join(lines)
