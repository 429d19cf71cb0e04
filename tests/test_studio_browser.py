"""The studio in a real browser: headless Chromium, the embedded model, what a user does and sees.

Pictures of it are kept in the folder named by STUDIO_SCREENSHOTS, else in pytest's temporary one.
"""

import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from studio_fakes import Served, served
from torch import Tensor

from latentfast.cli.request import Request
from latentfast.studio import Document, Model, Shot
from latentfast.tiny import rgb_factors

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium was found")

FLAGS = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync"  # fmt: skip # noqa: E501
PROMPT = "a big red circle moving left and a small yellow star moving right on a gray background in bright light"
PATIENCE = 120_000  # milliseconds; a test that passes takes seconds


@contextmanager
def embedded() -> Iterator[Model]:
    with Request(device="cpu", frames=9).sampler() as sampler:
        yield Model(sampler, rgb_factors())


@pytest.fixture(scope="module")
def studio() -> Iterator[Served]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with served(embedded, Document(Shot(PROMPT, 0, 6, 1.5))) as running:
        yield running
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = os.environ.get("STUDIO_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("studio")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def opened(browser, studio: Served, width: int = 1280, height: int = 860, **options) -> Iterator["playwright.Page"]:
    """The studio's page; an error on its console fails the test."""
    context = browser.new_context(viewport={"width": width, "height": height}, reduced_motion="reduce", **options)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(studio.address)
    page.wait_for_selector("body[data-ready=true]")
    yield page
    context.close()
    assert errors == []


@pytest.fixture
def page(browser, studio: Served) -> Iterator["playwright.Page"]:
    with opened(browser, studio) as page:
        yield page


def pixels(page) -> Tensor:
    """What the canvas shows, `(H, W, 3)`."""
    with Image.open(io.BytesIO(page.locator("#screen").screenshot())) as image:
        data = bytearray(image.convert("RGB").tobytes())
        return torch.frombuffer(data, dtype=torch.uint8).view(image.height, image.width, 3).float()


def settled(page, kind: str = "decoded") -> Tensor:
    """The pixels once the picture is of a kind, and of the recipe of now."""
    page.wait_for_timeout(100)  # for what was just done to come back as a state
    while True:
        page.wait_for_selector("body[data-ready=true]")
        recipe = page.locator("body").get_attribute("data-recipe")
        page.wait_for_selector(f"body[data-picture='{recipe}'] #kind:text-is('{kind}')")
        if page.locator("body").get_attribute("data-recipe") == recipe:
            break
    page.wait_for_timeout(150)
    return pixels(page)


def differ(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().mean().item()


def clear(page) -> None:
    """No edit and no marked word, as at the beginning."""
    while page.locator("#stack li").count():
        count = page.locator("#stack li").count()
        page.locator("#stack .remove").first.click()
        playwright.expect(page.locator("#stack li")).to_have_count(count - 1)
    for _ in range(page.locator("#words button[aria-pressed=true]").count()):
        page.locator("#words button[aria-pressed=true]").first.click()


def add(page, label: str) -> None:
    count = page.locator("#stack li").count()
    page.locator(f"#kinds button:text-is('{label}')").click()
    playwright.expect(page.locator("#stack li")).to_have_count(count + 1)


def test_a_slider_shows_other_pixels_and_undo_brings_them_back(page, pictures: Path) -> None:
    clear(page)
    before = settled(page)
    add(page, "Warmth")
    slider = page.locator("#stack .slider").first
    box = slider.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + box["height"] / 2)
    page.mouse.down()
    for step in range(20):
        page.mouse.move(box["x"] + box["width"] * (0.5 + 0.02 * step), box["y"] + box["height"] / 2)
        page.wait_for_timeout(15)
    during = settled(page, "preview")
    page.mouse.up()
    assert differ(during, before) > 8
    assert float(page.locator("#stack output").first.inner_text()) > 0.6
    warm = settled(page)
    assert (warm - before)[..., 0].mean() > (warm - before)[..., 2].mean() + 10  # redder, and less blue
    assert page.locator("#latency").inner_text().endswith(" ms")
    page.screenshot(path=pictures / "slider.png")
    page.keyboard.press("Control+z")  # the whole motion
    playwright.expect(page.locator("#stack output").first).to_have_text("0.40")
    page.keyboard.press("Control+z")
    playwright.expect(page.locator("#stack li")).to_have_count(0)
    assert differ(settled(page), before) < 0.5
    page.keyboard.press("Control+Shift+z")
    playwright.expect(page.locator("#stack li")).to_have_count(1)


def test_a_word_shows_its_mask_and_confines_an_edit(page, pictures: Path) -> None:
    clear(page)
    before = settled(page)
    word = page.locator("#words button:text-is('circle')")
    word.click()
    playwright.expect(word).to_have_attribute("aria-pressed", "true")
    page.wait_for_timeout(500)
    masked = pixels(page)
    marked = (masked - before).abs().amax(-1) > 12
    assert 0.01 < marked.float().mean() < 0.6  # a region, not all of it
    page.screenshot(path=pictures / "word.png")
    add(page, "Tint")
    page.locator("#stack .slider").fill("1")
    page.locator("#stack .slider").dispatch_event("change")
    word.click()
    playwright.expect(page.locator("#stack .where")).to_have_text("where the model sees “circle”")
    assert page.locator("#words button[aria-pressed=true]").all_inner_texts() == ["circle"]
    page.locator("#stack .name").click()  # no edit is chosen: no outline over the picture
    page.locator("#words button:text-is('circle')").click()
    tinted = settled(page)
    changed = (tinted - before).abs().amax(-1) > 24
    assert 0.01 < changed.float().mean() < 0.5
    page.screenshot(path=pictures / "confined.png")


def test_compare_keys_and_order(page, pictures: Path) -> None:
    clear(page)
    add(page, "Tint")
    add(page, "Soften")
    settled(page)
    page.locator("h1").click()
    page.keyboard.press("c")
    wipe = page.locator("#wipe")
    playwright.expect(wipe).to_be_visible()
    wipe.focus()
    half = pixels(page)
    page.keyboard.press("Home")  # nothing is before
    page.wait_for_timeout(200)
    after = pixels(page)
    page.keyboard.press("End")
    page.wait_for_timeout(200)
    before = pixels(page)
    width = half.shape[1]
    assert differ(before, after) > 4
    assert differ(half[40:-40, : width // 2 - 30], before[40:-40, : width // 2 - 30]) < 1
    assert differ(half[40:-40, width // 2 + 30 :], after[40:-40, width // 2 + 30 :]) < 1
    page.keyboard.press("Home")
    for _ in range(5):
        page.keyboard.press("PageUp")
    page.screenshot(path=pictures / "compare.png")
    page.keyboard.press("c")
    names = page.locator("#stack .name")
    assert names.all_inner_texts() == ["Tint", "Soften"]
    page.locator("#stack .grip").first.focus()
    page.keyboard.press("ArrowDown")
    playwright.expect(names.first).to_have_text("Soften")
    assert page.evaluate("document.activeElement.closest('li').querySelector('.name').textContent") == "Tint"
    page.keyboard.press("ArrowUp")
    playwright.expect(names.first).to_have_text("Tint")
    page.locator("#stack .on").first.press("Space")
    playwright.expect(page.locator("#stack li").first).to_have_class("layer off")


def test_save_reload_and_open(page, studio: Served, browser, pictures: Path, tmp_path: Path) -> None:
    clear(page)
    add(page, "Brightness")
    page.locator("#stack .slider").fill("-0.6")
    playwright.expect(page.locator("#stack output")).to_have_text("-0.60")
    page.locator("#stack .slider").dispatch_event("change")
    dark = settled(page)
    with page.expect_download() as download:
        page.locator("#export-mp4").click()
    assert download.value.suggested_filename == "clip.mp4"
    assert Path(download.value.path()).read_bytes()[4:8] == b"ftyp"
    with page.expect_download() as download:
        page.locator("#export-run").click()
    run = tmp_path / "run.json"
    download.value.save_as(run)
    assert json.loads(run.read_text())["layers"][0]["amount"] == -0.6
    page.reload()
    page.wait_for_selector("body[data-ready=true]")
    assert page.locator("#stack output").inner_text() == "-0.60"
    assert differ(settled(page), dark) < 0.5
    clear(page)
    page.locator("#import-file").set_input_files(run)
    playwright.expect(page.locator("#stack output")).to_have_text("-0.60")
    assert differ(settled(page), dark) < 0.5
    clear(page)
    page.evaluate(
        """(text) => {
            const data = new DataTransfer();
            data.items.add(new File([text], "run.json", { type: "application/json" }));
            for (const type of ["dragover", "drop"])
                document.body.dispatchEvent(
                    new DragEvent(type, { bubbles: true, cancelable: true, dataTransfer: data }));
        }""",
        run.read_text(),
    )
    playwright.expect(page.locator("#stack output")).to_have_text("-0.60")
    broken = tmp_path / "broken.json"
    broken.write_text('{"format": "else"}')
    page.locator("#import-file").set_input_files(broken)
    playwright.expect(page.locator("#problems")).to_contain_text("a run must be a JSON object of format")
    page.screenshot(path=pictures / "problem.png")
    page.locator("#problems button").click()
    playwright.expect(page.locator("#problems div")).to_have_count(0)


def test_another_clip_and_a_new_one(page, pictures: Path) -> None:
    clear(page)
    before = settled(page)
    page.locator("#kinds button:text-is('Fade to a clip')").click()
    playwright.expect(page.locator("#other")).to_be_visible()
    page.locator("#other-prompt").fill("a blue square on a dark background")
    page.screenshot(path=pictures / "dialog.png")
    page.locator("#other-form button[type=submit]").click()
    playwright.expect(page.locator("#stack .where")).to_contain_text("“a blue square on a dark background”")
    page.wait_for_selector("body[data-ready=true]")
    playwright.expect(page.locator("#stack .where.problem")).to_have_count(0)
    page.locator("#stack .slider").fill("1")
    page.locator("#stack .slider").dispatch_event("change")
    assert differ(settled(page), before) > 10
    clear(page)
    page.locator("#prompt").fill("a green triangle moving up on a bright background")
    page.locator("#prompt").press("Control+Enter")
    page.wait_for_selector("#cancel:not([hidden])")
    page.wait_for_selector("#kind:has-text('sampling')")
    page.screenshot(path=pictures / "sampling.png")
    page.wait_for_selector("body[data-ready=true]")
    assert "triangle" in page.locator("#words").inner_text()
    assert differ(settled(page), before) > 10
    page.locator("#undo").click()
    page.wait_for_selector("#words button:text-is('circle')")
    assert differ(settled(page), before) < 0.5


def test_on_a_phone(browser, studio: Served, pictures: Path) -> None:
    with opened(browser, studio, 390, 844, has_touch=True, is_mobile=True, device_scale_factor=2) as page:
        clear(page)
        page.locator("#words button:text-is('star')").tap()
        page.locator("#kinds button:text-is('Warmth')").tap()
        playwright.expect(page.locator("#stack li")).to_have_count(1)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 390  # nothing leads out to the side
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=pictures / "phone.png", full_page=True)
        page.locator("#stack .slider").scroll_into_view_if_needed()
        page.mouse.wheel(0, 2000)
        page.wait_for_timeout(300)
        assert page.locator("#canvas").bounding_box()["y"] >= 0  # the picture stays in sight
        page.screenshot(path=pictures / "phone-scrolled.png")
        small = page.evaluate(
            "[...document.querySelectorAll('button, a.button, input')].filter(x => x.offsetParent && !x.hidden)"
            ".map(x => [x.id || x.className, x.getBoundingClientRect().height]).filter(x => x[1] < 22)"
        )
        assert small == []


def test_a_page_that_was_left_open_comes_back(page, studio: Served) -> None:
    clear(page)
    page.context.set_offline(True)
    studio.drop_connections()
    page.wait_for_selector("body.lost")
    page.context.set_offline(False)
    page.wait_for_selector("body:not(.lost)")
    page.locator("#kinds button:text-is('Tint')").click()
    playwright.expect(page.locator("#stack li")).to_have_count(1)
