"""Every public docstring: its example runs, and it says what it must."""

import doctest
import inspect

import pytest
import torch

import latentfast

PUBLIC = [getattr(latentfast, name) for name in latentfast.__all__]
FUNCTIONS = [item for item in PUBLIC if inspect.isfunction(item)]


@pytest.mark.parametrize("item", FUNCTIONS, ids=lambda item: item.__name__)
def test_the_example_runs(item) -> None:
    torch.manual_seed(0)
    tests = [test for test in doctest.DocTestFinder(recurse=False).find(item, item.__name__, globs={}) if test.examples]
    assert len(tests) == 1, "a public function has one runnable example"
    output: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(tests[0], out=output.append)
    assert result.failed == 0, "".join(output)


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
