"""The choice of a backend: what is listed, what is forced, what falls back, and what is said about it."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import latentfast
from latentfast import _operators
from latentfast.backends import implementation
from tests.helpers import TARGETS, Target, skip_where_lacking, why_missing

ROOT = Path(latentfast.__file__).parents[1]
CHOSEN = {"native-cpu": "latentfast", "cuda": "latentfast", "triton": "latentfast_triton", "eager": "latentfast_eager"}


def _python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run `code` in a fresh interpreter with `environment` on top of this one's, without what steers a backend."""
    clean = {k: v for k, v in os.environ.items() if k not in ("LATENTFAST_BACKEND", "TRITON_INTERPRET")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_each_backend_is_here_or_says_why_not(target: Target) -> None:
    if reason := why_missing(target):
        pytest.skip(f"{target}: {reason}")
    with latentfast.use_backend(target.backend):
        out = latentfast.slerp(*torch.eye(2, device=target.device).unsqueeze(1), 0.5)
    assert torch.allclose(out, torch.full_like(out, 0.5**0.5))


def test_backends_are_listed_with_reasons() -> None:
    found = latentfast.backends()
    assert [backend.name for backend in found] == ["native-cpu", "cuda", "triton", "eager"]
    assert all(bool(backend.reason) != backend.available for backend in found)
    assert found[-1].available  # eager, always


@pytest.mark.parametrize("name", _operators.SCHEMAS)
def test_every_backend_has_every_operator(name: str, target: Target) -> None:
    skip_where_lacking(name, target.device)
    chosen = implementation(name, torch.empty(0, device=target.device))
    assert chosen is getattr(getattr(torch.ops, CHOSEN[target.backend]), name).default


def test_left_alone_the_first_available_backend_of_the_device_runs() -> None:
    here = {
        target.device: [t.backend for t in TARGETS if t.device == target.device and not why_missing(t)]
        for target in TARGETS
    }
    order = {"cpu": ("native-cpu", "eager"), "cuda": ("cuda", "triton", "eager")}
    for device, names in here.items():
        if names:
            first = next(name for name in order[device] if name in names)
            found = implementation("edit", torch.empty(0, device=device))
            assert found is getattr(torch.ops, CHOSEN[first]).edit.default


def test_other_devices_run_eagerly() -> None:
    assert implementation("edit", torch.empty(0, device="meta")) is torch.ops.latentfast_eager.edit.default
    out = latentfast.slerp(*torch.empty(2, 3, 4, 5, device="meta"), 0.5)
    assert out.shape == (3, 4, 5)


# --- use_backend ------------------------------------------------------------------------------------------------------


def test_use_backend_nests_and_ends() -> None:
    x = torch.empty(0)
    before = implementation("interpolate", x)
    with latentfast.use_backend("eager"):
        eager = implementation("interpolate", x)
        assert eager is torch.ops.latentfast_eager.interpolate.default
        with latentfast.use_backend("eager"):
            pass
        assert implementation("interpolate", x) is eager
    assert implementation("interpolate", x) is before


def test_use_backend_ends_with_an_error() -> None:
    x = torch.empty(0)
    before = implementation("interpolate", x)
    with pytest.raises(KeyError), latentfast.use_backend("eager"):
        raise KeyError
    assert implementation("interpolate", x) is before


def test_unknown_backends_are_refused() -> None:
    with (
        pytest.raises(ValueError, match="name must be one of native-cpu, cuda, triton, eager, got 'numpy'"),
        latentfast.use_backend("numpy"),
    ):
        pass


def test_an_unavailable_backend_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = importlib.import_module("latentfast.backends")
    gone = latentfast.Backend("triton", False, "triton is not installed")
    monkeypatch.setitem(backends._found, "triton", gone)
    with (
        pytest.raises(RuntimeError, match="'triton', which is not available here: triton is not installed"),
        latentfast.use_backend("triton"),
    ):
        pass


def test_a_backend_without_the_tensors_device_is_refused_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cuda backend and CPU tensors; where there is no GPU, pretend that the backend is available."""
    backends = importlib.import_module("latentfast.backends")
    monkeypatch.setitem(backends._found, "cuda", latentfast.Backend("cuda", True))
    a = torch.ones(2, 3)
    with (
        latentfast.use_backend("cuda"),
        pytest.raises(RuntimeError, match="'cuda' was asked for but has no 'interpolate' for tensors on 'cpu'"),
    ):
        latentfast.slerp(a, a, 0.5)


# --- The environment and the log, each in a process of its own --------------------------------------------------------

SAY = (
    "import torch, latentfast; from latentfast.backends import implementation;"
    "print(implementation('interpolate', torch.empty(0)));"
    "print(latentfast.lerp(torch.zeros(1), torch.ones(1), 0.5).item())"
)


def test_the_environment_forces_a_backend() -> None:
    done = _python(SAY, LATENTFAST_BACKEND="eager")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["latentfast_eager.interpolate.default", "0.5"]
    assert "latentfast runs on backend" not in done.stderr  # nothing fell back: it was asked for


def test_the_environment_is_overruled_inside_use_backend() -> None:
    forced = "triton" if importlib.util.find_spec("triton") else "eager"
    code = f"import latentfast\nwith latentfast.use_backend('eager'):\n    exec({SAY!r})"
    done = _python(code, LATENTFAST_BACKEND=forced, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["latentfast_eager.interpolate.default", "0.5"]


def test_an_unknown_backend_in_the_environment_is_an_error() -> None:
    done = _python(SAY, LATENTFAST_BACKEND="fast")
    assert done.returncode != 0
    assert "LATENTFAST_BACKEND must be one of native-cpu, cuda, triton, eager, got 'fast'" in done.stderr


def test_an_unavailable_backend_in_the_environment_is_an_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("torch sees a CUDA device")
    done = _python(SAY, LATENTFAST_BACKEND="triton")
    assert done.returncode != 0
    assert "LATENTFAST_BACKEND asks for backend 'triton', which is not available here: " in done.stderr


def test_a_fallback_is_logged_once_with_its_reason() -> None:
    code = (
        "import torch\n"
        "def broken(path): raise OSError('undefined symbol: _ZN')\n"
        "torch.ops.load_library = broken\n"
        "from pathlib import Path\n"
        "Path.glob = lambda self, pattern: [self / '_native.so']\n"
        f"for _ in range(2): exec({SAY!r})\n"
        "print({b.name: b.reason for b in latentfast.backends()}['native-cpu'])"
    )
    done = _python(code)
    assert done.returncode == 0, done.stderr
    assert "latentfast_eager.interpolate.default\n0.5" in done.stdout
    assert "its library does not load: undefined symbol: _ZN" in done.stdout
    line = (
        "on cpu latentfast runs on backend 'eager', not 'native-cpu': its library does not load: undefined symbol: _ZN"
    )
    assert done.stderr.count(line) == 1


def test_importing_is_cheap() -> None:
    """Neither Triton, nor NumPy's heavier friends, nor a CUDA context."""
    code = (
        "import sys, latentfast, torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "print([name for name in ('triton', 'diffusers', 'transformers', 'torch._dynamo') if name in sys.modules])"
    )
    done = _python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_doctor_reports() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "latentfast.doctor"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for backend in latentfast.backends():
        assert any(line.startswith("backend") and f" {backend.name}:" in line for line in lines)
    assert any(line.startswith("torch") and torch.__version__ in line for line in lines)
