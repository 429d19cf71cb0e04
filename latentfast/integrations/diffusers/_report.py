"""What `accelerate` did to a pipeline, as a table."""

from dataclasses import dataclass

from latentfast.integrations.diffusers._measure import Cost


@dataclass(frozen=True)
class Row:
    """One part of a pipeline: what it was, and what is in its place, or why it was left."""

    part: str
    kind: str
    replaced: bool
    note: str


@dataclass(frozen=True)
class Measured:
    """A step of guidance and scheduler, without the model's calls, before and now."""

    shape: tuple[int, ...]
    dtype: str
    device: str
    steps: int
    before: Cost
    now: Cost


@dataclass(frozen=True)
class Report:
    """What was replaced, by what; what was left, and why; what it saves, if that was measured. Prints as a table."""

    pipeline: str
    active: bool
    rows: tuple[Row, ...]
    measured: Measured | None = None

    @property
    def replaced(self) -> tuple[Row, ...]:
        """The parts that were replaced."""
        return tuple(row for row in self.rows if row.replaced)

    @property
    def left(self) -> tuple[Row, ...]:
        """The parts that were left as they are."""
        return tuple(row for row in self.rows if not row.replaced)

    def __str__(self) -> str:
        return "\n".join((self._headline(), *self._table(), *self._costs()))

    def _headline(self) -> str:
        if not self.replaced:
            return f"{self.pipeline}: nothing was replaced."
        state = "accelerated" if self.active else "as it was; this had been replaced"
        return f"{self.pipeline}: {state}."

    def _table(self) -> list[str]:
        lines = [(row.part, row.kind, "replaced" if row.replaced else "left", row.note) for row in self.rows]
        widths = [max((len(line[i]) for line in lines), default=0) for i in range(3)]
        return [
            "  " + "  ".join((*(f"{x:<{n}}" for x, n in zip(line, widths, strict=False)), line[3])) for line in lines
        ]

    def _costs(self) -> list[str]:
        if self.measured is None:
            return []
        m = self.measured
        what = "launches" if m.device.startswith("cuda") else "operations"
        return [
            f"Guidance and scheduler, a step of {m.steps}, latents {'x'.join(map(str, m.shape))}, predictions in "
            f"{m.dtype}, {m.device}:",
            *(
                f"  {name:<6}  {cost.launches:6.1f} {what}  {cost.us:9.1f} µs"
                for name, cost in (("before", m.before), ("now", m.now))
            ),
        ]
