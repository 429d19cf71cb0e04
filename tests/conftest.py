"""Fixtures of every test, and the tables at the end of a run: which backends were tested, what was skipped and why."""

import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when it is first imported; its kernels then run on the CPU too, for their logic.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis

import latentfast
from tests.helpers import TARGETS, Target, why_missing

# The same examples on every run, and no deadlines: how long an example takes says nothing about its result.
hypothesis.settings.register_profile(
    "latentfast",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=20,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("latentfast")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-backend",
        action="append",
        default=[],
        metavar="BACKEND@DEVICE",
        help="fail if this backend cannot be tested here, e.g. native-cpu@cpu (repeatable)",
    )

    parser.addoption(
        "--interpret-all",
        action="store_true",
        help="run every case through Triton's interpreter too, not every fourth of a test's cases",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Triton's interpreter takes a tenth of a second a call: of a test with many cases it gets every fourth."""
    if config.getoption("--interpret-all"):
        return
    kept, dropped, seen = [], [], Counter()
    cases = Counter(item.originalname for item in items if _interpreted(item))
    for item in items:
        if _interpreted(item) and cases[item.originalname] > 12:
            seen[item.originalname] += 1
            if seen[item.originalname] % 4 != 1:
                dropped.append(item)
                continue
        kept.append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


def _interpreted(item: pytest.Item) -> bool:
    target = getattr(item, "callspec", None) and item.callspec.params.get("target")
    return isinstance(target, Target) and target.interpreted


def pytest_configure(config: pytest.Config) -> None:
    for name in config.getoption("--require-backend"):
        backend, _, device = name.partition("@")
        target = Target(backend, device)
        if target not in TARGETS:
            raise pytest.UsageError(f"--require-backend must be one of {', '.join(map(str, TARGETS))}, got {name}")
        if reason := why_missing(target):
            raise pytest.UsageError(f"backend {name} is required, but: {reason}")


def pytest_report_header() -> list[str]:
    here = [str(target) for target in TARGETS if not why_missing(target)]
    away = [f"{target} ({why_missing(target)})" for target in TARGETS if why_missing(target)]
    return [f"backends under test: {', '.join(here)}", *(f"backend not here: {line}" for line in away)]


def pytest_terminal_summary(terminalreporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else str(report.longrepr)
        for report in skipped
    )
    terminalreporter.section(f"{len(skipped)} skipped, by reason")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:6d}  {reason}")
    for line in pytest_report_header():
        terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def _alike() -> Iterator[None]:
    """The same draws, and one thread of torch's, unless a test sets more.

    There is a process of tests for each core, and for small tensors more threads only wait for each other.
    """
    torch.manual_seed(20240607)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[target for target in TARGETS if not why_missing(target)], ids=str)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Each backend that this machine has, on each device it runs on; operations inside the test run on it."""
    with latentfast.use_backend(request.param.backend):
        yield request.param
