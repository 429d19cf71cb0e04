"""The build and the package: found from everywhere, honest about what was built, clear when something is missing."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import latentfast

_ROOT = Path(__file__).resolve().parents[1]
_SOURCES = (
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "latentfast",
    "kernels",
    "benchmarks",
    "csrc",
)

pytestmark = pytest.mark.skipif(not (_ROOT / "setup.py").exists(), reason="the tests do not run in a checkout")


def _run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # what pytest and the shell set must not help a package to be found
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LATENTFAST_BACKEND")}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**kept, **environment}, capture_output=True, text=True
    )


def _succeeds(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = _run(*command, cwd=cwd, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, where builds leave nothing behind."""
    copy = tmp_path_factory.mktemp("checkout")
    unwanted = shutil.ignore_patterns("*.so", "_build_info.py", "__pycache__")
    for name in _SOURCES:
        if (_ROOT / name).is_dir():
            shutil.copytree(_ROOT / name, copy / name, ignore=unwanted)
        elif (_ROOT / name).exists():
            shutil.copy(_ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel without native code, which takes seconds."""
    folder = tmp_path_factory.mktemp("wheel")
    _succeeds(
        *(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, "."),
        cwd=checkout,
        LATENTFAST_BUILD="0",
    )
    return next(folder.glob("latentfast-*.whl"))


def _environment(folder: Path) -> Path:
    """An empty virtual environment that also sees the packages of this one, and a package named `kernels`."""
    _succeeds(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    site = next(folder.glob("lib/python*/site-packages"))
    import torch

    (site / "torch_from_outside.pth").write_text(str(Path(torch.__file__).parents[1]))
    (site / "kernels").mkdir()  # the package index has one of that name, which diffusers imports
    (site / "kernels" / "__init__.py").write_text("IS_THE_OTHER = True\n")
    return folder / "bin" / "python"


@pytest.fixture(scope="module", params=["wheel", "editable"])
def python(request: pytest.FixtureRequest, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The interpreter of an environment in which the package is installed, from a wheel or editable."""
    target = request.getfixturevalue("wheel") if request.param == "wheel" else checkout
    python = _environment(tmp_path_factory.mktemp(request.param) / "env")
    editable = ("--editable",) if request.param == "editable" else ()
    _succeeds(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--no-build-isolation", "--no-deps"),
        *("--ignore-installed", *editable, target),
        cwd=checkout.parent,
        LATENTFAST_BUILD="0",
    )
    return python


@pytest.mark.parametrize("inside", [True, False], ids=["in the checkout", "elsewhere"])
def test_package_is_found(python: Path, inside: bool, checkout: Path, tmp_path: Path) -> None:
    program = """
import importlib.util, kernels, latentfast, torch
assert kernels.IS_THE_OTHER
for stem in ("interpolate", "edit", "temporal"):
    assert importlib.util.find_spec(f"latentfast.kernels.triton.{stem}") is not None, stem
    assert importlib.util.find_spec(f"latentfast.benchmarks.bench_{stem}") is not None, stem
torch.testing.assert_close(latentfast.slerp(torch.eye(2)[:1], torch.eye(2)[1:], 0.5), torch.full((1, 2), 0.5**0.5))
print(latentfast.__file__)
"""
    found = Path(_succeeds(python, "-c", program, cwd=checkout if inside else tmp_path).strip())
    from_sources = inside or "editable" in python.parents[2].name
    assert found.is_relative_to(checkout if from_sources else python.parents[1])


def test_benchmarks_run_and_have_their_rows(python: Path, tmp_path: Path) -> None:
    pytest.importorskip("rich")
    program = "import sys; from latentfast.cli import main; sys.exit(main(sys.argv[1:]))"
    quick = ("run", "--device", "cpu", "--quick", "--no-compile", "--only", "lerp-tiny_b1", "--out", tmp_path)
    _succeeds(python, "-c", program, "bench", *quick, cwd=tmp_path)
    assert (tmp_path / "cpu-quick.jsonl").exists()
    assert "slerp" in _succeeds(python, "-c", program, "bench", "table", cwd=tmp_path)


def test_build_information_says_what_was_left_out(python: Path, tmp_path: Path) -> None:
    program = "from latentfast._build_info import SUMMARY; print(SUMMARY)"
    assert "LATENTFAST_BUILD=0" in _succeeds(python, "-c", program, cwd=tmp_path)


def test_wheel_holds_what_is_needed(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    missing = [
        name
        for pattern in ("latentfast/**/*.py", "latentfast/tiny/weights/**/*", "latentfast/cli/templates/**/*")
        for name in sorted(str(path.relative_to(_ROOT)) for path in _ROOT.glob(pattern) if path.is_file())
        if "__pycache__" not in name and name not in names
    ]
    assert not missing
    assert "latentfast/kernels/triton/interpolate.py" in names
    assert {"latentfast/benchmarks/bench_edit.py", "latentfast/benchmarks/results/cpu.jsonl"} <= set(names)
    unwanted = (".so", ".cpp", ".cu"), ("kernels", "benchmarks")
    assert not [name for name in names if name.endswith(unwanted[0]) or name.startswith(unwanted[1])]


def _build(checkout: Path, tmp_path: Path, prelude: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    arguments = ["setup.py", "--quiet", "build_ext", "--build-lib", str(tmp_path)]
    program = f"import runpy, sys\n{prelude}\nsys.argv = {arguments}\nrunpy.run_path('setup.py', run_name='__main__')"
    return _run(sys.executable, "-c", program, cwd=checkout, **environment)


def test_cuda_without_nvcc_fails_loudly(checkout: Path, tmp_path: Path) -> None:
    without = (
        "import shutil\nwhich = shutil.which\nshutil.which = lambda n, **k: None if n == 'nvcc' else which(n, **k)"
    )
    done = _build(checkout, tmp_path, without, LATENTFAST_CUDA="1")
    assert done.returncode != 0
    assert "LATENTFAST_CUDA=1" in done.stderr and "nvcc" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["LATENTFAST_CUDA", "LATENTFAST_BUILD"])
def test_unknown_switch_value_is_an_error(name: str, checkout: Path, tmp_path: Path) -> None:
    done = _build(checkout, tmp_path, **{name: "yes"})
    assert done.returncode != 0
    assert f"{name} must be 0, 1 or unset, got 'yes'" in done.stderr


def test_build_without_torch_says_what_to_do(checkout: Path, tmp_path: Path) -> None:
    without = (
        "from importlib import util\nfind = util.find_spec\n"
        "util.find_spec = lambda name: None if name == 'torch' else find(name)"
    )
    done = _build(checkout, tmp_path, without)
    assert done.returncode != 0
    assert "--no-build-isolation" in done.stderr and "Traceback" not in done.stderr


def _built(name: str) -> Path:
    found = Path(latentfast.__file__).parent / name
    if not found.exists():
        pytest.skip(f"{name} was not built")
    return found


def test_summary_says_what_was_built() -> None:
    _built("_native_cpu.so")
    if importlib.util.find_spec("latentfast._build_info") is None:
        pytest.fail("the native library is there but latentfast/_build_info.py is not")
    from latentfast._build_info import SUMMARY

    assert SUMMARY.startswith("built native-cpu (")
    assert "cuda" in SUMMARY, "built or not, CUDA must be told of"


@pytest.mark.parametrize("name", ["_native_cpu.so", "_native_cuda.so"])
def test_library_uses_the_stable_abi_alone(name: str) -> None:
    """One binary for every torch: of torch's symbols only those of its C shim may be wanted, and none of Python's."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    wanted = _succeeds("nm", "--dynamic", "--undefined-only", _built(name), cwd=_ROOT)
    symbols = [line.split()[-1] for line in wanted.splitlines()]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    assert not [s for s in symbols if re.match(r"_ZN?K?(2at|3c10|5torch)|_?Py", s)]
