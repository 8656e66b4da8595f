"""Headless Chromium, driven over its DevTools pipe: no driver and no WebSocket library in between.

Chromium reads commands from its file descriptor 3 and answers on 4, JSON ended by a null byte.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BINARIES = ("chromium", "chromium-browser", "google-chrome")
WAIT_S = 30.0


def chromium() -> str | None:
    """The browser's path; None where there is none."""
    return next((found for name in BINARIES if (found := shutil.which(name))), None)


class Tab:
    """One page.

    Example:
        >>> with open_tab() as tab:
        ...     tab.go("http://127.0.0.1:8000/")
        ...     tab.run("document.title")
        'Memoir'
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._write, self._read = os.fdopen(to_browser, "wb"), os.fdopen(from_browser, "rb")
        self._numbers, self._rest = itertools.count(1), b""
        self.session: str | None = None
        self.complaints: list[str] = []  # what the page logged as an error, or did not catch

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its answer."""
        number = next(self._numbers)
        asked: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self.session is not None:
            asked["sessionId"] = self.session
        self._write.write(json.dumps(asked).encode() + b"\0")
        self._write.flush()
        while True:
            told = self._next()
            if told.get("id") == number:
                assert "error" not in told, told
                return told["result"]
            self._note(told)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            found = os.read(self._read.fileno(), 1 << 20)
            assert found, "the browser ended"
            self._rest += found
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def _note(self, told: dict[str, Any]) -> None:
        method, params = told.get("method"), told.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append(json.dumps(params["entry"]))

    def go(self, address: str) -> None:
        """Open an address, and wait until its page is there."""
        self.call("Page.navigate", url=address)
        self.until(f"document.readyState === 'complete' && location.href === {address!r}")

    def run(self, script: str) -> Any:
        """The value of an expression, or of the promise that it gives."""
        found = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str) -> Any:
        """An expression's value, once it is true."""
        end = time.monotonic() + WAIT_S
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never came true: {script}"
            time.sleep(0.05)
        return value

    def before(self, script: str) -> None:
        """Run a script in every page that is opened from now on, before its own."""
        self.call("Page.addScriptToEvaluateOnNewDocument", source=script)

    def choose(self, selector: str, value: str) -> None:
        """Give a field a value, as a person does who then leaves it."""
        self.run(
            f"{{ const e = document.querySelector({selector!r}); e.value = {value!r};"
            " e.dispatchEvent(new Event('change')) }"
        )

    def text(self, selector: str) -> str:
        """What an element says."""
        found: str = self.run(f"document.querySelector({selector!r}).textContent")
        return found

    def key(self, name: str) -> None:
        """Press and leave a key."""
        codes = {"Enter": 13, "Tab": 9, "ArrowDown": 40, "ArrowRight": 39, "ArrowLeft": 37}
        text = {"text": "\r"} if name == "Enter" else {}
        about = {"key": name, "code": name, "windowsVirtualKeyCode": codes[name]}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def point(self, selector: str) -> None:
        """Move the mouse onto an element."""
        where = self.run(
            f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}});"
            " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=where[0], y=where[1])

    def size(self, width: int, height: int, *, phone: bool = False) -> None:
        """Set the window's size."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )

    def picture(self, path: Path) -> None:
        """What is seen now, as PNG."""
        shot = self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def open_tab(width: int = 1280, height: int = 900) -> Iterator[Tab]:
    """A browser of its own with one tab."""
    binary = chromium()
    assert binary is not None
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()

    def as_three_and_four() -> None:
        # Copies first: one of them may be 3 or 4 itself.
        one, other = os.dup(to_read), os.dup(from_write)
        os.dup2(one, 3)
        os.dup2(other, 4)

    # A process of the browser's may still write while it ends.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [
                binary,
                "--headless=new",
                "--remote-debugging-pipe",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                f"--user-data-dir={profile}",
            ],
            preexec_fn=as_three_and_four,  # no other thread runs Python here
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(from_write)
        try:
            tab = Tab(to_write, from_read)
            target = tab.call("Target.createTarget", url="about:blank")["targetId"]
            attached = tab.call("Target.attachToTarget", targetId=target, flatten=True)
            tab.session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log"):
                tab.call(f"{domain}.enable")
            tab.size(width, height)
            yield tab
        finally:
            process.kill()
            process.wait(timeout=10)
