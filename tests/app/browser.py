"""Use every tab of the app in a real browser, the Chromium of the system, driven by Playwright. No part of `make test`.

    make test-app                           # installs what it needs, and runs this file
    make test-app ARGS="-s"                 # prints the reaction times, too
    PICTURES=docs/see-it-read make test-app # renews the pictures of the documentation

The app runs as in a Space: from a folder with app.py, the package and the checkpoints, and nothing of this clone. The
text tab has the checkpoint runs/imdb if there is one, else an untrained one of seven words.
"""

import io
import os
import shutil
import socket
import statistics
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile
from paths import CARDS, ROOT
from PIL import Image
from playwright.sync_api import Locator, Page, expect, sync_playwright
from small_checkpoints import small_checkpoint

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
START, WAIT = 300, 60  # seconds for the app to start, and for the page to react on a busy machine
SLOWEST = 1.0  # seconds; the median reaction is about a tenth of a second where the machine is idle
PICTURES = os.environ.get("PICTURES")
# Notes when the visitor last did something, and how long it then took until an answer changed.
WATCH = """() => {
    let acted = null, seen = "";
    window.reactions = [];
    const act = () => { acted = performance.now(); };
    for (const kind of ["pointerup", "input", "click", "change"]) addEventListener(kind, act, true);
    new MutationObserver(() => {
        const shown = [...document.querySelectorAll(".verdict")].map((line) => line.innerText).join();
        if (shown === seen) return;
        seen = shown;
        if (acted !== null) window.reactions.push(performance.now() - acted);
        acted = null;
    }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""

expect.set_options(timeout=1000 * WAIT)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second of a tone that glides, as a vowel does; nobody's recording."""
    times = np.arange(8000) / 8000
    envelope = np.sin(np.pi * times) ** 2
    tone = sum(np.sin(2 * np.pi * f * times * (1 + 0.2 * times)) / n for n, f in enumerate((140, 280, 560, 1120), 1))
    path = tmp_path_factory.mktemp("sounds") / "glide.wav"
    soundfile.write(path, 0.3 * envelope * tone, 8000)
    return path


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Lay the app out as a Space, run it there, and return its address."""
    space = tmp_path_factory.mktemp("space")
    shutil.copytree(ROOT / "scripts/space", space, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "hf_skiprnn", space / "hf_skiprnn", ignore=shutil.ignore_patterns("__pycache__", "csrc"))
    for folder in CARDS.glob("skip-*"):
        shutil.copytree(folder, space / "model_cards" / folder.name)
    shutil.rmtree(space / "model_cards/skip-lstm-imdb")
    if (ROOT / "runs/imdb/model.safetensors").is_file():
        shutil.copytree(ROOT / "runs/imdb", space / "model_cards/imdb", ignore=shutil.ignore_patterns("checkpoint-*"))
    else:
        small_checkpoint(space / "model_cards/imdb", "text")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"SPACE_ID": "me/x"}
    log = space / "log.txt"
    with log.open("w") as file:
        command = [sys.executable, "app.py", f"--port={port}", "--sounds="]
        server = subprocess.Popen(command, cwd=space, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield wait_for(f"http://127.0.0.1:{port}/", server, log)
    finally:
        server.terminate()
        server.wait()


def wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> str:
    """Return the address once the server answers; fail with its log if it ends or takes too long."""
    for _ in range(2 * START):
        with suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return address
        with suppress(subprocess.TimeoutExpired):
            server.wait(0.5)
            break
    raise AssertionError(f"the app did not start:\n{log.read_text()}")


@pytest.fixture(scope="session")
def browser_page(address: str, sound: Path) -> Iterator[Page]:
    """The app's page. The browser's microphone plays the sound; other hosts must not be asked for anything."""
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*arguments, f"--use-file-for-fake-audio-capture={sound}"]
        )
        page = browser.new_page(viewport={"width": 1000, "height": 880})
        page.set_default_timeout(1000 * WAIT)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.evaluate(WATCH)
        yield page
        assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
        browser.close()


@pytest.fixture
def page(browser_page: Page) -> Iterator[Page]:
    """The page, with the times of this test's reactions, which are printed and checked."""
    browser_page.evaluate("window.reactions = []")
    yield browser_page
    reactions = browser_page.evaluate("window.reactions")
    print(f"reactions in ms: {[round(time) for time in reactions]}, median {statistics.median(reactions):.0f}")
    assert statistics.median(reactions) < 1000 * SLOWEST


def open_tab(page: Page, title: str) -> Locator:
    page.get_by_role("tab", name=title).click()
    panel = page.get_by_role("tabpanel").filter(visible=True)
    expect(panel).to_have_count(1)
    return panel


def keep(page: Page, name: str) -> None:
    """Save a picture of the page, where pictures are wanted."""
    if PICTURES:
        folder = ROOT / PICTURES
        folder.mkdir(parents=True, exist_ok=True)
        page.wait_for_timeout(3500)  # the animation's last picture, which stays for 1.6 s
        shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        shot.quantize(128, dither=Image.Dither.NONE).save(folder / f"{name}.png", optimize=True)  # about 40 kB


def updates(panel: Locator) -> int:
    """Return the number of steps read that the panel shows."""
    return int(panel.locator(".verdict b").first.inner_text().split()[0])


def move_slider(panel: Locator, value: float) -> None:
    """Set the slider by its number field, and wait for another answer."""
    before = panel.locator(".verdict").inner_text()
    field = panel.get_by_role("spinbutton")
    field.fill(str(value))
    field.press("Enter")
    expect(panel.locator(".verdict")).not_to_have_text(before)


def draw_seven(page: Page, panel: Locator) -> None:
    box = panel.locator("canvas").filter(visible=True).bounding_box()
    assert box
    x, y = box["x"], box["y"]
    page.mouse.move(x + 100, y + 100)
    page.mouse.down()
    page.mouse.move(x + 200, y + 100, steps=10)
    page.mouse.move(x + 140, y + 240, steps=10)
    page.mouse.up()


def test_a_drawn_digit_is_read(page: Page) -> None:
    panel, sent = open_tab(page, "Draw a digit"), list[str]()
    page.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
    draw_seven(page, panel)
    expect(panel.locator(".verdict")).to_contain_text("answers 7")
    assert len(sent) == 1, sent  # a stroke is read once
    expect(panel.locator("img.reading")).to_be_visible()
    keep(page, "digit")
    trained = updates(panel)
    move_slider(panel, 5)
    assert updates(panel) < trained
    move_slider(panel, 60)
    assert updates(panel) > trained
    expect(panel.locator("table").filter(has_text="share asked for").locator("tbody tr")).to_have_count(5)
    panel.get_by_role("button", name="Draw one for me").click()
    expect(panel.locator(".verdict")).not_to_contain_text("answers 7")
    panel.get_by_role("button", name="Clear").click()
    expect(panel.locator(".problem")).to_have_text("Draw something first.")


def test_words_of_a_review_are_read(page: Page) -> None:
    panel = open_tab(page, "Write a review")
    panel.get_by_role("button", name="Write one for me").click()
    words = panel.frame_locator("iframe.words")
    expect(words.locator("mark").first).to_be_visible()
    keep(page, "review")
    many = updates(panel)
    panel.get_by_label("Your text").fill("a good film .")
    expect(panel.locator(".verdict")).to_contain_text("of 4")
    assert updates(panel) <= min(many, 4)
    expect(words.locator("p")).to_have_text("a good film .")


def test_a_recorded_sound_is_read_and_removed(browser_page: Page) -> None:
    """The reaction is not timed: most of it is the browser's, which stops the microphone and sends the recording."""
    panel = open_tab(browser_page, "Say a digit")
    panel.get_by_role("button", name="Record", exact=True).click()
    browser_page.wait_for_timeout(1500)
    panel.get_by_role("button", name="Stop").first.click()
    expect(panel.locator(".verdict")).to_contain_text("answers")
    panel.get_by_label("Clear").first.click()
    expect(panel.locator(".problem")).to_have_text("Record, upload or choose a sound first.")


def test_a_sound_file_is_read(page: Page, sound: Path) -> None:
    panel = open_tab(page, "Say a digit")
    panel.get_by_label("Upload file").first.click()
    panel.locator("input[type=file]").set_input_files(sound)
    expect(panel.locator(".verdict")).to_contain_text("of 98")  # a second has 98 frames
    expect(panel.locator("img.reading")).to_be_visible()
    keep(page, "sound")
    trained = updates(panel)
    move_slider(panel, 80)  # the first checkpoint is a dial
    assert updates(panel) > trained


def test_any_checkpoint_says_what_it_needs_and_reads(page: Page) -> None:
    panel = open_tab(page, "Any checkpoint")
    field = panel.get_by_label("Folder or Hub id")
    field.fill("model_cards/skip-lstm-frequency")
    panel.get_by_role("button", name="Open").click()
    expect(panel).to_contain_text("a series of numbers, 1 at each step")
    panel.get_by_role("button", name="Write one for me").filter(visible=True).click()
    expect(panel.locator(".verdict")).to_contain_text("of 100")
    keep(page, "any")
    few = updates(panel)
    move_slider(panel, 2)
    assert updates(panel) > few
    field.fill("model_cards/skip-lstm-digits")
    field.press("Enter")
    expect(panel).to_contain_text("a picture of 8 x 8 pixels")
    draw_seven(page, panel)
    expect(panel.locator(".verdict")).to_contain_text("of 64")
    field.fill("/")
    panel.get_by_role("button", name="Open").click()
    expect(panel.locator(".problem").first).to_contain_text("but no other folders")
