"""The parts of a running system, for the tests: a backend, the proxy in front of it, and what it wrote down.

Nothing here sleeps to synchronise: a program is ready when it says so, and a record is there when it can be read.
"""
import base64
import http.client
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BINARY = Path(os.environ.get("BEHAVRY_TEST_BINARY", ROOT / "target/debug/behavry-ollama-proxy"))

# The same names in front of the simulator and of the real Ollama, where all but EMBED are copies of a tiny model.
CHAT, EMBED, FORBIDDEN, ABSENT = "llama3.2", "tiny-embed", "forbidden-model", "never-pulled"
COPIES = [CHAT, "codellama", "mistral", FORBIDDEN]

START_S, RECORD_S = 60, 10


class Running:
    """A started program; its output is collected line by line, standard output and error together."""

    def __init__(self, argv, env=None):
        self.argv = [str(word) for word in argv]
        self.lines = []
        self.news = threading.Condition()
        self.process = subprocess.Popen(
            self.argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True)
        self.readers = [threading.Thread(target=self._read, args=(pipe,), daemon=True)
                        for pipe in (self.process.stdout, self.process.stderr)]
        for reader in self.readers:
            reader.start()

    def _read(self, pipe):
        for raw in pipe:
            with self.news:
                self.lines.append(raw.decode(errors="replace").rstrip("\n"))
                self.news.notify_all()
        with self.news:
            self.news.notify_all()

    def wait_for(self, pattern, within_s=START_S):
        """The first match of `pattern` in a line of the output, now or later. Fails when the program ends first."""
        deadline = time.monotonic() + within_s
        seen = 0
        with self.news:
            while True:
                for line in self.lines[seen:]:
                    if found := re.search(pattern, line):
                        return found
                seen = len(self.lines)
                left = deadline - time.monotonic()
                if left <= 0 or not any(reader.is_alive() for reader in self.readers):
                    tail = "\n".join(self.lines[-30:])
                    raise AssertionError(f"{' '.join(self.argv[:2])} never printed /{pattern}/; it printed:\n{tail}")
                self.news.wait(min(left, 1))

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        for reader in self.readers:
            reader.join(5)


def clean_environment(**more):
    """The caller's environment without anything that configures a proxy or redirects a client."""
    kept = {name: value for name, value in os.environ.items()
            if not name.upper().startswith(("BEHAVRY_", "OLLAMA_", "OPENAI_", "ANTHROPIC_"))
            and name.lower() not in ("http_proxy", "https_proxy", "all_proxy")}
    return kept | {name: str(value) for name, value in more.items()}


def simulator(*flags):
    """(program, URL) of a simulator on a free port."""
    names = ",".join([*COPIES, EMBED])
    program = Running([BINARY, "simulate", "--listen", "127.0.0.1:0", "--models", names, *flags], clean_environment())
    return program, program.wait_for(r"simulator listening on (http://127\.0\.0\.1:\d+)")[1]


def real_ollama(folder):
    """(program, URL) of the Ollama that install-ollama put into `folder`, on a free port, with our model names."""
    program = Running([ROOT / "tests/real/tiny-ollama/serve", folder, "0"], clean_environment())
    url = "http://" + program.wait_for(r"Listening on (127\.0\.0\.1:\d+)")[1]
    for name in COPIES:
        call(url + "/api/copy", {"source": "tiny-story", "destination": name})
    return program, url


def real_ollama_folder():
    """Where install-ollama has put an Ollama; None where it has not."""
    built = Path.home() / ".cache/behavry-ollama-proxy/ollama-v0.17.4"
    folders = [os.environ.get("BEHAVRY_TEST_REAL_OLLAMA"), os.environ.get("BEHAVRY_REAL_OLLAMA_DIR"), built]
    return next((Path(folder) for folder in folders if folder and (Path(folder) / "bin/ollama").exists()), None)


class DeadPort:
    """A port of 127.0.0.1 that refuses connections for as long as this lives: bound, so that nobody else gets it."""

    def __init__(self):
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = "http://127.0.0.1:%d" % self.socket.getsockname()[1]


class Older:
    """An Ollama as it was before `/v1/responses`: what stands behind it, but for that route, which Go's router does not know."""

    def __init__(self, url):
        behind = urllib.parse.urlsplit(url)

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                if self.path == "/v1/responses":
                    return self.say(404, "text/plain", [b"404 page not found"])
                asked = http.client.HTTPConnection(behind.hostname, behind.port, timeout=120)
                asked.request(self.command, self.path, body, {"content-type": "application/json"})
                reply = asked.getresponse()
                self.say(reply.status, reply.headers["content-type"], iter(lambda: reply.read1(), b""))
                asked.close()

            def say(self, status, content_type, pieces):
                self.send_response(status)
                self.send_header("content-type", content_type)
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                for piece in pieces:
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                self.wfile.write(b"0\r\n\r\n")

            do_GET = do_POST = answer

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = "http://127.0.0.1:%d" % self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


class Reply:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self):
        return json.loads(self.body)


DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def call(url, body=None, headers=(), method=None, within_s=60):
    """One request with the standard library: a client that adds nothing of its own."""
    data = None if body is None else json.dumps(body).encode()
    head = {"Content-Type": "application/json"} if body is not None else {}
    request = urllib.request.Request(url, data, head | dict(headers), method=method)
    try:
        with DIRECT.open(request, timeout=within_s) as reply:
            return Reply(reply.status, reply.headers, reply.read())
    except urllib.error.HTTPError as refusal:
        with refusal:
            return Reply(refusal.code, refusal.headers, refusal.read())


def first_agent(program):
    """(id, secret) of the agent that a first start made, from the file that its one line names."""
    kept = json.loads(Path(program.wait_for(r"id and secret are in (\S+),")[1]).read_text())
    return kept["client_id"], kept["client_secret"]


PHASES = ("request", "stream_start", "final")


class Exchange:
    """The audit records of one request."""

    def __init__(self, records):
        self.records = records

    def _of(self, phase):
        return [record for record in self.records if record["extra"]["phase"] == phase]

    @property
    def final(self):
        finals = self._of("final")
        assert len(finals) == 1, f"{len(finals)} final records"
        return finals[0]

    @property
    def request(self):
        requests = self._of("request")
        assert len(requests) == 1, f"{len(requests)} request records"
        return requests[0]

    @property
    def stream_starts(self):
        return self._of("stream_start")


class Proxy:
    """The proxy under test, with a state folder of its own."""

    def __init__(self, folder, backend_url, policy=None, **environment):
        self.folder = Path(folder)
        self.audit = self.folder / "audit"
        for name in ("state", "audit", "configuration"):
            (self.folder / name).mkdir(parents=True)
        # The simulator computes as much at once as it is asked for.
        (self.folder / "configuration/proxy.toml").write_text(
            f'[[backend]]\nurl = "{backend_url}"\nslots = 1000\n'
            # A fast machine sends more refusals in a second than have a record of their own.
            "[audit]\nrefusals_per_second = 1000\n")
        if "BEHAVRY_CONFIG" in environment and backend_url is not None:
            environment["BEHAVRY_OLLAMA_URL"] = backend_url  # that file names no backend
        self.environment = clean_environment(
            BEHAVRY_LISTEN="127.0.0.1:0", BEHAVRY_OPERATOR_LISTEN="127.0.0.1:0",
            BEHAVRY_STATE_DIR=self.folder / "state", BEHAVRY_AUDIT_DIR=self.audit,
            CONFIGURATION_DIRECTORY=self.folder / "configuration", **environment)
        if policy is not None:
            (self.folder / "policies").mkdir()
            (self.folder / "policies/authz.rego").write_text(policy)
            self.environment["BEHAVRY_POLICY_DIR"] = str(self.folder / "policies")
        self.program = Running([BINARY, "serve"], self.environment)
        try:
            self.origin = self.program.wait_for(r"(?<!operator )listening on (http://127\.0\.0\.1:\d+)")[1]
            self.operator = self.program.wait_for(r"operator listening on (http://127\.0\.0\.1:\d+)")[1]
        except BaseException:
            self.program.stop()
            raise
        self.base = self.origin + "/api/v1/ollama"
        self.token = self.mint()

    def stop(self):
        self.program.stop()

    def mint(self, *flags, permissions=("web:read", "web:write"), role="internal"):
        """A token by the command line, signed with the key in the state folder."""
        words = [BINARY, "token", "mint", "--agent", "sdk-agent", "--role", role]
        for permission in permissions:
            words += ["--permission", permission]
        done = subprocess.run([*map(str, words), *flags], env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        token = done.stdout.strip()
        assert token.count(".") == 2 and "\n" not in token, "the token must stand alone on standard output"
        return token

    def command(self, *words):
        """What a command of the same program prints, run beside it."""
        done = subprocess.run([str(BINARY), *words], env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def expired_token(self):
        """A token whose hour is over, signed with the proxy's own key by openssl: a second opinion on the format."""
        key = self.folder / "state" / "signing-key.pem"
        now = int(time.time())
        claims = {"sub": "sdk-agent", "jti": str(uuid.uuid4()), "iss": "behavry", "iat": now - 7200, "exp": now - 3600,
                  "roles": ["internal"], "permissions": ["web:read", "web:write"], "risk_tier": "medium"}
        head = json.loads(unpadded(self.token.split(".")[0]))
        assert head["alg"] == "RS256"
        signed = b".".join(padless(json.dumps(part).encode()) for part in (head, claims))
        made = subprocess.run(["openssl", "dgst", "-sha256", "-sign", str(key)], input=signed, capture_output=True,
                              check=True)
        return (signed + b"." + padless(made.stdout)).decode()

    def exchange(self, request_id):
        """All records of one request. Waits until the final one is on disk, which may be after the client's last byte."""
        deadline = time.monotonic() + RECORD_S
        while True:
            found = [record for record in self.records() if record["extra"].get("request_id") == request_id]
            if any(record["extra"]["phase"] == "final" for record in found):
                return Exchange(found)
            assert time.monotonic() < deadline, f"no final record; there are {[r['extra']['phase'] for r in found]}"
            with self.program.news:
                self.program.news.wait(0.05)

    def records(self):
        """Every record in the audit files, without the marks of the chain. A line that is not JSON fails the test."""
        lines = []
        for path in sorted(self.audit.rglob("*.jsonl")):
            text = path.read_bytes()
            lines += text[:text.rfind(b"\n") + 1].splitlines()
        records = [json.loads(line) for line in lines]
        return [record for record in records if (record.get("extra") or {}).get("phase") in PHASES]

    def assert_kept_to_itself(self, *secrets):
        """None of `secrets` is in a file or a line of the proxy, nor on the operator's pages."""
        places = [path.read_bytes() for path in self.folder.rglob("*") if path.is_file()]
        places.append("\n".join(self.program.lines).encode())
        places.append(call(self.operator + "/metrics").body)
        for secret in (*secrets, self.token.rsplit(".", 1)[1]):
            assert len(secret) >= 8, "too short to search for"
            assert not any(secret.encode() in place for place in places), "content or a token was written down"


JAVASCRIPT = ROOT / "tests/sdk/javascript"


def javascript(case, base, token, request_id):
    """What one call of an official JavaScript client came to."""
    environment = clean_environment(PROXY_BASE=base, PROXY_TOKEN=token, REQUEST_ID=request_id, CHAT=CHAT, EMBED=EMBED, FORBIDDEN=FORBIDDEN)
    done = subprocess.run(["node", "clients.mjs", case], cwd=JAVASCRIPT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def padless(raw):
    return base64.urlsafe_b64encode(raw).rstrip(b"=")


def unpadded(text):
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


NEEDS_JAVASCRIPT = pytest.mark.skipif(
    shutil.which("node") is None or not (JAVASCRIPT / "node_modules").is_dir(),
    reason="no node, or no node_modules: tests/run installs both (Debian: nodejs and npm)")


def needs(tool, package):
    """Skips the test where a program of Debian's is not installed."""
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed (Debian: {package})")
