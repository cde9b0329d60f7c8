"""The page as a person uses it, in headless Chromium."""

import contextlib
import os
import re
import shutil
import threading
import time

import pytest

from tests.play import made
from wmjax.loops.memory import resident_bytes
from wmjax.play.game import make_game, warm_up
from wmjax.play.page import Lobby

playwright = pytest.importorskip("playwright.sync_api", reason="the extra `browser` is not installed")
pytest.importorskip("uvicorn", reason="the extra `play` is not installed")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="there is no Chromium to drive")]

TOKEN = "t" * 32
SECONDS = 60_000  # milliseconds that a busy machine may take


@contextlib.contextmanager
def served(game, seats=4):
    """The address of the page of a game, and its lobby."""
    from wmjax.play.server import listen, make_server

    lobby, server = Lobby(game, seats), None
    with listen("127.0.0.1", 0) as listening:
        server = make_server(lobby, TOKEN, "127.0.0.1")
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/{TOKEN}/", lobby
        finally:
            server.should_exit = True
            thread.join(30)
            lobby.close()
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def address():
    warm_up(made.game())
    with served(made.game()) as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        # The tests may run as root, where Chromium has no sandbox of its own.
        found = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield found
        found.close()


@pytest.fixture
def opened(browser):
    """Opens pages, which have no errors."""
    errors, contexts = [], []

    def open_page(address, welcome=True, **how):
        contexts.append(browser.new_context(**({"viewport": {"width": 1200, "height": 900}} | how)))
        page = contexts[-1].new_page()
        page.set_default_timeout(SECONDS)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: message.type == "error" and errors.append(message.text))
        page.goto(address)
        if welcome:
            at(page, 0)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors


def at(page, number):
    """Waits until a moment is seen."""
    playwright.expect(page.locator("#number")).to_have_text(re.compile(rf"^step {number} of"), timeout=SECONDS)


def pixels(page, name="dream"):
    """The bytes of a picture, RGBA."""
    data = page.evaluate(
        "name => { const c = document.getElementById(name);"
        " return Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data); }",
        name,
    )
    return bytes(data)


def red(page, name="dream"):
    return pixels(page, name)[0]


def number(page):
    return int(page.locator("#number").text_content().split()[1])


def test_keys_move_the_dream_and_the_real_environment(address, opened):
    page = opened(address)
    assert red(page) == red(page, "real") == 0
    page.keyboard.press("4")  # paused, so that a press is a step
    at(page, 1)
    page.keyboard.press("2")
    at(page, 2)
    assert red(page) == red(page, "real") == 3 + 1
    page.get_by_role("button", name="action 2").click()
    at(page, 3)
    assert red(page) == 6
    assert page.locator("button.taken").text_content().startswith("action 2")
    page.keyboard.press(".")  # nothing is pressed
    at(page, 4)
    assert red(page) == 6


def test_the_agent_takes_over_and_a_press_takes_back(address, opened):
    page = opened(address)
    page.keyboard.press("a")
    page.keyboard.press(".")
    at(page, 1)
    assert red(page) == 2 and page.locator("#by").text_content() == "by the agent"
    assert page.get_by_label("Agent").is_checked()
    page.keyboard.press("4")
    at(page, 2)
    assert red(page) == 5 and page.locator("#by").text_content() == "by the person"
    assert page.get_by_label("Person").is_checked()


def test_rewinding_shows_the_same_pictures_bit_for_bit(address, opened):
    page, seen = opened(address), []
    for step in range(5):
        seen.append((pixels(page), pixels(page, "real")))
        page.keyboard.press("2")
        at(page, step + 1)
    assert len(set(seen)) == 5
    for back in (3, 0, 2):
        page.locator("#rewind").fill(str(back))
        at(page, back)
        assert (pixels(page), pixels(page, "real")) == seen[back]
    page.keyboard.press("2")  # the same action, the same noise
    at(page, 3)
    assert pixels(page) == seen[3][0] and page.locator("#number").text_content() == "step 3 of 0 to 3"
    page.keyboard.press(",")
    at(page, 2)
    page.keyboard.press("4")
    at(page, 3)
    assert pixels(page) != seen[3][0]


def test_it_plays_and_pauses_at_the_pace_that_is_asked_for(address, opened):
    page = opened(address)
    page.locator("#speed").select_option("5")
    page.keyboard.press(" ")
    begin = time.monotonic()
    page.wait_for_timeout(2000)
    page.keyboard.press(" ")
    playwright.expect(page.locator("#play")).to_contain_text("Play", timeout=SECONDS)
    seconds = time.monotonic() - begin
    assert 4 <= number(page) <= 5 * seconds + 2
    before = number(page)
    page.wait_for_timeout(500)
    assert number(page) == before


def test_continuous_actions_have_sliders_a_drag_pad_and_arrow_keys(opened):
    with served(make_game(made.hand_made_box())) as (address, _):
        page = opened(address)
        page.keyboard.press("ArrowRight")
        at(page, 1)
        assert pixels(page)[:2] == bytes([178, 128]) and pixels(page, "real")[:2] == bytes([178, 128])
        page.keyboard.press("ArrowDown")
        at(page, 2)
        assert pixels(page)[:2] == bytes([128, 78])
        page.locator("#pad").scroll_into_view_if_needed()
        box = page.locator("#pad").bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 2)
        page.mouse.down()  # pulled up
        at(page, 3)
        page.mouse.up()
        assert pixels(page)[:2] == bytes([128, 178])
        page.locator("#number-0").fill("-1")
        page.keyboard.press(".")
        at(page, 4)
        assert pixels(page)[:2] == bytes([78, 128])


def test_two_tabs_are_two_sessions_and_one_too_many_is_told_so(opened):
    with served(made.game(), seats=2) as (address, lobby):
        one, two = opened(address), opened(address)
        one.keyboard.press("4")
        at(one, 1)
        assert red(one) == 3 and red(two) == 0 and number(two) == 0
        three = opened(address, welcome=False)
        playwright.expect(three.get_by_text("pages are open already")).to_be_visible(timeout=SECONDS)
        assert lobby.free == 0
        one.close()  # a closed tab frees its seat
        end = time.monotonic() + 20
        while lobby.free < 1:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert red(opened(address)) == 0


def test_a_wrong_token_shows_nothing_of_the_run(address, browser):
    page = browser.new_page()
    answer = page.goto(address.replace(TOKEN, "u" * 32))
    assert answer.status == 403 and page.locator("body").text_content().strip() == "403 Forbidden"
    page.close()


def test_a_server_that_has_ended_is_told_of(opened):
    with served(made.game()) as (address, _):
        page = opened(address)
    playwright.expect(page.get_by_text("The server has ended, or cannot be reached.")).to_be_visible(timeout=SECONDS)


def test_a_slow_page_sees_the_newest_moment_as_soon_as_it_can(address, opened):
    page = opened(address)
    page.locator("#speed").select_option("30")
    page.keyboard.press(" ")
    page.wait_for_timeout(500)
    before = number(page)
    page.evaluate("() => { const end = performance.now() + 3000; while (performance.now() < end); }")
    page.wait_for_timeout(400)
    page.keyboard.press(" ")
    playwright.expect(page.locator("#play")).to_contain_text("Play", timeout=SECONDS)
    drawn = page.evaluate("lines.length")  # moments that have come
    assert number(page) - before > 45 and drawn < number(page) - 20  # those between were left out


def test_a_recording_is_downloaded(address, opened, tmp_path):
    page = opened(address)
    page.keyboard.press("r")
    page.keyboard.press("4")
    at(page, 1)
    playwright.expect(page.locator("#recorded")).to_contain_text("2 of", timeout=SECONDS)
    page.keyboard.press("r")
    with page.expect_download(timeout=SECONDS) as download:
        page.get_by_role("link", name="GIF").click()
    download.value.save_as(tmp_path / "dream.gif")
    assert (tmp_path / "dream.gif").read_bytes().startswith(b"GIF89a")


@pytest.mark.parametrize("width", [320, 375, 1280])
def test_it_fits_a_phone_and_a_finger_and_everything_has_a_name(address, opened, width):
    page = opened(address, viewport={"width": width, "height": 800}, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    button = page.get_by_role("button", name="action 3")
    assert button.bounding_box()["height"] >= 44
    button.tap()
    at(page, 1)
    assert red(page) == 3
    nameless = page.evaluate(
        "() => [...document.querySelectorAll('button, input, select, canvas, [tabindex]')].filter(x => x.offsetParent"
        " && !(x.textContent.trim() || x.ariaLabel || (x.labels || []).length)).map(x => x.id)"
    )
    assert nameless == []


def played(address, opened, seconds):
    """What is taken up between a third of some play and its end, in bytes: of this process, and of the page."""
    page = opened(address)
    page.keyboard.press("a")
    page.locator("#speed").select_option("120")
    page.locator("#restart").uncheck()
    page.keyboard.press(" ")
    session = page.context.new_cdp_session(page)

    def taken():
        session.send("HeapProfiler.collectGarbage")
        return resident_bytes(), session.send("Runtime.getHeapUsage")["usedSize"]

    page.wait_for_timeout(1000 * seconds / 3)
    before, begin = taken(), number(page)
    page.wait_for_timeout(1000 * seconds * 2 / 3)
    after = taken()
    assert number(page) > begin + 5 * seconds
    return after[0] - before[0], after[1] - before[1]


@pytest.mark.parametrize("seconds", [45, pytest.param(600, marks=pytest.mark.long)])
def test_minutes_of_play_leak_nothing(address, opened, seconds):
    ours, pages = played(address, opened, seconds)
    assert ours < 16e6 and pages < 4e6


@pytest.mark.long
@pytest.mark.parametrize("name", ["world_models", "dreamer_v1", "dreamer_v2", "dreamer_v3", "iris"])
def test_agents_that_come_with_the_package_are_played_at_20_frames_per_second(name, opened):
    import wmjax

    if os.getloadavg()[0] > 2 * os.cpu_count():
        pytest.skip("the machine has too much else to do")
    game = make_game(wmjax.load(f"pretrained:{name}/catch"))
    warm_up(game)
    with served(game) as (address, _):
        page = opened(address)
        page.keyboard.press("a")
        page.locator("#speed").select_option("120")
        page.keyboard.press(" ")
        page.wait_for_timeout(3000)
        rates = []
        for _ in range(10):
            page.wait_for_timeout(500)
            rates.append(int(page.locator("#rate").text_content().split()[0]))
        assert sorted(rates)[5] >= 20, rates
