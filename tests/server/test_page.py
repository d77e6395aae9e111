"""The web page in a headless Chromium: drawing, editing, reconstructing, asking; by keyboard, narrow, dark; errors in words."""

from __future__ import annotations

import io
import re
import shutil
from base64 import b64decode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from hart_infer.server.keys import add_key
from tests.server import stand_in as model
from tests.server.conftest import stand_in

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
SECONDS = 60  # for anything at all, on a busy machine
SIDE = 2 * model.SIDE  # the largest, which is drawn by default
Open = Callable[..., Any]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium; apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    expect.set_options(timeout=1000 * SECONDS)
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with stand_in(page=1, max_batch=4) as (served, _):
        yield served


@pytest.fixture
def opened(browser: Any, address: str) -> Iterator[Open]:
    """Opens the page; in the end nothing may have gone wrong in it that the test does not expect."""
    contexts, wrong = [], []

    def open_page(at: str = address, *, expects: str | None = None, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, "reduced_motion": "reduce", **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(1000 * SECONDS)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "console",
            lambda said: wrong.append(said.text) if said.type == "error" and not (expects and expects in said.text) else None,
        )
        page.goto(at)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def page(opened: Open) -> Any:
    made = opened()
    ready(made)
    return made


def ready(page: Any) -> None:
    expect(page.locator("#model-box")).to_have_attribute("data-state", "ready")


def draw(page: Any, prompt: str, **settings: str) -> Any:
    """Draw by the form, and return the newest card."""
    for name, value in settings.items():
        page.fill(f"#draw-{name}", value)
    page.fill("#draw-prompt", prompt)
    page.click("#draw button.primary")
    return page.locator("#draw .picture").first


def drawn(card: Any) -> None:
    expect(card).to_have_attribute("data-state", "done")


def downloaded(page: Any, card: Any) -> Image.Image:
    with page.expect_download() as waited:
        card.locator("a[download]").click()
    return Image.open(Path(waited.value.path())).convert("RGB")


def same(image: Image.Image, prompt: str, seed: int, side: int = SIDE) -> bool:
    return image.tobytes() == model.picture(prompt, seed, side).tobytes()


def png(image: Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"name": "photo.png", "mimeType": "image/png", "buffer": buffer.getvalue()}


# Drawing.


def test_previews_arrive_and_then_the_picture_that_can_be_downloaded(page: Any) -> None:
    card = draw(page, "a slow cat", seed="7")
    expect(card.locator(".note")).to_contain_text(re.compile(f"preview [1-9] of {model.STEPS - 1}"))
    expect(card.get_by_role("progressbar", name="Progress of a slow cat")).to_have_attribute("aria-valuemax", str(model.STEPS))
    drawn(card)
    expect(card.locator("img")).to_have_attribute("data-shown", str(model.STEPS))  # a preview a scale, and the picture
    expect(card.locator("figcaption")).to_contain_text("seed 7")
    expect(page.locator("#told")).to_have_text("a slow cat: done.")
    assert same(downloaded(page, card), "a slow cat", 7)


def test_settings_reach_the_server_and_stand_beside_the_picture(page: Any) -> None:
    with page.expect_request("**/v1/images/generations") as sent:
        page.select_option("#draw-size", "16x16")
        page.fill("#draw-guidance", "2.5")
        page.fill("#draw-negative", "snow")
        draw(page, "a cat", seed="5", n="2")
    fields = sent.value.post_data_json
    expected = {"n": 2, "seed": 5, "size": "16x16", "guidance_scale": 2.5, "negative_prompt": "snow", "stream": True}
    assert {name: fields[name] for name in expected} == expected
    expect(page.locator("#draw .picture[data-state=done]")).to_have_count(2)
    for card, seed in zip(page.locator("#draw .picture").all(), (5, 6), strict=True):
        assert same(downloaded(page, card), "a cat", seed, 16)
    page.locator("#draw .frame").first.click()
    viewer = page.locator("#viewer")
    for text in ("a cat", "16 × 16", "2.5", "snow"):
        expect(viewer).to_contain_text(text)


def test_again_with_a_seed_draws_the_same_picture(page: Any) -> None:
    card = draw(page, "a cat")
    drawn(card)
    first = downloaded(page, card)
    card.get_by_role("button", name="Again with this seed").click()
    expect(page.locator("#draw-prompt")).to_be_focused()
    assert page.input_value("#draw-seed") != ""
    page.keyboard.press("Enter")
    expect(page.locator("#draw .picture[data-state=done]")).to_have_count(2)
    assert downloaded(page, page.locator("#draw .picture").first).tobytes() == first.tobytes()


def test_options_that_the_model_lacks_are_not_there(page: Any, opened: Open, mini_address: str) -> None:
    expect(page.get_by_role("tab")).to_have_text(["Draw", "Edit", "Reconstruct", "Ask"])
    expect(page.locator("#draw-size")).to_be_visible()
    expect(page.get_by_text("turbo")).to_have_count(0)
    mini = opened(mini_address.removesuffix("v1"))
    ready(mini)
    expect(mini.locator("[role=tab]:visible")).to_have_text(["Draw", "Edit", "Reconstruct"])
    expect(mini.locator("#draw-size")).to_have_count(0)
    mini.get_by_text("draft").first.click()
    card = draw(mini, "a cat", seed="1")
    drawn(card)
    facts = httpx2.get(f"{mini_address}/models").json()["data"][0]
    body = {"prompt": "a cat", "seed": 1, "speed": "draft"}
    answer = httpx2.post(f"{mini_address}/images/generations", json=body, timeout=SECONDS).json()
    assert downloaded(mini, card).tobytes() == Image.open(io.BytesIO(b64decode(answer["data"][0]["b64_json"]))).tobytes()
    assert 2 <= int(card.locator("img").get_attribute("data-shown")) <= facts["num_scales"]


def test_stop_frees_the_work(page: Any, address: str) -> None:
    card = draw(page, "slow and slow", n="3")
    expect(card).to_have_attribute("data-state", "drawing")
    card.get_by_role("button", name="Stop").click()
    expect(page.locator("#draw .picture")).to_have_count(0)
    drawn(draw(page, "a dog"))


# Errors.


def test_errors_are_told_in_words_and_tried_again(opened: Open) -> None:
    page = opened(expects="503")
    ready(page)
    for prompt, message in [("break this", "The server's log says more."), ("too much", "There is no memory for this.")]:
        card = draw(page, prompt)
        expect(card.get_by_role("alert")).to_contain_text(message)
    card = draw(page, "die")
    expect(card.get_by_role("alert")).to_contain_text("has died")
    page.fill("#draw-prompt", "unused")
    card.get_by_role("button", name="Try again").click()
    expect(page.locator("#draw .picture").first.get_by_role("alert")).to_contain_text("has died")


def test_a_server_that_is_gone_is_told_in_words(opened: Open) -> None:
    with stand_in(page=1) as (served, running):
        page = opened(served, expects="net::ERR_")
        ready(page)
        running.end(9)
        expect(draw(page, "a cat").get_by_role("alert")).to_contain_text("The server can't be reached.")


def test_what_is_typed_stays_text(page: Any) -> None:
    evil = "<img src=x onerror=alert(1)><b id=evil>&lt;script&gt;"
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    card = draw(page, evil)
    drawn(card)
    expect(card.locator(".title")).to_have_text(evil)
    assert page.locator("#evil").count() == 0
    card.locator(".frame").click()
    expect(page.locator("#viewer h2")).to_have_text(evil)


def test_the_browser_runs_nothing_but_the_page_s_own_code(opened: Open) -> None:
    page = opened(expects="requires 'TrustedScript'")
    ready(page)
    page.evaluate("""() => {
      const script = document.createElement("script");
      try { script.textContent = "window.evil = 1"; } catch { /* refused */ }
      document.head.append(script);
    }""")
    assert page.evaluate("window.evil") is None


# Editing, reconstructing, asking.

PHOTO = Image.new("RGB", (SIDE, SIDE), (10, 200, 30))


def test_a_mask_by_mouse_is_painted_anew_and_the_rest_kept(page: Any) -> None:
    page.click("#tab-edit")
    page.locator("#edit input[type=file]").set_input_files(png(PHOTO))
    box = page.locator(".mask").bounding_box()
    left, top, side = box["x"], box["y"], box["width"]
    page.mouse.move(left + 0.75 * side, top + 2)
    page.mouse.down()
    page.mouse.move(left + 0.75 * side, top + side - 2, steps=5)
    page.mouse.up()
    page.fill("#edit-prompt", "a dog")
    page.fill("#edit-seed", "3")
    page.click("#edit button.primary")
    card = page.locator("#edit .picture").first
    drawn(card)
    edited = downloaded(page, card)
    assert edited.getpixel((edited.width * 3 // 4, edited.height // 2)) == model.colour("a dog", 3)
    assert edited.getpixel((edited.width // 4, edited.height // 2)) == PHOTO.getpixel((0, 0))
    expect(card.locator(".actions")).to_have_text("DownloadEditReconstructAsk")  # drawn again it would lack the mask


def test_a_mask_by_keyboard(page: Any) -> None:
    page.click("#tab-edit")
    page.click("#edit button.primary")
    expect(page.locator("#edit-prompt:invalid")).to_be_focused()  # the browser says that it is empty
    page.keyboard.type("a dog")
    page.keyboard.press("Enter")
    expect(page.locator("#edit [role=alert].trouble")).to_have_text("Choose a picture first.")
    page.locator("#edit input[type=file]").set_input_files(png(PHOTO))
    expect(page.locator("#edit .controls > .trouble")).to_have_count(0)
    page.keyboard.press("Enter")
    expect(page.locator("#edit .controls > .trouble")).to_have_text("Paint over what is to be drawn anew.")
    page.focus(".mask")
    page.keyboard.press("Space")
    for key in ("Shift", "ArrowLeft", "ArrowLeft"):  # held, so that it repeats
        page.keyboard.down(key)
    for key in ("ArrowLeft", "Shift"):
        page.keyboard.up(key)
    before = painted(page)
    page.keyboard.press("z")
    assert 0 < painted(page) < before
    page.keyboard.press("z")
    assert painted(page) == 0
    for _ in range(20):
        page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Space")
    page.keyboard.press("z")
    expect(page.locator("#told")).to_have_text("Undone.")
    page.focus("#edit-prompt")
    page.keyboard.press("Enter")
    card = page.locator("#edit .picture").first
    drawn(card)
    edited = downloaded(page, card)
    kept, anew = edited.getpixel((1, 1)), edited.getpixel((edited.width * 3 // 4, edited.height // 2))
    assert kept == PHOTO.getpixel((0, 0)) != anew


def painted(page: Any) -> int:
    """Pixels of the mask."""
    count = """(mask) => mask.getContext("2d").getImageData(0, 0, mask.width, mask.height).data
      .filter((value, i) => i % 4 === 3 && value > 127).length"""
    return int(page.locator(".mask").evaluate(count))


def test_a_drawn_picture_goes_to_the_other_tabs(page: Any) -> None:
    card = draw(page, "a cat", seed="1")
    drawn(card)
    card.get_by_role("button", name="Edit").click()
    expect(page.locator("#tab-edit")).to_have_attribute("aria-selected", "true")
    expect(page.locator(".photo")).to_be_visible()
    page.click("#tab-draw")
    card.get_by_role("button", name="Reconstruct").click()
    expect(page.locator("#reconstruct figure")).to_have_count(4)


def test_discrete_beside_hybrid_and_their_difference(page: Any) -> None:
    page.click("#tab-reconstruct")
    page.locator("#reconstruct input[type=file]").set_input_files(png(PHOTO))
    figures = page.locator("#reconstruct figure")
    expect(figures.locator(".title")).to_have_text(["Original", "Discrete", "Hybrid", "Difference"])
    expect(figures.nth(2)).to_contain_text("equal to the original")
    expect(figures.nth(1)).to_contain_text("PSNR")
    page.fill("#difference-gain", "2")
    read = "(canvas) => [...canvas.getContext('2d').getImageData(0, 0, 1, 1).data]"
    assert figures.locator("canvas").evaluate(read) == [10, 200, 30, 255]  # twice the half that discrete has lost
    page.select_option("#difference-of", label="original / hybrid")
    assert figures.locator("canvas").evaluate(read) == [0, 0, 0, 255]


def test_no_more_at_once_than_the_server_draws(opened: Open) -> None:
    with stand_in(page=1, max_n=3) as (served, _):
        page = opened(served, expects="net::ERR_")  # the server ends first
        ready(page)
        assert page.locator("#draw-n").get_attribute("max") == "3"


def test_a_file_that_is_no_picture_is_told_in_words(page: Any) -> None:
    page.click("#tab-reconstruct")
    page.locator("#reconstruct input[type=file]").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": b"x"})
    expect(page.locator("#reconstruct .wrong")).to_have_text("That is no picture in PNG, JPEG or WebP.")


def test_questions_about_a_picture(page: Any) -> None:
    page.click("#tab-ask")
    page.locator("#ask input[type=file]").set_input_files(png(PHOTO))
    expect(page.locator("#ask .drop img")).to_be_visible()
    page.fill("#question", "What is it?")
    page.keyboard.press("Enter")
    expect(page.locator(".answer")).to_contain_text(f"0 turns before, now [{SIDE}x{SIDE}]What is it?")
    page.fill("#question", "Sure?")
    page.keyboard.press("Enter")
    expect(page.locator(".answer").nth(1)).to_contain_text("1 turns before, now Sure?")
    page.fill("#question", "break")
    page.keyboard.press("Enter")
    expect(page.locator(".talk [role=alert]")).to_contain_text("RuntimeError")
    page.click("#forget")
    expect(page.locator(".turn")).to_have_count(0)


# Who uses it, and with what.


def test_all_by_keyboard(page: Any) -> None:
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.locator("#tab-draw")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tab-edit")).to_be_focused()
    expect(page.locator("#edit")).to_be_visible()
    page.keyboard.press("ArrowLeft")
    reach(page, "#draw-prompt")
    page.keyboard.type("a cat")
    page.keyboard.press("Enter")
    drawn(page.locator("#draw .picture").first)
    page.keyboard.press("Enter")
    expect(page.locator("#draw .picture[data-state=done]")).to_have_count(2)
    reach(page, "#draw .frame")
    page.keyboard.press("Enter")
    expect(page.locator("#viewer")).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("button", name="Older")).to_be_disabled()
    page.keyboard.press("Escape")
    expect(page.locator("#viewer")).to_be_hidden()
    expect(page.locator("#draw .frame").first).to_be_focused()


def reach(page: Any, selector: str) -> None:
    """Press Tab until something has the focus, which must be seen."""
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
            return
    pytest.fail(f"Tab does not reach {selector}")


def test_every_control_has_a_name_and_every_picture_a_text(page: Any) -> None:
    drawn(draw(page, "a cat"))
    nameless = page.evaluate("""() => [...document.querySelectorAll("button, a, input, select, textarea, [role=progressbar]")]
      .filter((each) => !(each.labels?.length || each.getAttribute("aria-label") || each.textContent.trim()))
      .map((each) => each.outerHTML)""")
    assert nameless == []
    assert page.evaluate("[...document.images].filter((image) => !image.hasAttribute('alt')).length") == 0
    assert page.evaluate("document.documentElement.lang") == "en"


@pytest.mark.parametrize("width", [320, 390, 768])
def test_nothing_is_wider_than_a_phone(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 700})
    drawn(draw(page, "a" * 60))
    page.locator("#draw .picture").get_by_role("button", name="Edit").click()
    expect(page.locator(".photo")).to_be_visible()
    page.locator("#reconstruct input[type=file]").set_input_files(png(PHOTO))
    expect(page.locator("#reconstruct figure")).to_have_count(4)
    for tab in ("draw", "edit", "reconstruct", "ask"):
        page.click(f"#tab-{tab}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, tab
    page.click("#tab-draw")
    small = page.evaluate("""() => [...document.querySelectorAll("button, .action")].filter((each) => each.checkVisibility())
      .map((each) => each.getBoundingClientRect()).filter(({width, height}) => width < 24 || height < 24).length""")
    assert small == 0
    page.locator("#draw .frame").click()
    viewer = page.locator("#viewer").bounding_box()
    assert viewer["x"] >= 0 and viewer["x"] + viewer["width"] <= width


CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const light = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => {
      v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (each) => {
    for (; each; each = each.parentElement) {
      const colour = getComputedStyle(each).backgroundColor;
      if (!/, 0\\)$|transparent/.test(colour)) return colour;
    }
    return getComputedStyle(document.body).backgroundColor;
  };
  return [...document.querySelectorAll("label, legend, .note, .title, button:enabled, output, p, h1, .facts, small")]
    .filter((each) => each.checkVisibility() && each.textContent.trim())
    .map((each) => {
      const [a, b] = [light(getComputedStyle(each).color), light(behind(each))].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), each.textContent.trim()];
    }).filter(([ratio]) => ratio < 4.5);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_can_be_read(opened: Open, scheme: str) -> None:
    page = opened(color_scheme=scheme)
    ready(page)
    drawn(draw(page, "a cat"))
    for tab in ("draw", "edit", "reconstruct", "ask"):
        page.click(f"#tab-{tab}")
        assert page.evaluate(CONTRAST) == []
    dark = "getComputedStyle(document.body).backgroundColor"
    assert (max(map(int, page.evaluate(dark)[4:-1].split(", "))) < 64) == (scheme == "dark")
    page.click("#theme")
    page.click("#theme")
    assert max(map(int, page.evaluate(dark)[4:-1].split(", "))) < 64
    page.reload()
    ready(page)
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_a_key_is_asked_for_and_kept_in_the_tab(opened: Open, tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys.txt", "alice")
    with stand_in(page=1, keys=tmp_path / "keys.txt") as (served, _):
        page = opened(served, expects="401")
        box = page.locator("#key-box")
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        expect(box).to_contain_text("does not know that key")
        page.fill("#key", key)
        page.get_by_role("button", name="Use this key").click()
        ready(page)
        drawn(draw(page, "a cat"))
        page.reload()
        ready(page)
        expect(box).to_be_hidden()
        stored = page.evaluate("[Object.values(sessionStorage), Object.values(localStorage)]")
        assert stored == [[key], []]


def test_the_page_waits_for_a_model_that_is_being_loaded(opened: Open) -> None:
    with stand_in(page=1, loads=3) as (served, _):
        page = opened(served)
        expect(page.locator("#facts")).to_have_text("being loaded")
        page.fill("#draw-prompt", "a cat")
        page.keyboard.press("Enter")
        expect(page.locator("#draw [role=alert]")).to_contain_text("being loaded")
        ready(page)
        expect(page.locator("#draw [role=alert]")).to_have_count(0)
        drawn(draw(page, "a cat"))
