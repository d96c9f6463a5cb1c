"""Pages as a browser has them: headless Chromium, spoken to over a pipe (the DevTools protocol, no package needed)."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--no-first-run",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--remote-debugging-pipe",
)
START = """
import os, sys
for place, end in enumerate(sys.argv[1:3]):
    os.dup2(int(end), 3 + place)
os.execv(sys.argv[3], sys.argv[3:])
"""  # becomes the browser, with both pipes where it looks for them
PATIENCE = 180  # seconds for an answer, on a busy machine


def find_browser():
    """The path of Chromium or Chrome; None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """A running Chromium. It reads commands from file descriptor 3 and answers on 4, JSON between null bytes."""

    def __init__(self, profile):
        theirs_in, self.to = os.pipe()
        self.of, theirs_out = os.pipe()
        inherited = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]  # none is 3 or 4 itself
        command = [sys.executable, "-c", START, *map(str, inherited), find_browser(), *FLAGS, f"--user-data-dir={profile}"]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([*command, "about:blank"], pass_fds=inherited, **quiet)
        for end in inherited:
            os.close(end)
        os.close(theirs_in)
        os.close(theirs_out)
        self.read, self.count, self.events = b"", 0, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        os.close(self.of)

    def call(self, method, session=None, **params):
        """The result of a command; what else is told meanwhile goes to `events`."""
        self.count += 1
        wanted = self.count
        message = {"id": wanted, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (said := self.next()).get("id") != wanted:
            self.events.append(said)
        if "error" in said:
            raise RuntimeError(f"{method}: {said['error']}")
        return said["result"]

    def next(self):
        """The next message of the browser, an answer or an event."""
        while b"\0" not in self.read:
            if not select.select([self.of], [], [], PATIENCE)[0]:
                raise TimeoutError(f"the browser said nothing for {PATIENCE} s")
            piece = os.read(self.of, 1 << 16)
            if not piece:
                raise RuntimeError("the browser is gone")
            self.read += piece
        message, _, self.read = self.read.partition(b"\0")
        return json.loads(message)

    def open(self, path, width=1280, height=900, dark=False):
        """A page of its own, loaded."""
        return Page(self, Path(path).resolve().as_uri(), width, height, dark)


class Page:
    """A file in a tab. Network requests and console messages of it are in `requests` and `messages`."""

    def __init__(self, browser, address, width, height, dark):
        self.browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.browser.events.clear()
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=address)
        until = time.monotonic() + PATIENCE
        while self.run("document.readyState") != "complete" or self.run("location.href") != address:
            if time.monotonic() > until:
                raise TimeoutError(address)
            time.sleep(0.02)
        self.run("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")

    def call(self, method, **params):
        return self.browser.call(method, self.session, **params)

    def resize(self, width, height=900):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)

    def run(self, code):
        """What JavaScript code comes to, as JSON; promises are waited for."""
        found = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"])
        return found["result"].get("value")

    def told(self, method):
        mine = (event for event in self.browser.events if event.get("sessionId") == self.session)
        return [event["params"] for event in mine if event["method"] == method]

    @property
    def requests(self):
        """Addresses that were asked for, but of data that the file itself holds."""
        asked = [event["request"]["url"] for event in self.told("Network.requestWillBeSent")]
        return [address for address in asked if not address.startswith("data:")]

    @property
    def messages(self):
        """What was written to the console, or logged by the browser: errors, warnings, refused resources."""
        said = [str(event) for event in self.told("Runtime.consoleAPICalled") + self.told("Runtime.exceptionThrown")]
        return said + [event["entry"]["text"] for event in self.told("Log.entryAdded")]

    def picture(self, path, whole=True):
        """A screenshot as PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        how = {"clip": clip, "captureBeyondViewport": True} if whole else {}
        shot = self.call("Page.captureScreenshot", format="png", **how)
        Path(path).write_bytes(base64.b64decode(shot["data"]))
