"""The studio over the wire: who may use it, what tabs see, and that no tab and no message brings it down."""

import asyncio
import io
import random
import time
from collections.abc import Iterator
from dataclasses import replace

import av
import httpx
import pytest
import torch
from studio_fakes import PATIENCE, SHOT, FakeModel, Served, Tab, served
from test_studio_document import malformed
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from latentfast.studio import Access, Document
from latentfast.studio.client import Client
from latentfast.studio.kinds import KINDS
from latentfast.studio.protocol import LARGEST, run_data
from latentfast.studio.server import FORBIDDEN, FULL, NONSENSE

WITHOUT_A_MODEL = Document()


@pytest.fixture
def studio() -> Iterator[Served]:
    with served() as running:
        yield running


@pytest.fixture
def tab(studio: Served) -> Iterator[Tab]:
    with Tab(studio) as tab:
        yield tab.ready()


# --- Who may use it ---------------------------------------------------------------------------------------------------


def test_without_the_token_there_is_nothing_but_the_pages_own_files(studio: Served) -> None:
    base = studio.url("").partition("?")[0]
    with httpx.Client() as client:
        for path in ("/", "/export/run.json", "/export/clip.mp4", "/?token=", "/?token=wrong", "/anything"):
            answer = client.get(base + path)
            assert answer.status_code == 403, path
            assert "latentfast studio" in answer.text
        page = client.get(studio.address)
        assert page.status_code == 200
        for name in ("style.css", "main.js", "icon.svg"):
            assert f"static/{name}" in page.text
            assert client.get(f"{base}/static/{name}").status_code == 200
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert page.headers["referrer-policy"] == "no-referrer"
        assert "server" not in page.headers


def test_no_path_leads_to_a_file(studio: Served) -> None:
    base = studio.url("").partition("?")[0]
    for path in (
        "../server.py",
        "..%2fserver.py",
        "%2e%2e/server.py",
        "/etc/passwd",
        "main.js/../../server.py",
        "x.py",
    ):
        with httpx.Client() as client:
            answer = client.get(f"{base}/static/{path}")
        assert answer.status_code in (403, 404), path
        assert "import" not in answer.text
    with httpx.Client() as client:
        assert client.post(studio.address, content=b"x").status_code == 405


def test_other_names_and_other_sites_are_refused(studio: Served) -> None:
    port = studio.address.split(":")[2].split("/")[0]
    with httpx.Client() as client:
        answer = client.get(studio.address, headers={"Host": f"evil.example:{port}"})  # DNS rebinding
        assert (answer.status_code, "not at evil.example" in answer.text) == (403, True)
        answer = client.get(studio.address, headers={"Origin": "http://evil.example"})
        assert (answer.status_code, "another site's page" in answer.text) == (403, True)
        assert client.get(studio.address, headers={"Host": f"localhost:{port}"}).status_code == 200
        assert client.get(studio.address, headers={"Host": "[::1"}).status_code in (400, 403)
    with pytest.raises(InvalidStatus) as caught:
        connect(studio.url("/ws", "ws"), origin="http://evil.example")
    assert caught.value.response.status_code == 403
    with connect(studio.url("/ws", "ws"), origin=f"http://127.0.0.1:{port}"):
        pass


def test_a_wrong_token_is_told_to_a_page_that_is_still_open(studio: Served) -> None:
    with connect(studio.url("/ws", "ws") + "x") as socket, pytest.raises(ConnectionClosed) as caught:
        socket.recv(timeout=PATIENCE)
    assert caught.value.rcvd.code == FORBIDDEN
    assert "latentfast studio" in caught.value.rcvd.reason


def test_access_beyond_this_machine() -> None:
    public = Access("0123456789abcdef", "0.0.0.0")
    assert public.refusal("studio.example:8321", None) is None  # any name may lead here; the token is what counts
    assert public.refusal("studio.example:8321", "http://studio.example:8321") is None
    assert "another site" in public.refusal("studio.example:8321", "http://evil.example")
    assert public.knows("token=0123456789abcdef") and not public.knows("token=0123456789abcdeg")
    assert not public.knows("")


# --- What tabs see ----------------------------------------------------------------------------------------------------


def test_a_tab_gets_all_of_it_at_once(tab: Tab) -> None:
    assert [kind["kind"] for kind in tab.hello["kinds"]] == list(KINDS)
    assert tab.state["clip"]["prompt"] == SHOT.prompt
    assert tab.state["words"][2] == ["circle", 0]
    assert tab.state["layers"] == []
    tab.edited(exact=True)
    assert torch.equal(tab.pixels(), tab.pixels("source exact"))
    assert tab.pixels("source").shape == (3, 32, 48, 3)
    assert tab.clips["source"][0]["places"] == [0.0, 2.5, 6.5]


def test_a_slider_shows_other_pixels_and_undo_the_old_ones(tab: Tab) -> None:
    before = tab.pixels("source")
    tab.send("add", kind="brightness")
    tab.until(lambda: tab.state["layers"])
    id = tab.layer()["id"]
    for step in range(10):
        tab.send("amount", id=id, amount=step / 10, live=True, stamp=float(step))
    tab.send("amount", id=id, amount=0.9, live=False, stamp=10.0)
    header = tab.edited(stamp=10.0, exact=False)
    assert header["mover"] == tab.hello["client"]
    assert (tab.pixels().float() - before.float()).mean() > 30
    tab.send("undo")
    tab.until(lambda: tab.layer()["amount"] == 0.4)  # all of the motion at once
    tab.send("undo")
    tab.until(lambda: tab.state["layers"] == [])
    tab.edited(exact=True)
    assert torch.equal(tab.pixels(), tab.pixels("source exact"))
    tab.send("redo")
    tab.send("redo")
    tab.until(lambda: tab.state["layers"] and tab.layer()["amount"] == 0.9)


def test_words_confine_an_edit(tab: Tab) -> None:
    tab.send("look", words=[["circle", 0]])
    tab.until(lambda: tab.clips.get("mask", ({"places": []},))[0]["places"])
    mask = tab.pixels("mask")
    assert mask.shape == (3, 4, 6, 1)
    assert 0 < mask.float().mean() < 255
    before = tab.pixels("source")
    tab.send("add", kind="brightness")
    tab.until(lambda: tab.state["layers"])
    tab.send("confine", id=tab.layer()["id"], words=[["circle", 0]])
    tab.until(lambda: tab.layer()["words"])
    tab.send("amount", id=tab.layer()["id"], amount=1.0, stamp=7.0)
    tab.edited(stamp=7.0, exact=False)
    changed = (tab.pixels() != before).any(-1).float()
    assert changed[:, 16, :].mean() > 0
    columns = changed.mean((0, 1))
    assert columns.min() == 0 < columns.max()  # not everywhere
    assert tab.layer()["where"] == "where the model sees “circle”"
    tab.send("look", words=[])
    tab.until(lambda: not tab.clips["mask"][0]["places"])


def test_order_switch_and_removal(tab: Tab) -> None:
    for kind in ("warmth", "contrast", "tint"):
        tab.send("add", kind=kind)
    tab.until(lambda: len(tab.state["layers"]) == 3)
    first = tab.layer(0)["id"]
    digest = tab.state["digest"]
    tab.send("move", id=first, to=2)
    tab.until(lambda: tab.layer()["id"] == first)
    assert tab.state["digest"] != digest
    tab.send("switch", id=first, on=False)
    tab.until(lambda: not tab.layer()["on"])
    tab.send("remove", id=first)
    tab.until(lambda: len(tab.state["layers"]) == 2)
    tab.send("amount", id=first, amount=0.1)
    tab.until(lambda: tab.problems)
    assert tab.problems == ["that edit is not there any more"]


def test_another_clip_is_made_and_mixed_in(studio: Served, tab: Tab) -> None:
    tab.send("add", kind="fade", prompt="a blue star", seed=5)
    tab.until(lambda: tab.state["layers"] and tab.layer()["problem"] is None)
    tab.send("amount", id=tab.layer()["id"], amount=1.0, stamp=3.0)
    tab.edited(stamp=3.0, exact=True)
    other = replace(SHOT, prompt="a blue star", seed=5)
    made = studio.model.make(other, outdated=lambda: False, on_step=lambda step: None)
    assert torch.equal(tab.pixels(), studio.model.decode(made.latents, lambda: False)[0])
    assert "“a blue star”, seed 5" in tab.layer()["where"]


def test_the_newest_clip_wins_and_cancel_goes_back(studio: Served, tab: Tab) -> None:
    studio.model.gate.clear()
    for seed in (11, 12, 13):
        tab.send("generate", prompt="a star", seed=seed, steps=5, guidance=1.0)
    tab.until(lambda: tab.state["clip"]["seed"] == 13 and tab.state["job"])
    assert not tab.state["ready"]
    studio.model.gate.set()
    tab.until(lambda: tab.state["ready"] and tab.state["job"] is None)
    assert [shot.seed for shot in studio.model.made if shot.prompt == "a star"] == [13]
    studio.model.gate.clear()
    tab.send("generate", prompt="a circle", seed=14, steps=5, guidance=1.0)
    tab.until(lambda: tab.state["job"] and tab.state["job"]["stoppable"])
    tab.send("cancel")
    tab.until(lambda: tab.state["clip"]["seed"] == 13 and tab.state["job"] is None)
    assert tab.state["ready"]
    studio.model.gate.set()


def test_sampling_is_shown_on_the_way(studio: Served, tab: Tab) -> None:
    studio.model.pause = 0.01
    tab.send("generate", prompt="a star", seed=3, steps=50, guidance=1.0)
    seen = set()

    def sampling() -> bool:
        if "edited" in tab.clips:
            seen.add(tab.clips["edited"][0]["sampling"])
        return any(text.endswith("of 50") for text in seen)

    tab.until(sampling)
    tab.ready()
    tab.edited(sampling="", exact=True)


def test_a_clip_is_put_into_the_cache_made_and_decoded_under_one_key(studio: Served, tab: Tab) -> None:
    assert studio.model.keys == [SHOT]
    assert studio.model.remembered == [(SHOT, False), (SHOT, True)]


def test_a_clip_that_cannot_be_made_is_told(tab: Tab) -> None:
    tab.send("generate", prompt="impossible", seed=0, steps=1, guidance=1.0)
    tab.until(lambda: tab.problems)
    assert tab.problems == ["That clip can't be made: no clip of that"]
    tab.send("undo")
    tab.ready()
    assert tab.state["clip"]["prompt"] == SHOT.prompt


def test_tabs_see_the_same(studio: Served, tab: Tab) -> None:
    with Tab(studio) as other:
        other.ready()
        tab.send("add", kind="warmth")
        other.until(lambda: other.state["layers"])
        other.send("amount", id=other.layer()["id"], amount=-1.0)
        tab.until(lambda: tab.state["layers"] and tab.layer()["amount"] == -1.0)
    with Tab(studio) as late:
        late.until(lambda: late.state and late.layer()["amount"] == -1.0)
        late.edited(exact=True)


def test_files(studio: Served, tab: Tab) -> None:
    tab.send("add", kind="warmth")
    tab.send("add", kind="towards", prompt="a star", seed=2)
    tab.until(lambda: len(tab.state["layers"]) == 2 and tab.layer()["problem"] is None)
    tab.edited(exact=True)
    with httpx.Client(timeout=PATIENCE) as client:
        movie = client.get(studio.url("/export/clip.mp4"))
        answer = client.get(studio.url("/export/run.json"))
    assert movie.headers["content-disposition"] == 'attachment; filename="clip.mp4"'
    with av.open(io.BytesIO(movie.content)) as container:
        frames = torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)])
    assert (frames.float() - tab.pixels().float()).abs().mean() < 12  # h264 of noise
    run = answer.json()
    assert run["environment"]["versions"]["torch"]
    assert [edit["edit"] for edit in run["recipe"]["edits"]] == ["direction", "slerp_towards"]
    digest = tab.state["digest"]
    tab.send("undo")
    tab.send("undo")
    tab.until(lambda: tab.state["layers"] == [])
    tab.send("open", run=run)
    tab.until(lambda: tab.state["digest"] == digest)
    assert [layer["kind"] for layer in tab.state["layers"]] == ["warmth", "towards"]
    tab.send("open", run={**run, "layers": 3})
    tab.until(lambda: tab.problems)
    assert tab.problems == ["layers must be a list of at most 64"]


def test_without_a_clip_there_is_nothing_to_save_or_edit() -> None:
    with served(document=WITHOUT_A_MODEL) as studio, Tab(studio) as tab:
        tab.until(lambda: tab.state.get("defaults"))
        tab.send("add", kind="warmth")
        tab.until(lambda: tab.problems)
        assert tab.problems == ["make a clip first, then there is something to edit"]
        with httpx.Client() as client:
            for path in ("/export/clip.mp4", "/export/run.json"):
                answer = client.get(studio.url(path))
                assert (answer.status_code, answer.text.count("\n")) == (409, 1)
        tab.send("generate", prompt="a star", seed=1, steps=2, guidance=1.0)
        tab.ready()


def test_a_model_that_does_not_load_is_told() -> None:
    def load():
        raise OSError("no such folder")

    with served(load) as studio, Tab(studio) as tab:
        tab.until(lambda: tab.state and "no such folder" in tab.state["job"]["text"])


# --- What may go wrong ------------------------------------------------------------------------------------------------


def test_malformed_messages_end_with_their_own_tab(studio: Served, tab: Tab) -> None:
    """The short form; `tools/studio_soak.py --fuzz 10000` sends more."""
    rng = random.Random(3)
    sent = 0
    while sent < 400:
        bad = Tab(studio)
        bad.socket.send("nonsense")
        bad.until(lambda bad=bad: bad.problems)
        try:
            for _ in range(150):
                # what is no UTF-8 a client can't send
                bad.socket.send(malformed(rng).encode("utf-8", "replace").decode())
                sent += 1
            while True:
                bad.take(bad.socket.recv(timeout=PATIENCE))
        except ConnectionClosed as closed:
            assert closed.rcvd is None or closed.rcvd.code == NONSENSE
        assert bad.problems[0].startswith("a message must be JSON")
    tab.send("add", kind="warmth")
    tab.until(lambda: tab.state["layers"])


def test_a_message_that_is_too_large_ends_its_connection(studio: Served, tab: Tab) -> None:
    bad = Tab(studio)
    with pytest.raises(ConnectionClosed) as caught:
        bad.socket.send("[" + " " * LARGEST + "]")
        while True:
            bad.socket.recv(timeout=PATIENCE)
    closed = caught.value.rcvd  # or the connection went while the message was still on its way
    assert closed is None or closed.code == 1009
    bad = Tab(studio)
    bad.socket.send(b"\x00" * 1000)  # not text
    bad.until(lambda: bad.problems)
    bad.socket.close()
    tab.send("undo")
    tab.send("look", words=[])
    tab.until(lambda: "mask" in tab.clips)


def test_too_many_tabs(studio: Served) -> None:
    tabs = [Tab(studio) for _ in range(32)]
    for tab in tabs:
        tab.until(lambda tab=tab: tab.state)
    with connect(studio.url("/ws", "ws")) as socket, pytest.raises(ConnectionClosed) as caught:
        socket.recv(timeout=PATIENCE)
    assert caught.value.rcvd.code == FULL
    assert caught.value.rcvd.reason == "the studio has 32 tabs open already: close one"
    tabs.pop().socket.close()
    deadline = time.monotonic() + PATIENCE
    while True:
        with connect(studio.url("/ws", "ws")) as socket:
            try:
                socket.recv(timeout=PATIENCE)
                break
            except ConnectionClosed:
                assert time.monotonic() < deadline
    for tab in tabs:
        tab.socket.close()


def test_tabs_that_vanish_in_mid_edit_leave_nothing(studio: Served, tab: Tab) -> None:
    tab.send("add", kind="warmth")
    tab.until(lambda: tab.state["layers"])
    for _ in range(8):
        gone = Tab(studio)
        for step in range(20):
            gone.send("amount", id=tab.layer()["id"], amount=step / 20, live=True)
        gone.socket.socket.close()  # without a word
    tab.until(lambda: tab.layer()["amount"] == 0.95)
    deadline = time.monotonic() + PATIENCE
    while len(studio.studio._clients) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    tab.send("amount", id=tab.layer()["id"], amount=0.5, stamp=1.0)
    tab.edited(stamp=1.0)


def test_a_tab_that_reads_nothing_holds_nobody_up(studio: Served, tab: Tab) -> None:
    idle = Tab(studio)  # never receives
    tab.send("add", kind="warmth")
    tab.until(lambda: tab.state["layers"])
    for step in range(60):
        stamp = float(step)
        tab.send("amount", id=tab.layer()["id"], amount=(step % 100) / 100, live=True, stamp=stamp)
        tab.edited(stamp=stamp)
    client = studio.studio._clients[min(set(studio.studio._clients) - {tab.hello["client"]})]
    assert len(client._mail) <= 6
    idle.socket.socket.close()


# --- A tab's outbox ---------------------------------------------------------------------------------------------------


def test_the_outbox_keeps_the_newest_of_each_kind_and_waits_for_pictures() -> None:
    async def main() -> tuple[list[str], list[str]]:
        client, sent = Client(1), []

        async def send(message: str | bytes) -> None:
            sent.append(message if isinstance(message, str) else message.decode())

        for number in range(10):
            client.post("state", f"state {number}")
            client.picture(number, f"picture {number}".encode())
        for _ in range(9):
            client.complain("no")
        sending = asyncio.create_task(client.send_all(send))
        await asyncio.sleep(0.02)
        first = list(sent)
        for number in range(10, 15):
            client.picture(number, f"picture {number}".encode())
            await asyncio.sleep(0.01)
        ahead = len(sent)
        client.shown(10)
        await asyncio.sleep(0.02)
        sending.cancel()
        assert ahead == len(first) + 1  # one of five: two are not acknowledged
        return first, sent[ahead:]

    first, later = asyncio.run(main())
    assert first[:2] == ["state 9", "picture 9"]
    assert len(first) == 2 + Client.MOST_PROBLEMS
    assert later == ["picture 14"]


def test_the_fake_is_like_the_model() -> None:
    from latentfast.studio import Model

    assert {name for name in vars(Model) if not name.startswith("_")} <= set(dir(FakeModel()))
    assert run_data(Document(SHOT))["clip"] == vars(SHOT)
