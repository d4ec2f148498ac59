"""A real browser, controlled by the WebDriver protocol (https://www.w3.org/TR/webdriver2/) over plain HTTP.

Needs chromium and its chromedriver, which Debian ships in matching versions; nothing from a package registry.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import httpx

from al_pipeline.servers.process import free_port

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The key of an element's id in the protocol's replies."""

_SUBMIT = "//button[normalize-space(.)='Submit']"
_LABEL_ALL = "//button[normalize-space(.)='Label All Tasks']"


class Browser:
    """A headless chromium that can reach only loopback. Use it as a context manager; `folder` contains its profile."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._port = free_port()
        self._folder = folder
        self._unanswered: dict[str, tuple[str, str]] = {}
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{self._port}", timeout=120, trust_env=False)

    def __enter__(self) -> Self:
        driver = shutil.which("chromedriver")
        assert driver is not None, "no chromedriver"
        with (self._folder / "chromedriver.log").open("wb") as log:
            self._driver = subprocess.Popen(
                [driver, f"--port={self._port}"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            self._session = ""
            self._wait_for_driver()
            wishes = {"capabilities": {"alwaysMatch": self._wishes()}}
            self._session = str(self._send("POST", "session", wishes)["sessionId"])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(httpx.HTTPError, AssertionError):
            if self._session:
                self._send("DELETE", f"session/{self._session}")
        self._client.close()
        self._driver.terminate()
        try:
            self._driver.wait(20)
        except subprocess.TimeoutExpired:
            self._driver.kill()
            self._driver.wait(20)

    def goto(self, url: str) -> None:
        """Open a page and wait until it has loaded."""
        self._do("POST", "url", {"url": url})

    @property
    def url(self) -> str:
        return str(self._do("GET", "url"))

    @property
    def text(self) -> str:
        """The page's text, as a person sees it."""
        return str(self.script("return document.body ? document.body.innerText : ''"))

    def script(self, code: str, *arguments: Any) -> Any:
        """Run JavaScript in the page and return its result."""
        return self._do("POST", "execute/sync", {"script": code, "args": list(arguments)})

    def resize(self, width: int, height: int = 1000) -> None:
        """Make the window as wide and high as this."""
        self._do("POST", "window/rect", {"width": width, "height": height})

    def find(self, xpath: str, timeout: float = 60.0) -> str:
        """The first visible element at `xpath`; waits for it."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for found in self._do("POST", "elements", {"using": "xpath", "value": xpath}):
                with contextlib.suppress(StaleElement):
                    if self._do("GET", f"element/{found[ELEMENT]}/displayed"):
                        return str(found[ELEMENT])
            time.sleep(0.2)
        raise AssertionError(f"no {xpath} at {self.url} after {timeout} s; the page says:\n{self.text[:2000]}")

    def fill(self, xpath: str, text: str) -> None:
        """Type into a field."""
        element = self.find(xpath)
        self._do("POST", f"element/{element}/value", {"text": text})

    def click(self, xpath: str) -> None:
        """Click on the element at `xpath`; once more if the page moved under the pointer."""
        for _ in range(20):
            try:
                self._do("POST", f"element/{self.find(xpath)}/click", {})
                return
            except StaleElement:
                time.sleep(0.3)
        raise AssertionError(f"{xpath} never kept still to be clicked")

    def point_at(self, xpath: str) -> None:
        """Move the pointer to the element at `xpath`; first away from it, so that it enters."""
        for origin, x, y in (("viewport", 0, 0), ({ELEMENT: self.find(xpath)}, 0, 0)):
            move = {"type": "pointerMove", "duration": 50, "origin": origin, "x": x, "y": y}
            pointer = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": [move]}
            self._do("POST", "actions", {"actions": [pointer]})

    def posts(self) -> Iterator[tuple[str, str, int]]:
        """The POST requests that were answered since the last call: address, body, status of the reply."""
        for entry in self._do("POST", "se/log", {"type": "performance"}):
            message = json.loads(entry["message"])["message"]
            parameters = message["params"]
            if message["method"] == "Network.requestWillBeSent" and parameters["request"]["method"] == "POST":
                request = parameters["request"]
                self._unanswered[parameters["requestId"]] = request["url"], request.get("postData", "")
            elif message["method"] == "Network.responseReceived" and parameters["requestId"] in self._unanswered:
                yield *self._unanswered.pop(parameters["requestId"]), parameters["response"]["status"]

    def _wishes(self) -> dict[str, Any]:
        options = (
            "--headless=new",
            "--no-sandbox",  # refuses to start as root otherwise
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-proxy-server",
            "--window-size=1400,1000",
            "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
            f"--user-data-dir={self._folder / 'profile'}",
        )
        binary = shutil.which("chromium") or shutil.which("google-chrome")
        return {
            "browserName": "chrome",
            "goog:chromeOptions": {"binary": binary, "args": list(options)},
            "goog:loggingPrefs": {"performance": "ALL"},
        }

    def _wait_for_driver(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if self._client.get("/status").json()["value"]["ready"]:
                    return
            time.sleep(0.1)
        raise AssertionError("chromedriver did not start")

    def _do(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        return self._send(method, f"session/{self._session}/{path}", body)

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        reply = self._client.request(method, f"/{path}", json=body).json()["value"]
        error = reply.get("error") if isinstance(reply, dict) else None
        if error in ("stale element reference", "element click intercepted", "element not interactable"):
            raise StaleElement(error)
        assert error is None, f"{method} {path.split('/', 2)[-1]}: {error}: {reply['message']}"
        return reply


class StaleElement(Exception):
    """The page changed between finding an element and using it."""


def log_in(browser: Browser, url: str, email: str, password: str) -> None:
    """Log in to Label Studio with its form."""
    browser.goto(f"{url}/user/login/")
    browser.fill("//input[@name='email']", email)
    browser.fill("//input[@name='password']", password)
    browser.click("//button[@type='submit']")
    deadline = time.monotonic() + 60
    while "/user/login" in browser.url:
        assert time.monotonic() < deadline, f"log-in did not go through:\n{browser.text[:1000]}"
        time.sleep(0.2)


def open_queue(browser: Browser, address: str, timeout: float = 120.0) -> str:
    """Open a project's page and press its button "Label All Tasks"; returns the text of the page.

    The button, unlike a link that ends in `labeling=1`, requests the queue that gives two people different tasks.
    """
    browser.goto(address)
    browser.find(_LABEL_ALL, timeout)
    browser.click(_LABEL_ALL)
    browser.find(_SUBMIT, timeout)
    return browser.text


def submit(browser: Browser, label: str, timeout: float = 120.0) -> dict[str, Any]:
    """Choose `label` for the shown task and submit; returns what the page posted: `url`, `status`, `task`, `result`."""
    browser.find(_SUBMIT, timeout)
    browser.click(f'//label[.//input[@name="{label}"]]')
    list(browser.posts())  # earlier requests of the page do not matter
    browser.click(_SUBMIT)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        for address, body, status in browser.posts():
            if "/annotations" in address:
                posted: dict[str, Any] = json.loads(body)
                task = int(address.split("/tasks/")[1].split("/")[0])
                return {"url": address, "status": status, "task": task, "result": posted["result"]}
        time.sleep(0.2)
    raise AssertionError(f"nothing was posted within {timeout} s; the page says:\n{browser.text[:2000]}")


def answer_one_task(
    url: str, email: str, password: str, address: str, label: str, folder: Path, timeout: float = 120.0
) -> dict[str, Any]:
    """Do what an annotator does: log in, open the project's page, start labelling, choose `label`, submit.

    `folder` is for the browser's profile. Returns what `submit` returns, and `text`, the text of the page.
    """
    with Browser(folder) as browser:
        log_in(browser, url, email, password)
        shown = open_queue(browser, address, timeout)
        return {**submit(browser, label, timeout), "text": shown}
