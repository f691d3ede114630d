"""Ollama's own command line through the proxy: with OLLAMA_AUTH=1 it signs each request with the key of its device.

Drop-in and under the base path, in front of the simulator or the real Ollama as the rest of the suite. The command is the one that
install-ollama built, or an installed one; without either these tests are skipped.
"""
import re
import shutil
import subprocess
import time
import uuid
from pathlib import Path

import pytest

import stack
from conftest import POLICY

COMMAND_S = 120


def ollama_command():
    if folder := stack.real_ollama_folder():
        return str(folder / "bin/ollama")
    return shutil.which("ollama") or pytest.skip("there is no ollama; tests/real/tiny-ollama/install-ollama builds one")


class Device:
    """A home folder with a key, as `ollama serve` or ssh-keygen makes it."""

    def __init__(self, home):
        self.home = Path(home)
        (self.home / ".ollama").mkdir(parents=True)
        self.key = self.home / ".ollama/id_ed25519"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "me@laptop", "-f", self.key], check=True)
        self.line = self.key.with_suffix(".pub").read_text().strip()
        shown = subprocess.run(["ssh-keygen", "-l", "-f", self.key], check=True, capture_output=True, text=True)
        self.fingerprint = re.search(r"SHA256:\S+", shown.stdout)[0]

    def run(self, host, *words, **environment):
        environment = {"OLLAMA_AUTH": "1"} | environment
        return subprocess.run([ollama_command(), *words], capture_output=True, text=True, timeout=COMMAND_S, stdin=subprocess.DEVNULL,
                              env=stack.clean_environment(HOME=self.home, OLLAMA_HOST=host, TERM="dumb", **environment))


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    stack.needs("ssh-keygen", "openssh-client")
    ollama_command()
    return Device(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def house(tmp_path_factory, backend, device):
    """A proxy to which the device's key was tied by the command line."""
    folder = tmp_path_factory.mktemp("proxy") / "p"
    proxy = stack.Proxy(folder, backend, POLICY)
    agent(proxy, "add", "ann", "--role", "internal", "--permission", "web:read", "--permission", "web:write")
    agent(proxy, "add-key", "ann", device.line)
    yield proxy
    proxy.stop()


def agent(proxy, *words):
    done = subprocess.run([stack.BINARY, "agent", *words], env=proxy.environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def finals_since(proxy, after, enough):
    """The final records behind the first `after` records, once they are `enough`: one is written when its client has all."""
    deadline = time.monotonic() + stack.RECORD_S
    while True:
        finals = [record for record in proxy.records()[after:] if record["extra"]["phase"] == "final"]
        if enough(finals):
            return finals
        assert time.monotonic() < deadline, [(record["action"], record["target"]) for record in finals]
        with proxy.program.news:
            proxy.program.news.wait(0.05)


def of_strangers(finals):
    """A record of an earlier test may come late, but that one is of a known device."""
    return [record for record in finals if record["agent_id"] is None]


ASKED = {("HEAD", "/"), ("GET", "/api/tags"), ("POST", "/api/show"), ("POST", "/api/generate"), ("GET", "/api/ps")}


@pytest.mark.parametrize("base", ["", "/api/v1/ollama"], ids=["drop-in", "base-path"])
def test_list_show_run_and_ps_work(house, device, base):
    host, before = house.origin + base, len(house.records())

    listed = device.run(host, "list")
    assert listed.returncode == 0, listed.stderr
    names = [line.split()[0] for line in listed.stdout.splitlines()[1:]]
    assert stack.CHAT + ":latest" in names
    assert not any(name.startswith(stack.FORBIDDEN) for name in names), "the policy's list"

    shown = device.run(host, "show", stack.CHAT)
    assert shown.returncode == 0 and "architecture" in shown.stdout, shown.stderr

    canary = "canary" + uuid.uuid4().hex
    said = device.run(host, "run", stack.CHAT, canary)
    assert said.returncode == 0 and said.stdout.strip(), said.stderr

    running = device.run(host, "ps")
    assert running.returncode == 0 and stack.CHAT in running.stdout, running.stderr

    finals = finals_since(house, before, lambda finals: {(record["action"], record["target"]) for record in finals} >= ASKED)
    assert {(record["agent_id"], record["session_id"]) for record in finals} == {("ann", device.fingerprint)}
    assert {record["response_code"] for record in finals} == {200}
    generated = [record for record in finals if record["target"] == "/api/generate"]
    assert generated and all(record["extra"]["output_tokens"] for record in generated)
    house.assert_kept_to_itself(canary)


def test_the_words_of_a_refusal_are_read_at_the_terminal(house, device):
    before = len(house.records())
    refused = device.run(house.origin, "run", stack.FORBIDDEN, "hi")
    finals_since(house, before, lambda finals: any(record["response_code"] == 403 for record in finals))
    assert refused.returncode != 0
    assert "this model is not approved here" in refused.stderr


@pytest.mark.parametrize("base", ["", "/api/v1/ollama"], ids=["drop-in", "base-path"])
def test_a_key_that_was_not_tied_is_refused_and_the_audit_says_why(house, tmp_path, base):
    stranger, before = Device(tmp_path), len(house.records())
    refused = stranger.run(house.origin + base, "list")
    assert refused.returncode != 0 and refused.stdout == ""
    # The command begins with HEAD, whose answer has no body: these are its own words for a 401.
    assert "something went wrong, please see the ollama server logs for details" in refused.stderr
    new = of_strangers(finals_since(house, before, of_strangers))
    assert [(record["action"], record["response_code"], record["error"]) for record in new] == [("HEAD", 401, "unknown_device")]


def test_a_command_that_does_not_sign_is_refused(house, device):
    before = len(house.records())
    refused = device.run(house.origin, "list", OLLAMA_AUTH="")
    assert refused.returncode != 0
    new = of_strangers(finals_since(house, before, of_strangers))
    assert [(record["response_code"], record["error"]) for record in new] == [(401, "missing_token")]


def test_a_key_that_is_taken_away_opens_nothing(house, tmp_path):
    other, before = Device(tmp_path), len(house.records())
    agent(house, "add-key", "ann", other.line)
    listed = other.run(house.origin, "list")
    assert listed.returncode == 0, listed.stderr
    agent(house, "remove-key", "ann", other.fingerprint)
    assert other.run(house.origin, "list").returncode != 0
    finals_since(house, before, lambda finals: any(record["error"] == "unknown_device" for record in finals))
