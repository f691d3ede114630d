"""A pull through the proxy for two real Ollamas: its registry sends each blob once, and both hold the model.

The registry is made here, of the blobs of a model that tests/real/tiny-ollama has made. Needs a real Ollama, which is not always there.
"""
import contextlib
import http.server
import json
import re
import threading

import pytest

from stack import Proxy, Running, call, clean_environment, real_ollama_folder

MODEL = "tiny-story"
POLICY = 'package behavry.authz\ndeny contains "no" if false\n'


def ollama_folder():
    folder = real_ollama_folder()
    if folder is None or not (folder / "models/manifests").exists():
        pytest.skip("there is no ollama; tests/real/tiny-ollama/install-ollama builds one")
    return folder


class Registry(http.server.ThreadingHTTPServer):
    """What Ollama's own registry does for a public model, over http: a manifest by its tag, and blobs from another place."""

    daemon_threads = True

    def __init__(self, store):
        super().__init__(("127.0.0.1", 0), Handler)
        self.store = store
        self.manifest = (store / "manifests/registry.ollama.ai/library" / MODEL / "latest").read_bytes()
        self.asked = []
        self.address = "127.0.0.1:%d" % self.server_address[1]
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def blobs(self):
        manifest = json.loads(self.manifest)
        return {layer["digest"]: layer["size"] for layer in [manifest["config"], *manifest["layers"]]}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.append((self.command, self.path, self.headers.get("Range")))
        if found := re.fullmatch(r"/v2/library/tiny/blobs/(sha256:[0-9a-f]{64})", self.path):
            return self.say(307, b"", Location=f"http://{self.server.address}/network/{found[1]}?signed=1")
        if found := re.fullmatch(r"/network/(sha256:[0-9a-f]{64})\?signed=1", self.path):
            return self.say(200, (self.server.store / "blobs" / found[1].replace(":", "-")).read_bytes())
        if self.path == "/v2/library/tiny/manifests/latest":
            return self.say(200, self.server.manifest)
        return self.say(404, b"")

    def say(self, status, body, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@contextlib.contextmanager
def ollama(folder, program):
    """A real Ollama with a store of its own, in which nothing is."""
    environment = clean_environment(HOME=folder, OLLAMA_HOST="127.0.0.1:0", OLLAMA_MODELS=folder / "models", OLLAMA_NO_CLOUD="1")
    running = Running([program, "serve"], environment)
    try:
        yield "http://" + running.wait_for(r"Listening on (127\.0\.0\.1:\d+)")[1]
    finally:
        running.stop()


def names(url):
    return [model["name"] for model in call(url + "/api/tags").json["models"]]


def test_two_real_ollamas_hold_a_model_that_its_registry_sent_once(tmp_path):
    real = ollama_folder()
    registry = Registry(real / "models")
    config = tmp_path / "proxy.toml"
    config.write_text(f'[models]\nregistries = ["{registry.address}"]\nmirror_listen = "127.0.0.1:0"\n')
    with contextlib.ExitStack() as stack:
        stack.callback(registry.shutdown)
        folders = [tmp_path / name for name in ("a", "b")]
        for folder in folders:
            folder.mkdir()
        urls = [stack.enter_context(ollama(folder, real / "bin/ollama")) for folder in folders]
        proxy = Proxy(tmp_path / "proxy", ",".join(urls), POLICY, BEHAVRY_CONFIG=config)
        stack.callback(proxy.stop)
        headers = {"Authorization": "Bearer " + proxy.mint(permissions=("web:read", "web:write", "ollama:admin"))}
        name = registry.address + "/library/tiny"

        reply = call(proxy.base + "/api/pull", {"model": name, "insecure": True}, headers=headers)
        told = [json.loads(line) for line in reply.body.splitlines()]
        assert reply.status == 200 and told[-1] == {"status": "success"}, told
        statuses = [line.get("status", "") for line in told]
        assert statuses.count("success") == 1 and not any("for itself" in status for status in statuses), statuses
        assert {"backend ollama-1 (1 of 2)", "backend ollama-2 (2 of 2)"} <= set(statuses)
        assert any(line.get("completed") for line in told), told
        assert "behavry-mirror" not in reply.body.decode()

        asked = registry.asked
        for digest in registry.blobs():
            fetched = [(method, rng) for method, path, rng in asked if path.startswith("/network/" + digest)]
            assert fetched == [("GET", None)], (digest, asked)
        assert sum(path.endswith("/manifests/latest") for _, path, _ in asked) == 1, asked
        for url, folder in zip(urls, folders, strict=True):
            # Under its own name and no other; with every blob that it needs, and none besides.
            assert names(url) == [name + ":latest"]
            kept = {path.name.replace("-", ":", 1): path.stat().st_size for path in (folder / "models/blobs").iterdir()}
            assert kept == registry.blobs()
            said = call(url + "/api/generate", {"model": name, "prompt": "once", "stream": False})
            assert said.status == 200 and said.json["done"], said.body

        # A newer one takes its place: what the older one alone needed goes with it.
        newer = json.loads(registry.manifest)
        gone = newer["layers"].pop()["digest"]
        registry.manifest = json.dumps(newer).encode()
        asked.clear()
        reply = call(proxy.base + "/api/pull", {"model": name, "insecure": True, "stream": False}, headers=headers)
        assert (reply.status, reply.json) == (200, {"status": "success"})
        assert not any("/blobs/" in path for _, path, _ in asked), asked
        for url, folder in zip(urls, folders, strict=True):
            assert names(url) == [name + ":latest"]
            assert not (folder / "models/blobs" / gone.replace(":", "-")).exists()
            assert {path.name.replace("-", ":", 1) for path in (folder / "models/blobs").iterdir()} == set(registry.blobs())
        assert "behavry-mirror" not in "\n".join(proxy.program.lines)
