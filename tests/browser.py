"""A page in a real Chromium, driven by its DevTools protocol over two pipes: keys, uploads, screenshots, requests."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
KEYS = {"Tab": 9, "Enter": 13, " ": 32, "ArrowRight": 39}


def _as_3_and_4(*ends: int) -> None:
    """Duplicates the pipes to the file descriptors that Chromium expects; each may have the other's number before."""
    for number, end in enumerate([fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in ends], 3):
        os.dup2(end, number)


class Page:
    """One page. `requests`: the URLs that it asked for; `errors`: what its scripts threw or logged as errors."""

    def __init__(self, url: str, folder: Path, width: int, height: int = 1400) -> None:
        ours, theirs = os.pipe(), os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "about:blank"]
        self._process = subprocess.Popen(
            [str(CHROMIUM), f"--user-data-dir={folder / f'profile-{width}'}", *flags],
            preexec_fn=lambda: _as_3_and_4(ours[0], theirs[1]),
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(ours[0])
        os.close(theirs[1])
        self._write, self._read, self._left = ours[1], theirs[0], b""
        self._count, self.requests, self.errors = 0, [], []
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log", "DOM"):
            self.send(f"{domain}.enable")
        mobile = width < 600
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.send("Page.navigate", url=url)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        return self._send(method, self._session, **params)

    def _send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        os.write(self._write, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            data = os.read(self._read, 1 << 16)
            assert data, "the browser has ended"
            self._left += data
        message, _, self._left = self._left.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        params = found.get("params", {})
        if found.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif found.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"])[:500])
        return found

    def do(self, script: str) -> Any:
        """Returns the value of a JavaScript expression."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> None:
        """Waits until a JavaScript expression is true."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.do(f"Boolean({script})"):
                return
            time.sleep(0.2)
        raise AssertionError(f"not within {seconds} s: {script}")

    def type(self, text: str) -> None:
        """Types into the element that has the focus."""
        self.send("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False) -> None:
        """Presses a key, as a person does."""
        how = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": 8 if shift else 0}
        text = {"Enter": "\r", " ": " "}.get(key)
        self.send("Input.dispatchKeyEvent", type="keyDown", **how, **({"text": text} if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", **how)

    def tab_to(self, script: str, back: bool = False) -> None:
        """Presses Tab until a JavaScript expression is true."""
        for _ in range(20):
            self.press("Tab", shift=back)
            if self.do(script):
                return
        raise AssertionError(f"not within 20 tabs: {script}")

    def upload(self, selector: str, path: Path) -> None:
        """Chooses a file in a file input."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def screenshot(self, path: Path) -> None:
        """Writes the whole page as a PNG."""
        found = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._write)
        os.close(self._read)
