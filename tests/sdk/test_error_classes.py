"""Each refusal as the official clients raise it: the class that a program catches, in the client's own shape; and what they send again."""
import os
import re
import threading
import time

import anthropic
import ollama
import openai
import pytest

import stack

pytestmark = pytest.mark.skipif("BEHAVRY_TEST_REAL_OLLAMA" in os.environ, reason="these are the proxy's own words, whatever Ollama")

HELLO = [{"role": "user", "content": "Hello!"}]
POLICY = f"""package behavry.authz
deny contains "this model is not approved here" if input.model == "{stack.FORBIDDEN}"
escalate if input.model == "{stack.ABSENT}"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("errors")


def started(folder, name, config, *flags, environment=()):
    """A proxy with a configuration of its own, in front of a simulator of its own."""
    program, url = stack.simulator("--tokens-per-second", "0", *flags)
    (folder / f"{name}.toml").write_text("[audit]\nrefusals_per_second = 1000\n" + config)
    proxy = stack.Proxy(folder / name, url, POLICY, BEHAVRY_CONFIG=folder / f"{name}.toml", **dict(environment))
    return proxy, [proxy, program]


@pytest.fixture(scope="module")
def refusing(folder):
    """A proxy that takes little, and one that waits for nothing."""
    proxy, running = started(folder, "small", "[limits]\nbody_bytes = 20000\n")
    impatient, more = started(folder, "impatient", "[backend_timeouts]\nsilence_s = 1\n")
    port = stack.DeadPort()
    alone = stack.Proxy(folder / "alone", port.url, POLICY)
    yield {"small": proxy, "impatient": impatient, "alone": alone}
    for program in [*running, *more, alone]:
        program.stop()
    port.socket.close()


def case(status, code, *, model=stack.CHAT, where="small", token=None, body=None, head=None, text="Hello!"):
    return pytest.param((status, code, model, where, token, body or {}, head or {}, text), id=code)


CASES = [
    case(400, "ambiguous_body", body={"MODEL": "other"}),
    case(400, "invalid_body", body={"messages": 7}),
    case(401, "invalid_token", token="nonsense"),
    case(403, "policy_denied", model=stack.FORBIDDEN),
    case(403, "policy_escalated", model=stack.ABSENT),
    case(403, "insufficient_scope", token=("web:read",)),
    case(403, "egress_denied", model="gpt-oss:120b-cloud"),
    case(413, "body_too_large", text="a" * 30_000),
    case(415, "unsupported_encoding", head={"content-encoding": "br"}),
    case(502, "bad_backend_reply", model="fault-html"),
    case(502, "backend_unreachable", where="alone"),
    case(504, "backend_timeout", model="fault-hangs-before-headers", where="impatient"),
]
OPENAI = {400: openai.BadRequestError, 401: openai.AuthenticationError, 403: openai.PermissionDeniedError,
          413: openai.APIStatusError, 415: openai.APIStatusError, 502: openai.InternalServerError, 504: openai.InternalServerError}
ANTHROPIC = {400: anthropic.BadRequestError, 401: anthropic.AuthenticationError, 403: anthropic.PermissionDeniedError,
             413: anthropic.APIStatusError, 415: anthropic.APIStatusError, 502: anthropic.InternalServerError,
             504: anthropic.InternalServerError}
TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 413: "request_too_large",
         415: "invalid_request_error", 502: "api_error", 504: "timeout_error"}


def asked(refusing, what):
    _, _, model, where, token, _, _, text = what
    proxy = refusing[where]
    if isinstance(token, tuple):
        token = proxy.mint(permissions=token)
    return proxy, token or proxy.token, model, [{"role": "user", "content": text}]


def assert_refused_once(proxy, request_id, status):
    finals = [record for record in proxy.exchange(request_id).records if record["extra"]["phase"] == "final"]
    assert [final["response_code"] for final in finals] == [status]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", CASES)
def test_openai_raises_its_own_class_for_each_refusal(refusing, request_id, what, stream):
    status, code, _, _, _, body, head, _ = what
    proxy, token, model, messages = asked(refusing, what)
    with openai.OpenAI(base_url=proxy.base + "/v1", api_key=token, max_retries=0, timeout=60,
                       default_headers={"x-request-id": request_id}) as client:
        with pytest.raises(OPENAI[status]) as caught:
            client.chat.completions.create(model=model, messages=messages, stream=stream, extra_body=body, extra_headers=head)
    error = caught.value
    assert (error.status_code, error.code, error.request_id) == (status, code, request_id)
    assert error.type and error.message and set(error.body) == {"message", "type", "param", "code"}
    assert_refused_once(proxy, request_id, status)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", CASES)
def test_anthropic_raises_its_own_class_for_each_refusal(refusing, request_id, what, stream):
    status, _, _, _, _, body, head, _ = what
    proxy, token, model, messages = asked(refusing, what)
    with anthropic.Anthropic(base_url=proxy.base, api_key=token, max_retries=0, timeout=60,
                             default_headers={"x-request-id": request_id}) as client:
        with pytest.raises(ANTHROPIC[status]) as caught:
            client.messages.create(model=model, max_tokens=8, messages=messages, stream=stream, extra_body=body, extra_headers=head)
    error = caught.value
    assert (error.status_code, error.body["type"], error.body["error"]["type"]) == (status, "error", TYPES[status])
    assert error.body["error"]["message"] and error.body["request_id"] == request_id
    assert_refused_once(proxy, request_id, status)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", [one for one in CASES if not one.values[0][5]])
def test_ollama_raises_its_error_with_the_words_of_each_refusal(refusing, request_id, what, stream):
    status, _, _, _, _, _, head, _ = what
    proxy, token, model, messages = asked(refusing, what)
    client = ollama.Client(host=proxy.base, timeout=60,
                           headers={"Authorization": f"Bearer {token}", "x-request-id": request_id, **head})
    with pytest.raises(ollama.ResponseError) as caught:
        list(client.chat(model=model, messages=messages, stream=stream))
    assert caught.value.status_code == status and len(caught.value.error) > 20 and not caught.value.error.startswith("{")
    assert_refused_once(proxy, request_id, status)


# What is worth another try and what is not.

class Holder:
    """One stream of an endless answer, which takes the only place as soon as nobody else has it."""

    def __init__(self, proxy):
        client = ollama.Client(host=proxy.base, headers={"Authorization": f"Bearer {proxy.token}"}, timeout=60)
        deadline = time.monotonic() + 60
        while True:
            self.stream = client.chat(model="tiny-slow", messages=HELLO, stream=True)
            try:
                next(self.stream)
                return
            except ollama.ResponseError as refused:
                assert refused.status_code == 503 and time.monotonic() < deadline

    def leave(self):
        self.stream.close()


@pytest.fixture(scope="module")
def busy(folder):
    """A proxy that serves one request at a time, and one of whose callers one request may wait."""
    one, running = started(folder, "one", "[limits]\nin_flight = 1\n", "--models", "tiny-slow")
    none, more = started(folder, "none", "[queue]\nagent_waiting = 1\n", "--models", "tiny-slow")
    yield {503: one, 429: none}
    for program in [*running, *more]:
        program.stop()


def finals(proxy, request_id):
    records = [record for record in proxy.records() if record["extra"].get("request_id") == request_id]
    return [record["response_code"] for record in records if record["extra"]["phase"] == "final"]


def finals_once(proxy, request_id, enough):
    """The statuses, as soon as they are `enough`."""
    deadline = time.monotonic() + 60
    while not enough(found := finals(proxy, request_id)):
        assert time.monotonic() < deadline, f"{found} only"
        with proxy.program.news:
            proxy.program.news.wait(0.05)
    return found


@pytest.fixture(params=["openai", "anthropic"])
def send(request):
    """One request by a client that may try so often again."""
    def send(proxy, request_id, retries):
        head = {"x-request-id": request_id}
        if request.param == "openai":
            with openai.OpenAI(base_url=proxy.base + "/v1", api_key=proxy.token, max_retries=retries, timeout=60, default_headers=head) as client:
                reply = client.chat.completions.create(model="tiny-slow", max_tokens=1, messages=HELLO)
                return reply.choices[0].message.content
        with anthropic.Anthropic(base_url=proxy.base, api_key=proxy.token, max_retries=retries, timeout=60, default_headers=head) as client:
            return client.messages.create(model="tiny-slow", max_tokens=1, messages=HELLO).content[0].text
    return send


def wait_behind(proxy):
    """One request that is served when the place is free."""
    body = {"model": "tiny-slow", "stream": False, "messages": HELLO, "options": {"num_predict": 1}}
    stack.call(proxy.base + "/api/chat", body, {"Authorization": f"Bearer {proxy.token}"}, within_s=120)


def wait_for_waiter(proxy):
    deadline = time.monotonic() + 60
    while not re.search(rb"(?m)^behavry_ollama_queue_waiting_requests\{.*\} 1$", stack.call(proxy.operator + "/metrics").body):
        assert time.monotonic() < deadline, "nobody waits"
        with proxy.program.news:
            proxy.program.news.wait(0.05)


def test_what_is_full_is_tried_again_after_a_while_and_each_try_is_a_request(busy, send, request_id):
    for status, error in [(429, (openai.RateLimitError, anthropic.RateLimitError)),
                          (503, (openai.InternalServerError, anthropic.InternalServerError))]:
        proxy, name = busy[status], f"{request_id}-{status}"
        holder = Holder(proxy)
        waiter = threading.Thread(target=wait_behind, args=[proxy]) if status == 429 else None
        try:
            if waiter:
                waiter.start()
                wait_for_waiter(proxy)
            with pytest.raises(error) as caught:
                send(proxy, name, 1)
        finally:
            holder.leave()
            if waiter:
                waiter.join(60)
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
        assert finals_once(proxy, name, lambda found: len(found) > 1) == [status, status]


def test_what_becomes_free_meanwhile_is_served_at_a_later_try(busy, send, request_id):
    proxy, answers = busy[503], []
    holder = Holder(proxy)
    sending = threading.Thread(target=lambda: answers.append(send(proxy, request_id, 20)))
    try:
        sending.start()
        finals_once(proxy, request_id, len)
    finally:
        holder.leave()
    sending.join(120)
    assert answers and answers[0]
    codes = finals_once(proxy, request_id, lambda found: 200 in found)
    assert codes.count(200) == 1 and set(codes) == {200, 503}


@pytest.mark.parametrize("status, ask", [
    (400, lambda client: client.responses.create(model=stack.CHAT, input="hi", previous_response_id="resp_1")),
    (401, lambda client: client.with_options(api_key="nonsense").models.list()),
    (403, lambda client: client.chat.completions.create(model=stack.FORBIDDEN, messages=HELLO)),
    (404, lambda client: client.get("/nothing", cast_to=object)),
    (405, lambda client: client.get("/chat/completions", cast_to=object)),
    (415, lambda client: client.chat.completions.create(model=stack.CHAT, messages=HELLO, extra_headers={"content-encoding": "br"})),
])
def test_what_will_not_change_is_not_sent_again(refusing, request_id, status, ask):
    proxy = refusing["small"]
    with openai.OpenAI(base_url=proxy.base + "/v1", api_key=proxy.token, max_retries=5, timeout=60,
                       default_headers={"x-request-id": request_id}) as client:
        with pytest.raises(openai.APIStatusError) as caught:
            ask(client)
    assert caught.value.status_code == status
    assert_refused_once(proxy, request_id, status)


def test_what_took_a_time_out_is_not_sent_again(refusing, request_id):
    proxy = refusing["impatient"]
    with openai.OpenAI(base_url=proxy.base + "/v1", api_key=proxy.token, max_retries=5, timeout=60,
                       default_headers={"x-request-id": request_id}) as client:
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="fault-hangs-before-headers", messages=HELLO)
    assert_refused_once(proxy, request_id, 504)
