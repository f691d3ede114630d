"""A newcomer's first minute: nothing but the program and a home folder, then the seed page's first command as printed."""
import time

import pytest

import stack
import test_seed_page as seed


class Newcomer:
    """The proxy as somebody starts it who has read nothing: an empty home, and ports of its own for the test's sake."""

    def __init__(self, home, backend):
        home.mkdir()
        self.home = home
        self.environment = stack.clean_environment(HOME=home)
        for name in ("XDG_STATE_HOME", "STATE_DIRECTORY", "CONFIGURATION_DIRECTORY"):
            self.environment.pop(name, None)
        self.program = stack.Running([stack.BINARY, "serve", "--listen", "127.0.0.1:0", "--operator-listen", "127.0.0.1:0",
                                      "--backend", backend], self.environment)
        self.origin = self.program.wait_for(r"(?<!operator )listening on (http://127\.0\.0\.1:\d+)")[1]
        self.base = self.origin + "/api/v1/ollama"
        self.client_id, self.client_secret = stack.first_agent(self.program)

    def ask(self, **changed):
        body = {"client_id": self.client_id, "client_secret": self.client_secret, "grant_type": "client_credentials"}
        return stack.call(self.origin + "/api/v1/auth/token", {**body, **changed})


@pytest.fixture
def newcomer(tmp_path, backend):
    started = Newcomer(tmp_path / "home", backend)
    yield started
    started.program.stop()


def test_step_1_as_printed_and_as_a_form_gives_a_token_that_works(newcomer):
    as_form = seed.STEP_1.replace('-H "Content-Type: application/json"', "").replace(
        seed.STEP_1[seed.STEP_1.index("-d '"):seed.STEP_1.index("| jq")],
        '-d grant_type=client_credentials -d client_id=YOUR_CLIENT_ID --data-urlencode client_secret=YOUR_SECRET ')
    assert as_form != seed.STEP_1
    for command in (seed.STEP_1, as_form):
        token = seed.shell(newcomer, command).strip()
        assert token.count(".") == 2 and "\n" not in token
        assert stack.call(newcomer.base + "/api/tags", headers={"Authorization": f"Bearer {token}"}).status == 200
    state = newcomer.home / ".local/state/behavry-ollama-proxy"
    private = ("agents.toml", "signing-key.pem", "first-agent.secret")
    assert state.stat().st_mode & 0o777 == 0o700
    assert all((state / name).stat().st_mode & 0o777 == 0o600 for name in private)
    (state / "first-agent.secret").unlink()  # as its line says
    written = [path.read_bytes() for path in state.rglob("*") if path.is_file()]
    assert not any(newcomer.client_secret.encode() in text for text in written), "the secret is stored hashed"


def test_every_answer_of_the_token_endpoint_has_its_members(newcomer):
    granted = newcomer.ask()
    assert granted.status == 200 and granted.headers["cache-control"] == "no-store"
    token = granted.json
    assert set(token) == {"access_token", "token_type", "expires_in", "agent_id", "risk_tier"}
    assert (token["token_type"], token["expires_in"], token["agent_id"]) == ("Bearer", 3600, newcomer.client_id)

    wrong_secret, wrong_id = newcomer.ask(client_secret="wrong"), newcomer.ask(client_id="nobody")
    both_wrong = newcomer.ask(client_id="nobody", client_secret="wrong")
    assert wrong_secret.body == wrong_id.body == both_wrong.body, "the same words for all"
    another_grant, no_id = newcomer.ask(grant_type="password"), newcomer.ask(client_id=None)
    for reply, status, error in [(wrong_secret, 401, "invalid_client"), (wrong_id, 401, "invalid_client"),
                                 (another_grant, 400, "unsupported_grant_type"), (no_id, 400, "invalid_request")]:
        assert (reply.status, reply.json["error"]) == (status, error)
        assert isinstance(reply.json["detail"], str) and reply.json["detail"]
        assert reply.headers["cache-control"] == "no-store" and reply.headers["content-type"].startswith("application/json")
        assert (reply.headers["www-authenticate"] == "Bearer") == (status == 401)

    agents = newcomer.home / ".local/state/behavry-ollama-proxy/agents.toml"
    suspended = agents.with_name("new")
    suspended.write_text(agents.read_text().replace('state = "active"', 'state = "suspended"'))
    suspended.chmod(0o600)
    suspended.rename(agents)
    deadline = time.monotonic() + stack.START_S
    while (refused := newcomer.ask()).status == 200:
        assert time.monotonic() < deadline, "the change was not taken"
        with newcomer.program.news:
            newcomer.program.news.wait(0.2)
    assert (refused.status, refused.json["error"]) == (403, "unauthorized_client") and refused.json["detail"]
    assert refused.headers["cache-control"] == "no-store"
    assert newcomer.ask(client_secret="wrong").body == wrong_secret.body, "only who has the secret learns of it"
