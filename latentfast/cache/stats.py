"""What a cache has done."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Stats", "TierStats"]


@dataclass(frozen=True)
class TierStats:
    """One tier.

    Attributes:
        hits: gets that this tier answered.
        entries: how many it holds.
        bytes: how many bytes they have (on disk with their headers).
        budget: how many they may have.
        evictions: entries that had to go for others.
    """

    hits: int
    entries: int
    bytes: int
    budget: int
    evictions: int


@dataclass(frozen=True)
class Stats:
    """What a cache has done since it was opened, in this process.

    Attributes:
        hits: gets that were answered, exactly.
        approximate: calls of ``nearest`` that were answered.
        misses: gets that were not.
        seconds_saved: what the entries of the exact hits had cost to make.
        device, host, disk: the tiers (``device``: all GPUs together).
        pending: puts that are still on their way down.
        quarantined: files that were found damaged.
        failures: entries that could not be written to the disk.
    """

    hits: int
    approximate: int
    misses: int
    seconds_saved: float
    device: TierStats
    host: TierStats
    disk: TierStats
    pending: int
    quarantined: int
    failures: int

    @property
    def evictions(self) -> int:
        """Of all tiers."""
        return self.device.evictions + self.host.evictions + self.disk.evictions
