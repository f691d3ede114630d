"""A headless Chromium, driven over the DevTools protocol: through two pipes, so that no port is opened and nothing is downloaded."""
import base64
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import threading
import time

PATIENCE_S = 60

FLAGS = [
    "--headless", "--remote-debugging-pipe", "--no-first-run", "--no-default-browser-check", "--disable-gpu", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions", "--disable-dev-shm-usage",
    "--mute-audio", "--window-size=1440,900", "--lang=en",
    # Frames come at their own pace, whether or not anybody looks.
    "--disable-renderer-backgrounding", "--disable-backgrounding-occluded-windows",
]


def program():
    return shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """One Chromium with a profile of its own."""

    def __init__(self, folder):
        to_read, self.write_fd = os.pipe()
        self.read_fd, to_write = os.pipe()
        # Chromium reads from 3 and writes to 4, so what is to become those must not lie there.
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (to_read, to_write)]

        def arrange():
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        # Root has no user namespace to sandbox in; whoever tests as somebody else keeps the sandbox.
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "TZ": "UTC"}
        self.process = subprocess.Popen(
            [program(), *FLAGS, *sandbox, f"--user-data-dir={folder}/profile", "about:blank"], env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=arrange, pass_fds=(3, 4))
        for fd in (to_read, to_write, *ends):
            os.close(fd)
        self.numbers = itertools.count(1)
        self.answers = {}
        self.events = []
        self.news = threading.Condition()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        buffer = b""
        while chunk := os.read(self.read_fd, 1 << 16):
            *whole, buffer = (buffer + chunk).split(b"\0")
            with self.news:
                for text in whole:
                    message = json.loads(text)
                    if "id" in message:
                        self.answers[message["id"]] = message
                    else:
                        self.events.append(message)
                self.news.notify_all()
        with self.news:
            self.answers = None
            self.news.notify_all()

    def ask(self, method, session=None, **parameters):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self.write_fd, json.dumps(message).encode() + b"\0")
        with self.news:
            self.news.wait_for(lambda: self.answers is None or number in self.answers, PATIENCE_S)
            assert self.answers is not None, "chromium ended"
            answer = self.answers.pop(number, None)
        assert answer is not None, f"{method}: no answer"
        assert "error" not in answer, f"{method}: {answer.get('error')}"
        return answer["result"]

    def open(self, url, before=None, **media):
        """`before` is a script that runs before any of the page's."""
        return Page(self, url, before, media)

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.reader.join(10)
        os.close(self.write_fd)
        os.close(self.read_fd)


class Page:
    """A tab. Everything that it asks the network for, and every complaint, is kept."""

    def __init__(self, browser, url, before, media):
        self.browser = browser
        # A context of its own: nothing is shared with another test's page.
        self.context = browser.ask("Target.createBrowserContext")["browserContextId"]
        target = browser.ask("Target.createTarget", url="about:blank", browserContextId=self.context)["targetId"]
        self.session = browser.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "Performance"):
            self.ask(f"{domain}.enable")
        if before is not None:
            self.ask("Page.addScriptToEvaluateOnNewDocument", source=before)
        self.media(**media)
        self.ask("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def ask(self, method, **parameters):
        return self.browser.ask(method, self.session, **parameters)

    def media(self, scheme="light", reduced_motion=False):
        features = [{"name": "prefers-color-scheme", "value": scheme},
                    {"name": "prefers-reduced-motion", "value": "reduce" if reduced_motion else "no-preference"}]
        self.ask("Emulation.setEmulatedMedia", features=features)

    def run(self, expression):
        """The value of a JavaScript expression; a promise is waited for."""
        done = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, expression, within_s=PATIENCE_S):
        """Polls until the expression is true, and returns it."""
        deadline = time.monotonic() + within_s
        while not (found := self.run(expression)):
            if time.monotonic() > deadline:
                raise AssertionError(f"never true: {expression}; the page says:\n{self.run('document.body.innerText')[:3000]}")
            time.sleep(0.05)
        return found

    def press(self, key, code=None, text=None):
        common = {"key": key, "code": code or key}
        self.ask("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {}),
                 windowsVirtualKeyCode={"Enter": 13, "Escape": 27, "Tab": 9, " ": 32}.get(key, ord(key[0].upper())))
        self.ask("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text):
        self.ask("Input.insertText", text=text)

    def messages(self, method):
        with self.browser.news:
            return [e["params"] for e in self.browser.events if e["method"] == method and e.get("sessionId") == self.session]

    def accessibility(self):
        """Role and name of everything that a screen reader finds."""
        self.ask("Accessibility.enable")
        nodes = [node for node in self.ask("Accessibility.getFullAXTree")["nodes"] if not node.get("ignored")]
        return [{"role": node["role"]["value"], "name": node.get("name", {}).get("value", "")} for node in nodes]

    def urls(self):
        return [sent["request"]["url"] for sent in self.messages("Network.requestWillBeSent")]

    def complaints(self):
        """Errors and warnings of the console, broken security policies among them."""
        logged = [entry["entry"]["text"] for entry in self.messages("Log.entryAdded") if entry["entry"]["level"] in ("error", "warning")]
        thrown = [thrown["exceptionDetails"]["text"] for thrown in self.messages("Runtime.exceptionThrown")]
        return logged + thrown

    def metrics(self):
        return {metric["name"]: metric["value"] for metric in self.ask("Performance.getMetrics")["metrics"]}

    def screenshot(self, path, width=1440, height=900):
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        shot = self.ask("Page.captureScreenshot", format="png")
        with open(path, "wb") as out:
            out.write(base64.b64decode(shot["data"]))

    def close(self):
        self.browser.ask("Target.disposeBrowserContext", browserContextId=self.context)
