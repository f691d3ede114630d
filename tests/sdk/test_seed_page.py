"""Behavry's page "Ollama API Proxy" followed line by line, as printed there; only host, port and credentials are filled in."""
import http.server
import json
import subprocess
import sys
import threading

import pytest

import stack

STEP_1 = r"""
curl -s -X POST http://localhost:8000/api/v1/auth/token \
-H "Content-Type: application/json" \
-d '{"client_id": "YOUR_CLIENT_ID", "client_secret": "YOUR_SECRET", "grant_type": "client_credentials"}' \
| jq -r .access_token
"""

OLLAMA_SDK = """
from ollama import Client

BEHAVRY_JWT = "eyJhbGci..." # Behavry agent token

client = Client(
host="http://localhost:8000/api/v1/ollama",
headers={"Authorization": f"Bearer {BEHAVRY_JWT}"},
)

response = client.chat(
model="llama3.2",
messages=[{"role": "user", "content": "Hello!"}],
)
print(response["message"]["content"])
"""

OPENAI_SDK = """
from openai import OpenAI

BEHAVRY_JWT = "eyJhbGci..."

client = OpenAI(
base_url="http://localhost:8000/api/v1/ollama/v1",
api_key=BEHAVRY_JWT, # used as Bearer token
)

response = client.chat.completions.create(
model="llama3.2",
messages=[{"role": "user", "content": "Hello!"}],
)
print(response.choices[0].message.content)
"""

CURL_NATIVE = r"""
curl -X POST "http://localhost:8000/api/v1/ollama/api/chat" \
-H "Authorization: Bearer $BEHAVRY_JWT" \
-H "Content-Type: application/json" \
-d '{
"model": "llama3.2",
"messages": [{"role": "user", "content": "Hello!"}],
"stream": false
}'
"""

CURL_OPENAI = r"""
curl -X POST "http://localhost:8000/api/v1/ollama/v1/chat/completions" \
-H "Authorization: Bearer $BEHAVRY_JWT" \
-H "Content-Type: application/json" \
-d '{
"model": "llama3.2",
"messages": [{"role": "user", "content": "Hello!"}]
}'
"""

POLICY = """package behavry.authz

# Only allow approved local models
deny if {
input.mcp_server == "ollama-proxy"
approved_models := {"llama3.2", "codellama", "mistral"}
not approved_models[input.model]
}

# Block local model usage for external-facing agents
deny if {
input.mcp_server == "ollama-proxy"
input.agent_role == "external"
}
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory, backend):
    """The proxy as a newcomer starts it: no policy of his own, the first start's agent, its secret in a file of its own."""
    running = stack.Proxy(tmp_path_factory.mktemp("page") / "p", backend)
    running.client_id, running.client_secret = stack.first_agent(running.program)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def jwt(page):
    """Step 1."""
    token = shell(page, STEP_1).strip()
    assert token.count(".") == 2 and "\n" not in token
    return token


def filled_in(page, text, jwt=""):
    text = text.replace("http://localhost:8000", page.origin.replace("127.0.0.1", "localhost"))
    return (text.replace("YOUR_CLIENT_ID", page.client_id).replace("YOUR_SECRET", page.client_secret)
            .replace("eyJhbGci...", jwt))


def shell(page, text, jwt=""):
    environment = stack.clean_environment(BEHAVRY_JWT=jwt)
    done = subprocess.run(["bash", "-c", "set -o pipefail\n" + filled_in(page, text)], env=environment,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def python(page, text, jwt):
    done = subprocess.run([sys.executable, "-c", filled_in(page, text, jwt)], env=stack.clean_environment(),
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_step_1_gives_a_token_with_behavrys_claims(page, jwt):
    claims = json.loads(stack.unpadded(jwt.split(".")[1]))
    assert claims["sub"] and claims["jti"] and claims["iss"] == "behavry"
    assert claims["exp"] - claims["iat"] == 3600 and {"web:read", "web:write"} <= set(claims["permissions"])


def test_a_wrong_secret_is_refused(page):
    body = {"client_id": page.client_id, "client_secret": "wrong", "grant_type": "client_credentials"}
    refused = stack.call(page.origin + "/api/v1/auth/token", body)
    assert refused.status == 401 and refused.json["error"] == "invalid_client" and refused.json["detail"]


def test_the_ollama_sdk_as_printed(page, jwt):
    assert python(page, OLLAMA_SDK, jwt).strip()


def test_the_openai_sdk_as_printed(page, jwt):
    assert python(page, OPENAI_SDK, jwt).strip()


def test_curl_to_the_native_api_as_printed(page, jwt):
    reply = json.loads(shell(page, CURL_NATIVE, jwt))
    assert reply["done"] and reply["message"]["content"]
    assert reply["prompt_eval_count"] > 0 and reply["eval_count"] > 0


def test_curl_to_the_openai_api_as_printed(page, jwt):
    reply = json.loads(shell(page, CURL_OPENAI, jwt))
    assert reply["choices"][0]["message"]["content"] and reply["usage"]["completion_tokens"] > 0


def test_step_3_the_event_has_what_the_page_says(page, jwt, request_id):
    head = {"Authorization": f"Bearer {jwt}", "x-request-id": request_id}
    body = {"model": "llama3.2", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "Hello!"}],
            "stream": False}
    reply = stack.call(page.base + "/api/chat", body, head).json
    final = page.exchange(request_id).final
    assert (final["tool_name"], final["mcp_server"], final["action"], final["policy_result"]) == (
        "ollama-api", "ollama-proxy", "POST", "allow")
    audited = {name: final["extra"][name] for name in (
        "model", "has_system_prompt", "has_tools", "message_count", "input_tokens", "output_tokens", "finish_reason")}
    assert audited == {
        "model": "llama3.2", "has_system_prompt": True, "has_tools": False, "message_count": 2,
        "input_tokens": reply["prompt_eval_count"], "output_tokens": reply["eval_count"],
        "finish_reason": reply["done_reason"]}
    page.assert_kept_to_itself(reply["message"]["content"], jwt.rsplit(".", 1)[1])


@pytest.mark.parametrize(("method", "path", "body"), [
    ("POST", "/api/chat", {"model": "llama3.2", "messages": [{"role": "user", "content": "Hello!"}]}),
    ("POST", "/api/generate", {"model": "llama3.2", "prompt": "Hello!"}),
    ("GET", "/api/tags", None),
    ("POST", "/v1/chat/completions", {"model": "llama3.2", "messages": [{"role": "user", "content": "Hello!"}]}),
    ("GET", "/v1/models", None),
])
def test_every_row_of_the_endpoint_table(page, jwt, method, path, body):
    reply = stack.call(page.base + path, body, {"Authorization": f"Bearer {jwt}"}, method)
    assert reply.status == 200 and len(reply.body) > 2


def test_a_native_stream_is_newline_delimited_json(page, jwt, request_id):
    head = {"Authorization": f"Bearer {jwt}", "x-request-id": request_id}
    body = {"model": "llama3.2", "messages": [{"role": "user", "content": "Hello!"}]}
    reply = stack.call(page.base + "/api/chat", body, head)
    assert reply.headers["content-type"].startswith("application/x-ndjson")
    records = [json.loads(line) for line in reply.body.splitlines()]
    assert len(records) > 3 and records[-1]["done"]
    starts = page.exchange(request_id).stream_starts
    assert [start["extra"]["upstream_status"] for start in starts] == [200]


def test_the_model_that_is_not_pulled_is_ollamas_404(page, jwt):
    body = {"model": stack.ABSENT, "messages": [{"role": "user", "content": "Hello!"}]}
    reply = stack.call(page.base + "/api/chat", body, {"Authorization": f"Bearer {jwt}"})
    assert reply.status == 404 and "not found" in reply.json["error"]


class Recorder(http.server.BaseHTTPRequestHandler):
    """A backend that remembers what reached it."""

    seen = []

    def do_GET(self):
        self.seen.append((self.path, dict(self.headers)))
        reply = b'{"models":[]}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        pass


def test_query_parameters_are_forwarded_as_they_are_and_the_token_is_not(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    proxy = stack.Proxy(tmp_path / "p", "http://127.0.0.1:%d" % server.server_port)
    try:
        query = "?a=1&b=%20x&a=2&empty="
        assert stack.call(proxy.base + "/api/tags" + query, headers={"Authorization": f"Bearer {proxy.token}"}).status == 200
        path, headers = next(entry for entry in Recorder.seen if "?" in entry[0])
        assert path == "/api/tags" + query
        assert proxy.token not in str(headers), "Ollama must never see the token"
    finally:
        proxy.stop()
        server.shutdown()


def test_the_pages_policy_means_what_its_author_meant(tmp_path, backend, request_id):
    proxy = stack.Proxy(tmp_path / "p", backend, POLICY)
    try:
        def ask(model, token):
            body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}], "stream": False}
            return stack.call(proxy.base + "/api/chat", body, {"Authorization": f"Bearer {token}"})

        external = proxy.mint(role="external")
        assert ask("llama3.2", proxy.token).status == 200
        assert ask("llama3.2:latest", proxy.token).status == 200
        refused = ask(stack.FORBIDDEN, proxy.token)
        assert (refused.status, refused.json["code"]) == (403, "policy_denied")
        assert ask("llama3.2", external).status == 403
        tags = stack.call(proxy.base + "/api/tags", headers={"Authorization": f"Bearer {proxy.token}"})
        shown = {model["model"].removesuffix(":latest") for model in tags.json["models"]}
        assert shown == {"llama3.2", "codellama", "mistral"}
    finally:
        proxy.stop()
