"""The page in headless Chromium, driven through chromedriver; skipped where they are not installed."""

from __future__ import annotations

import base64
import http.client
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import MODEL, Client, RealLoader, serving, until

from sana_edge.serve.service import Service

pytestmark = [pytest.mark.slow, pytest.mark.ci]

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
# a folder that gets pictures of the page
SHOTS = os.environ.get("SANA_EDGE_SHOTS")


class Browser:
    """What of WebDriver the tests need."""

    def __init__(self, port: int, folder: Path) -> None:
        self._port = port
        options = {"args": [*FLAGS, f"--user-data-dir={folder}"], "binary": CHROMIUM}
        capabilities = {"alwaysMatch": {"goog:chromeOptions": options}}
        self._session = ""
        answer = self._ask("POST", "", {"capabilities": capabilities})
        self._session = f"/{answer['sessionId']}"

    def open(self, url: str) -> None:
        self._ask("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What ``return`` gives in the page."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def keys(self, text: str) -> None:
        """Press keys on what has the focus."""
        actions = [{"type": kind, "value": key} for key in text for kind in ("keyDown", "keyUp")]
        self._ask("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def chord(self, held: str, key: str) -> None:
        down, up = "keyDown", "keyUp"
        order = ((down, held), (down, key), (up, key), (up, held))
        actions = [{"type": kind, "value": value} for kind, value in order]
        self._ask("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def drag(self, points: list[tuple[float, float]]) -> None:
        """Press the pointer, and move it on."""
        moves = [{"type": "pointerMove", "duration": 10, "x": round(x), "y": round(y)} for x, y in points]
        actions = [
            moves[0],
            {"type": "pointerDown", "button": 0},
            *moves[1:],
            {"type": "pointerUp", "button": 0},
        ]
        self._ask("POST", "/actions", {"actions": [{"type": "pointer", "id": "pointer", "actions": actions}]})

    def view(self, width: int, height: int, scheme: str) -> None:
        """Be so large, and prefer "light" or "dark"."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self._devtools("Emulation.setDeviceMetricsOverride", **size)
        self._devtools("Emulation.setEmulatedMedia", features=[feature])

    def shot(self, name: str) -> None:
        if SHOTS:
            (Path(SHOTS) / name).write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))

    def close(self) -> None:
        self._ask("DELETE", "")

    def _devtools(self, command: str, **values: Any) -> None:
        self._ask("POST", "/goog/cdp/execute", {"cmd": command, "params": values})

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        data = None if body is None else json.dumps(body)
        connection.request(method, f"/session{self._session}{path}", data)
        answer = json.loads(connection.getresponse().read())["value"]
        connection.close()
        assert not (isinstance(answer, dict) and "stacktrace" in answer), answer
        return answer


@pytest.fixture(scope="module")
def server() -> Iterator[Client]:
    service = Service({MODEL: MODEL, "second": MODEL}, RealLoader())
    service.load()
    with serving(service) as client:
        yield client


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no chromium, or no chromedriver")
    with subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        line = next(line for line in driver.stdout if "started successfully on port" in line)
        made = Browser(int(line.rstrip().rstrip(".").rpartition(" ")[2]), tmp_path)
        yield made
        made.close()
        driver.terminate()


def test_draw_with_the_keyboard_alone(browser: Browser, server: Client) -> None:
    browser.open(f"{server.url}/")
    until(lambda: browser.run("return document.querySelectorAll('#model option').length") == 2)
    assert "cores" in browser.run("return document.getElementById('machine').textContent")
    assert browser.run("return document.getElementById('width').value") == "256"
    browser.run("prompt.value = ''; for (const [id, v] of [['steps', 8], ['seed', 7]]) at(id).value = v;")
    browser.run("document.getElementById('prompt').focus()")
    browser.keys("a red house")
    browser.chord("\ue009", "\ue007")
    until(lambda: browser.run("return !at('picture').hidden && at('picture').alt.startsWith('Preview')"))
    browser.shot("drawing.png")
    until(lambda: browser.run("return at('status').textContent.startsWith('Done in')"))
    assert browser.run("return at('picture').alt") == browser.run("return at('prompt').value")
    assert browser.run("return at('picture').naturalWidth") == 256
    assert browser.run("return at('gallery').children.length") == 1
    until(lambda: browser.run("return at('estimate').textContent.startsWith('Takes about')"))
    # the same picture again, and another one like it
    first = browser.run("return at('picture').src")
    browser.run("at('seed').value = ''; document.querySelector('[aria-label^=\"Take\"]').click(); draw()")
    until(lambda: browser.run("return at('gallery').children.length == 2 && !at('draw').disabled"))
    assert browser.run("return at('picture').src") == first
    browser.run("document.querySelector('[aria-label^=\"Draw 4\"]').click()")
    until(lambda: browser.run("return at('gallery').children.length == 6 && !at('draw').disabled"))
    last = browser.run("return at('picture').src")
    assert last != first and "seed 7-" in browser.run("return at('gallery').textContent")
    # a variation again, of which the seed alone would be another picture
    browser.run("document.querySelector('[aria-label^=\"Take\"]').click()")
    assert browser.run("return at('chain').textContent").startswith("With the noise of seed")
    browser.run("draw()")
    until(lambda: browser.run("return at('gallery').children.length == 7 && !at('draw').disabled"))
    assert browser.run("return at('picture').src") == last
    browser.shot("gallery.png")
    # what was drawn is there after a reload, and is shown large by a key
    browser.open(f"{server.url}/")
    until(lambda: browser.run("return document.querySelectorAll('#gallery img').length") == 7)
    browser.run("document.querySelector('#gallery button').focus()")
    browser.keys("\ue007")
    assert browser.run("return !at('picture').hidden")


def test_from_a_picture(browser: Browser, server: Client) -> None:
    """With a mask that is painted, varied from itself, and from a drawn one."""
    browser.view(1440, 1400, "light")
    browser.open(f"{server.url}/")
    until(lambda: browser.run("return at('model').options.length") == 2)
    before = browser.run("return fetch('/v1/jobs').then((answer) => at('gallery').children.length)")
    drawn = "return at('gallery').children.length - arguments[0] == arguments[1] && !at('draw').disabled"
    browser.run("""
      at('steps').value = 4; at('seed').value = 7; at('strength').value = 0.8;
      const canvas = document.createElement('canvas');
      [canvas.width, canvas.height] = [512, 256];
      const pen = canvas.getContext('2d');
      pen.fillStyle = 'rgb(90, 160, 220)'; pen.fillRect(0, 0, 512, 256);
      pen.fillStyle = 'rgb(120, 180, 90)'; pen.fillRect(0, 170, 512, 86);
      canvas.toBlob((blob) => {
        const data = new DataTransfer();
        data.items.add(new File([blob], 'a.png', { type: 'image/png' }));
        at('file').files = data.files;
        at('file').dispatchEvent(new Event('change'));
      })""")
    until(lambda: browser.run("return given !== null"))
    # as many pixels as the model draws at
    assert browser.run("return [at('width').value, at('height').value]") == ["352", "192"]
    browser.run("at('mask').scrollIntoView({block: 'center'})")
    left, top, width, height = browser.run(
        "const box = at('mask').getBoundingClientRect(); return [box.left, box.top, box.width, box.height]"
    )
    browser.drag([(left + width * share, top + height / 2) for share in (0.2, 0.3, 0.4)])
    assert browser.run("return painted && mask().startsWith('data:image/png')")
    browser.shot("from.png")
    browser.run("draw()")
    until(lambda: browser.run(drawn, before, 1))
    assert browser.run("return [at('picture').naturalWidth, at('picture').naturalHeight]") == [352, 192]
    assert browser.run("return at('error').textContent") == ""
    browser.run("document.querySelector('[aria-label^=\"Draw 4\"]').click()")
    until(lambda: browser.run(drawn, before, 5))
    browser.run("at('remove').click()")
    assert browser.run("return [given, asked().image ?? null]") == [None, None]
    browser.run("document.querySelector('[aria-label^=\"Start from\"]').click()")
    until(lambda: browser.run("return given !== null"))
    browser.run("at('strength').value = 0.3; at('images').value = 1; draw()")
    until(lambda: browser.run(drawn, before, 6))


def test_compare_cancel_and_errors(browser: Browser, server: Client) -> None:
    browser.view(1440, 900, "dark")
    browser.open(f"{server.url}/")
    until(lambda: browser.run("return at('model').options.length") == 2)
    browser.run("at('steps').value = 2; at('seed').value = 7; at('other').value = 'second'; draw()")
    until(lambda: browser.run("return !at('comparison').hidden && !at('draw').disabled"))
    assert "right second" in browser.run("return at('pair').textContent")
    browser.run("at('cut').value = 30; at('cut').dispatchEvent(new Event('input'))")
    assert "30%" in browser.run("return getComputedStyle(at('right')).clipPath")
    browser.shot("comparison.png")
    browser.run("at('other').value = ''; at('steps').value = 900; draw()")
    until(lambda: browser.run("return !at('cancel').disabled"))
    browser.keys("\ue00c")
    until(lambda: "cancelled" in browser.run("return at('error').textContent"))
    browser.run("at('steps').value = 2; at('prompt').value = '   '; draw()")
    until(lambda: "the prompt is empty" in browser.run("return at('error').textContent"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_width_and_scheme(browser: Browser, server: Client, scheme: str) -> None:
    """No sideways scrolling, everything has a name, and text stands out from what is behind it."""
    browser.open(f"{server.url}/")
    for width, height in ((360, 740), (820, 1180), (1440, 900), (3840, 2160)):
        browser.view(width, height, scheme)
        assert browser.run("return document.documentElement.scrollWidth") <= width
        browser.shot(f"{scheme}-{width}.png")
    nameless = """
      const all = document.querySelectorAll('input, select, textarea, button, a, progress, img');
      return [...all].filter((one) =>
        !one.labels?.length && !one.ariaLabel && !one.textContent.trim() && one.alt === undefined).length"""
    assert browser.run(nameless) == 0
    contrast = """
      const light = (text) => text.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255).map((c) =>
        c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4).reduce((s, c, i) =>
        s + c * [0.2126, 0.7152, 0.0722][i], 0);
      const behind = (one) => { const c = getComputedStyle(one).backgroundColor;
        return c === 'rgba(0, 0, 0, 0)' ? behind(one.parentElement) : c; };
      return [...document.querySelectorAll('p, label, input, button, h1, h2')].map((one) => {
        const [a, b] = [light(getComputedStyle(one).color), light(behind(one))];
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); });"""
    # WCAG 2.2, 1.4.3
    assert min(browser.run(contrast)) >= 4.5
