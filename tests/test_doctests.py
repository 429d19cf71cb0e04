"""Every public docstring: its example runs, and it says what it must."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch

import latentfast

PUBLIC = [getattr(latentfast, name) for name in latentfast.__all__]
FUNCTIONS = [item for item in PUBLIC if inspect.isfunction(item)]


MODULES = [
    module.name
    for module in pkgutil.walk_packages(latentfast.__path__, "latentfast.")
    if not module.name.startswith(tuple(f"latentfast.{x}" for x in ("kernels", "benchmarks", "__main__", "_native")))
]


def _run(test: doctest.DocTest) -> None:
    torch.manual_seed(0)
    output: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(test, out=output.append)
    assert result.failed == 0, "".join(output)


@pytest.mark.parametrize("item", FUNCTIONS, ids=lambda item: item.__name__)
def test_the_example_runs(item) -> None:
    tests = [test for test in doctest.DocTestFinder(recurse=False).find(item, item.__name__, globs={}) if test.examples]
    assert len(tests) == 1, "a public function has one runnable example"
    _run(tests[0])


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("latentfast.ops")])
def test_the_examples_of_a_module_run(name: str) -> None:
    """Of all that has some, beside the operations, whose examples run above."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(str(error))
    for test in doctest.DocTestFinder().find(module):
        if test.examples:
            _run(test)


@pytest.mark.parametrize("item", FUNCTIONS, ids=lambda item: item.__name__)
def test_every_argument_is_named(item) -> None:
    """In its own docstring or in that of the function that it refers to ("are those of `slerp_path`")."""
    text = inspect.getdoc(item)
    shared = [other for other in FUNCTIONS if f"those of `{other.__name__}`" in text and other is not item]
    described = text + "".join(inspect.getdoc(other) for other in shared)
    missing = [name for name in inspect.signature(item).parameters if f"{name}:" not in described]
    assert not missing


@pytest.mark.parametrize("item", PUBLIC, ids=lambda item: item.__name__)
def test_everything_public_has_a_docstring(item) -> None:
    assert inspect.getdoc(item)
    assert item.__module__.startswith("latentfast.")
