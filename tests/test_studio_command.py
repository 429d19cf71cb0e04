"""`latentfast studio`: its options, and a short soak of it."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from latentfast.cli import main
from tools import studio_soak


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--host", "0.0.0.0"], "--host: 0.0.0.0 can be reached by other machines: give --token"),
        (["--token", "short"], "--token: expected at least 16 ASCII characters, got 5"),
        (["--token", "ä" * 16], "--token: expected at least 16 ASCII characters"),
        (["--host", "192.0.2.1", "--token", "0123456789abcdef"], "--host, --port: 192.0.2.1:8321 can't be bound"),
        (["--port", "70000"], "--port"),
    ],
)
def test_refused(options: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["studio", *options]) == 2
    assert why in capsys.readouterr().err


def test_it_says_where_it_is_and_ends_when_told(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with studio_soak.server(log) as (address, process):
        page = address.replace("ws://", "http://").replace("/ws?", "/?")
        assert page in log.read_text()
        assert httpx.get(page).status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert log.read_text().splitlines()[-1] == "latentfast studio: ended"


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["studio", "--port", str(port)]) == 2
    assert f"127.0.0.1:{port} can't be bound: Address already in use" in capsys.readouterr().err


def test_a_short_soak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the whole, `python -m tools.studio_soak` is 30 minutes, without --seconds."""
    log = tmp_path / "log"
    status = studio_soak.main(["--seconds", "6", "--clients", "4", "--fuzz", "400", "--log", str(log)])
    said = capsys.readouterr().out
    assert status == 0, said + log.read_text()
    assert "400 malformed messages" in said


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    code = "import sys; sys.modules['starlette'] = None; from latentfast.cli import main; sys.exit(main(['studio']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "latentfast: error: the package starlette is not installed: pip install 'latentfast[studio]'"
    ]
