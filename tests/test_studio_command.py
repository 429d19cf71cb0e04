"""`latentfast studio`: its options, and a short soak of it."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch
from studio_fakes import Tab

from latentfast.cli import main
from tools import studio_soak

pytest_plugins = ("cli_fixtures",)


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


def test_another_model(tmp_path: Path, wan_folder: Path) -> None:
    options = ["--model", str(wan_folder), "--device", "cpu", "--height", "64", "--width", "64"]
    with studio_soak.server(tmp_path / "log", *options) as (address, _), Tab(address) as tab:
        tab.until(lambda: tab.state.get("model") == "WanPipeline")
        assert tab.state["clip"] is None  # it begins with none: a clip of such a model takes its time
        tab.send("generate", prompt="a red circle", seed=1, steps=2, guidance=1.5)
        tab.ready()
        source = tab.pixels("source exact")
        assert source.shape == (9, 64, 64, 3) and source.float().std() > 1
        tab.send("add", kind="warmth")
        tab.until(lambda: tab.state["layers"])
        tab.send("amount", id=tab.layer()["id"], amount=1.0, live=False, stamp=1.0)
        edited = tab.edited(stamp=1.0)
        places = [source[round(place)] for place in edited["places"]]
        assert (tab.pixels().float() - torch.stack(places).float()).abs().mean() > 1
        tab.send("look", words=[["circle", 0]])
        tab.until(lambda: tab.clips["mask"][0]["width"])
        assert tab.pixels("mask").unique().numel() > 1
        assert tab.problems == []


def test_a_model_without_frames_in_its_latents_is_refused(tmp_path: Path, ltx_folder: Path) -> None:
    with studio_soak.server(tmp_path / "log", "--model", str(ltx_folder)) as (address, _), Tab(address) as tab:
        tab.until(lambda: tab.state.get("job") and not tab.state["job"]["text"].startswith("Loading"))
        why = "The model can't be loaded: LTXPipeline packs its latents into tokens"
        assert why in tab.state["job"]["text"] and why in (tmp_path / "log").read_text()


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
