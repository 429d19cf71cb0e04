"""pytest's side of the CPU benchmarks: a test for each of a stem's CPU_CASES and way to compute it."""

from collections.abc import Iterator

import pytest
import torch

from benchmarks.cpu import ways


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("latentfast benchmarks")
    group.addoption("--threads", type=int, default=2, help="threads of every way to compute")
    group.addoption("--quick", action="store_true", help="tiny sizes, three rounds: checks that everything runs")
    group.addoption("--no-compile", action="store_true", help="leave out the torch.compile baselines")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    cases = [case.tiny() if config.getoption("--quick") else case for case in metafunc.module.CPU_CASES]
    # A case's ways next to each other, so that a busy spell of the machine falls on few comparisons.
    pairs = [(case, way) for case in cases for way in ways(not config.getoption("--no-compile"))]
    metafunc.parametrize(("case", "way"), pairs, ids=[f"{case.id}-{way}" for case, way in pairs])


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before, wanted = torch.get_num_threads(), request.config.getoption("--threads")
    torch.set_num_threads(wanted)
    yield wanted
    torch.set_num_threads(before)
