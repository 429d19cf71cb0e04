"""The speeds that this project promised itself, and whether rows keep them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from latentfast.benchmarks.cases import STEMS
from latentfast.benchmarks.operation import short
from latentfast.benchmarks.rows import Row, Times

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


Measure = Callable[[Row], float | None]


def _faster(baseline: str, clock: str) -> Measure:
    return lambda row: row.speedup(baseline, clock)


def _per_add(row: Row) -> float | None:
    return row.host_us[1] / row.add_us if row.host_us and row.add_us else None


def _share(row: Row) -> float | None:
    return row.floor_share


def _floors(row: Row) -> float | None:
    return 1 / row.floor_share if row.floor_share else None


def _of_eagers_memory(row: Row) -> float | None:
    eager = row.baselines.get("eager", Times()).peak_bytes
    return row.peak_bytes / eager if row.peak_bytes is not None and eager else None


def _fewer_launches(row: Row) -> float | None:
    peer = row.baselines.get("peer_eager", Times()).launches
    return peer / row.launches if peer and row.launches else None


#: What a target is about, in few words, and how it is taken from a row.
SHARE = "share of the copy rate", _share
HOST_ADD = "host time / add_", _per_add
HOST_COMPILE = "host, × torch.compile", _faster("compiled", "host_us")
HOST_EAGER = "host, × eager", _faster("eager", "host_us")
COMPILE = "device, × torch.compile", _faster("compiled", "device_us")
EAGER = "device, × eager", _faster("eager", "device_us")
CALL = "call, × eager", _faster("eager", "call_us")  # where eager waits for the device, its device time is unknown
PEER = "call, × peer", _faster("peer_eager", "call_us")
FLOORS = "time / floor", _floors
MEMORY = "memory / eager's", _of_eagers_memory
LAUNCHES = "launches, × fewer", _fewer_launches
AT_MOST = (HOST_ADD, FLOORS, MEMORY)


def _targets(
    op: str, variant: str, workload: str, bounds: dict[tuple[str, Measure], float], dtype: str = "bfloat16"
) -> list[Target]:
    return [
        Target(op, variant, workload, dtype, *what, bound, at_most=what in AT_MOST) for what, bound in bounds.items()
    ]


def _of_a_pipeline() -> dict[str, list[Target]]:
    """The arithmetic of a video pipeline between its model calls, by stem."""
    small = {HOST_ADD: 2.0, HOST_COMPILE: 5.0, HOST_EAGER: 8.0}
    heatmap = {FLOORS: 2.0, COMPILE: 3.0, CALL: 10.0, MEMORY: 0.01}
    return {
        "guidance": [
            *_targets("guided_step", "cfg,rescale", "wan720_b32", {SHARE: 0.70, COMPILE: 1.15, EAGER: 8.0}),
            *_targets("guided_step", "apg", "wan720_b32", {SHARE: 0.70, COMPILE: 1.8, EAGER: 8.0}),
            *_targets("guided_step", "cfg,rescale", "wan480_b1", small),
            *_targets("guided_step", "apg", "wan480_b1", small),
            *_targets("combine", "N=6", "wan720_b32", {SHARE: 0.85, COMPILE: 1.0, EAGER: 5.0}),
        ],
        "stats": _targets("adain", "", "ltx_b32", {SHARE: 0.70, COMPILE: 1.5, PEER: 50.0}),
        "mask": [
            *_targets("token_heatmap", "4 tokens", "wan14b_720p_b1", heatmap),
            *_targets(
                *("heatmap_to_mask", "quantile, dilated, smoothed", "wan720_grid_b1"),
                {COMPILE: 2.0, EAGER: 5.0},
                "float32",
            ),
        ],
        "preview": _targets("latent_to_rgb", "8x", "hunyuan720_b1", {SHARE: 0.70, COMPILE: 4.0, EAGER: 20.0}),
        "plan": _targets("plan_run", "6 edits, RGB 8x", "wan480_b1", {FLOORS: 1.5, COMPILE: 2.0, EAGER: 5.0}),
        "tiles": _targets("stitch", "", "wan720_b1", {SHARE: 0.60, LAUNCHES: 50.0, PEER: 5.0}),
    }


def _of_the_core() -> list[Target]:
    """Interpolation, edits, temporal losses."""
    small = {HOST_ADD: 2.0, HOST_COMPILE: 5.0, HOST_EAGER: 8.0}
    targets = []
    for op, variant in (("slerp", ""), ("edit", "N=1"), ("edit", "N=4"), ("blend", ""), ("temporal_loss_and_grad", "")):
        targets += _targets(op, variant, "wan480_b1", small)
    targets += _targets("temporal_loss", "autograd", "wan480_b1", {HOST_COMPILE: 5.0, HOST_EAGER: 8.0})
    for op, variant in (("edit", "N=1"), ("edit", "N=4"), ("blend", ""), ("lerp", ""), ("temporal_loss", "")):
        targets += _targets(op, variant, "wan720_b32", {SHARE: 0.85})
    return [
        *targets,
        *_targets("slerp", "", "wan720_b64", {SHARE: 0.70, COMPILE: 2.2}),
        *_targets("slerp_path", "K=8", "hunyuan720_b8", {SHARE: 0.75, COMPILE: 1.8}),
        *_targets("temporal_loss_and_grad", "", "wan720_b32", {SHARE: 0.75, COMPILE: 1.8}),
    ]


def _cpu() -> list[Target]:
    core = {
        ("slerp", ""): {EAGER: 5.0, COMPILE: 1.5},
        ("temporal_loss_and_grad", ""): {EAGER: 5.0, COMPILE: 1.5},
        ("edit", "N=4"): {EAGER: 4.0, COMPILE: 1.3},
    }
    targets = [t for case, bounds in core.items() for t in _targets(*case, "wan480_b1", bounds, "float32")]
    for stem in sorted(set(STEMS) - set(_CORE_STEMS)):
        for case in STEMS[stem].CPU_CASES:
            name = case.operation.name, case.operation.variant, case.workload
            targets += _targets(*name, {EAGER: 3.0, COMPILE: 1.2}, short(case.dtype))
    return targets


_CORE_STEMS = ("interpolate", "edit", "temporal")
GPU, CPU = [*_of_the_core(), *(t for stem, found in _of_a_pipeline().items() if stem in STEMS for t in found)], _cpu()


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
