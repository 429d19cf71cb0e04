"""The short form of tools/cache_torture.py: writers killed at random, damage, a full disk, a quota."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_killed_writers_lose_nothing_and_nothing_wrong_is_served(tmp_path: Path) -> None:
    out = tmp_path / "counts.jsonl"
    # In a process of its own: it forks, and this one has threads.
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "cache_torture.py", "--kills", "25", "--folder", tmp_path, "--out", out],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(counts) == 5 and all(scenario["kills"] >= 5 for scenario in counts)
    assert all(scenario["hits"] and scenario["confirmed"] for scenario in counts if "quota" not in scenario["scenario"])
    assert sum(scenario["damaged"] for scenario in counts)
