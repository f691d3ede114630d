#!/usr/bin/env python3
"""Makes docs/live-activity.png and docs/live-activity-dark.png, which the README shows: the page over real traffic of made-up agents.

    cargo build --locked && python3 tests/sdk/screenshot.py

Needs Debian's chromium; pngquant makes the pictures smaller where it is installed.
"""
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.dont_write_bytecode = True
import browser  # noqa: E402
import stack  # noqa: E402
import streams  # noqa: E402

POLICY = """package behavry.authz

deny contains "mistral is not approved for support" if {
	input.model == "mistral"
	input.agent.role == "support"
}

escalate if input.model == "forbidden-model"
"""
CONFIG = """
[[backend]]
name = "gpu-1"
url = "%s"
slots = 3

[[backend]]
name = "gpu-2"
url = "%s"
models = ["codellama", "mistral"]

[[backend]]
name = "gpu-3"
url = "%s"

[health]
failures = 1
rest_s = 60
"""
AGENTS = {"research-1": "internal", "support-desk": "support", "code-review": "internal", "nightly-summaries": "internal"}


def main():
    random.seed(5173)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        backends = [stack.simulator("--tokens-per-second", speed, "--tokens", "90", "--first-token-ms", "180") for speed in ("45", "30", "45")]
        (folder / "proxy.toml").write_text(CONFIG % tuple(url for _, url in backends))
        proxy = stack.Proxy(folder / "p", None, POLICY, BEHAVRY_CONFIG=folder / "proxy.toml")
        proxy.command("backend", "drain", "gpu-3")
        tokens = {}
        for agent, role in AGENTS.items():
            words = [stack.BINARY, "token", "mint", "--agent", agent, "--role", role, "--permission", "web:read", "--permission", "web:write"]
            done = subprocess.run(words, env=proxy.environment, capture_output=True, text=True, check=True)
            tokens[agent] = done.stdout.strip()
        chromium = browser.Browser(folder)
        try:
            page = chromium.open(proxy.operator + "/")
            page.ask("Emulation.setDeviceMetricsOverride", width=1440, height=960, deviceScaleFactor=1, mobile=False)
            page.wait("document.querySelector('#connection').dataset.state === 'live'")
            stop = threading.Event()
            callers = [threading.Thread(target=keep_asking, args=(proxy, tokens, stop)) for _ in range(5)]
            for caller in callers:
                caller.start()
            time.sleep(45)  # for sparklines that show something
            running = streams.Streams(proxy.base, [(tokens[agent], model) for agent, model in [
                ("research-1", "llama3.2"), ("code-review", "codellama"), ("nightly-summaries", "llama3.2"), ("nightly-summaries", "llama3.2")]])
            page.wait("document.querySelectorAll('#running-rows tr').length >= 5 && !document.getElementById('queue').hidden")
            time.sleep(0.7)
            root = stack.ROOT / "docs"
            shoot(page, root / "live-activity.png")
            page.media("dark")
            time.sleep(0.3)
            shoot(page, root / "live-activity-dark.png")
            stop.set()
            running.stop()
            for caller in callers:
                caller.join()
        finally:
            chromium.close()
            proxy.stop()
            for program, _ in backends:
                program.stop()


def keep_asking(proxy, tokens, stop):
    while not stop.is_set():
        agent = random.choice(list(tokens))
        model = random.choices([stack.CHAT, "codellama", "mistral", stack.FORBIDDEN], [6, 3, 2, 0.4])[0]
        route, body = random.choice([("/api/chat", {"messages": [{"role": "user", "content": "hi"}]}),
                                     ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "stream": True}),
                                     ("/api/show", {})])
        stack.call(proxy.base + route, {"model": model} | body, {"Authorization": f"Bearer {tokens[agent]}"})
        stop.wait(random.random() * 1.5)


def shoot(page, path):
    page.screenshot(path, 1440, 960)
    if shutil.which("pngquant"):
        subprocess.run(["pngquant", "--force", "--ext", ".png", "--skip-if-larger", str(path)], check=False)
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
