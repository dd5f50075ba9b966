"""Headless Chromium, spoken to over a pipe in its DevTools protocol: no driver, no package."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Tab:
    def __init__(self, read, write):
        self._read, self._write, self._number, self._rest, self._session = read, write, 0, b"", None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def call(self, method, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {} if self._session is None else {"sessionId": self._session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                piece = os.read(self._read, 1 << 20)
                assert piece, "the browser is gone"
                self._rest += piece
            text, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def size(self, width, height=1000):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def open(self, url):
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def js(self, expression):
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression, seconds=60.0):
        end = time.monotonic() + seconds
        while not (found := self.js(expression)):
            assert time.monotonic() < end, f"it did not come to {expression}: {self.js('document.body.innerText')}"
            time.sleep(0.05)
        return found

    def screenshot(self, path, whole=True):
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def browser(profile):
    """A tab of its own browser, which ends with the block."""
    to_child, to_us = os.pipe(), os.pipe()
    # Chromium reads commands from descriptor 3 and writes answers to 4.
    command = f'exec "$0" "$@" 3<&{to_child[0]} 4>&{to_us[1]}'
    options = ["--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    options += ["--disable-dev-shm-usage", "--no-proxy-server", "--hide-scrollbars", f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        ["bash", "-c", command, CHROMIUM, *options],
        pass_fds=(to_child[0], to_us[1]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_child[0])
    os.close(to_us[1])
    try:
        yield Tab(to_us[0], to_child[1])
    finally:
        process.kill()
        process.wait()
        os.close(to_us[0])
        os.close(to_child[1])
