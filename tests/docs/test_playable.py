"""The page on which pretrained dreams are played without a server of ours, in headless Chromium."""

import functools
import gzip
import http.server
import json
import os
import re
import shutil
import threading

import pytest

from tests.docs.pages import ROOT
from wmjax import weights

FOLDER = ROOT / "docs" / "_static" / "dream"
NAMES = [name.replace("/", "-") for name in weights.pretrained()]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECONDS = 120_000  # milliseconds that a busy machine may take


def test_there_is_a_model_of_each_pretrained_run_and_the_page_offers_all():
    page = (FOLDER / "dream.js").read_text()
    assert {path.stem for path in (FOLDER / "models").glob("*.json")} == set(NAMES)
    for name in NAMES:
        assert f'"{name}"' in page
        about = json.loads((FOLDER / "models" / f"{name}.json").read_text())
        assert len(about["starts"]) == 4
        model = gzip.decompress((FOLDER / "models" / f"{name}.onnx.gz").read_bytes())
        assert all(word.encode() in model for word in (*about["inputs"], *about["outputs"]))


def test_the_page_names_no_other_address():
    for name in ("index.html", "dream.css", "dream.js"):
        assert not re.search(r"https?:|//[a-z]+\.", (FOLDER / name).read_text())


@pytest.fixture(scope="module")
def address():
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=FOLDER))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/index.html"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the extra `browser` is not installed")
    if BROWSER is None:
        pytest.skip("there is no Chromium to drive")
    with playwright.sync_playwright() as started:
        # The tests may run as root, where Chromium has no sandbox of its own.
        found = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield found
        found.close()


def picture(page):
    return page.evaluate("document.getElementById('dream').toDataURL()")


def until_step(page, number):
    page.wait_for_function(f"+document.getElementById('number').textContent >= {number}", timeout=SECONDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_keys_move_a_dream_with_nothing_else_reachable(name, browser, address):
    context = browser.new_context(viewport={"width": 400, "height": 800}, has_touch=True)
    page, errors, elsewhere = context.new_page(), [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    here = address.rpartition("/")[0]
    context.route(
        lambda url: not url.startswith((here, "blob:", "data:")),
        lambda route: (elsewhere.append(route.request.url), route.abort()),
    )
    page.goto(f"{address}#{name}")
    page.wait_for_function(f"document.documentElement.dataset.ready === '{name}'", timeout=SECONDS)
    context.set_offline(True)  # all that it needs is there
    seen = [picture(page)]
    for number, key in enumerate(("ArrowLeft", "ArrowRight", "ArrowLeft"), 1):
        page.keyboard.press(key)
        until_step(page, number)
        seen.append(picture(page))
    assert len(set(seen)) > 1
    if page.locator("#actions button").count():
        page.locator("#actions button").first.tap()
        until_step(page, 4)
    page.select_option("#speed", "0")
    page.click("#play")
    until_step(page, 40)
    page.wait_for_timeout(1500)
    rate = int(page.inner_text("#rate"))
    page.click("#play")
    print(f"{name}: {rate} frames/s")
    assert rate >= 3  # on a machine that does other things, too
    page.click("#again")
    page.wait_for_function("document.getElementById('number').textContent === '0'", timeout=SECONDS)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    context.close()
    assert not errors and not elsewhere


@pytest.mark.slow
def test_a_step_that_was_under_way_does_not_undo_another_start_or_outlive_its_model(browser, address):
    first, second = "dreamer_v3-catch", "dreamer_v1-catch"
    page = browser.new_page()
    page.goto(f"{address}#{first}")
    page.wait_for_function(f"document.documentElement.dataset.ready === '{first}'", timeout=SECONDS)
    assert page.evaluate("(async () => { const done = step(); begin(); await done; return number; })()") == 0
    page.evaluate("released = 0; game.session.release = async () => { released += busy ? 100 : 1; }; void step()")
    page.select_option("#agent", second)
    page.wait_for_function(f"document.documentElement.dataset.ready === '{second}'", timeout=SECONDS)
    assert page.evaluate("[released, number]") == [1, 0]
    page.close()
