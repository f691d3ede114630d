"""Refusals as the official clients see them: the right exception, the right words, one final record, nothing forwarded."""
import ollama
import openai
import pytest

import stack

HELLO = [{"role": "user", "content": "Hello!"}]


def ask_ollama(proxy, token, request_id, model=stack.CHAT, stream=False):
    """The error that ollama-python raises."""
    head = {"x-request-id": request_id} | ({"Authorization": f"Bearer {token}"} if token else {})
    client = ollama.Client(host=proxy.base, headers=head, timeout=60)
    with pytest.raises(ollama.ResponseError) as caught:
        list(client.chat(model=model, messages=HELLO, stream=stream))
    return caught.value


def ask_openai(proxy, token, request_id, error, model=stack.CHAT, stream=False):
    """The error that openai-python raises, which must be an `error`."""
    with openai.OpenAI(base_url=proxy.base + "/v1", api_key=token, max_retries=0, timeout=60,
                       default_headers={"x-request-id": request_id}) as client:
        with pytest.raises(error) as caught:
            list(client.chat.completions.create(model=model, messages=HELLO, stream=stream))
    return caught.value


def assert_refused(proxy, request_id, status, result="deny"):
    exchange = proxy.exchange(request_id)
    assert (exchange.final["response_code"], exchange.final["policy_result"]) == (status, result)
    assert exchange.stream_starts == []
    return exchange.final


@pytest.mark.parametrize("stream", [False, True])
def test_an_expired_token_is_refused_with_the_remedy(proxy, request_id, stream):
    stack.needs("openssl", "openssl")
    token = proxy.expired_token()
    native = ask_ollama(proxy, token, request_id + "-n", stream=stream)
    assert native.status_code == 401 and "token" in native.error.lower()
    styled = ask_openai(proxy, token, request_id + "-o", openai.AuthenticationError, stream=stream)
    assert styled.code == "invalid_token" and "token" in styled.message.lower()
    for name in ("-n", "-o"):
        final = assert_refused(proxy, request_id + name, 401)
        assert final["policy_id"] is None and final["error"], "the cause is in the audit"
    proxy.assert_kept_to_itself(token.rsplit(".", 1)[1])


def test_a_request_without_a_token_is_refused(proxy, request_id):
    assert ask_ollama(proxy, None, request_id).status_code == 401
    assert assert_refused(proxy, request_id, 401)["agent_id"] is None


def test_a_token_of_nonsense_is_refused_in_the_same_words_as_an_expired_one(proxy, request_id):
    stack.needs("openssl", "openssl")
    expired = ask_openai(proxy, proxy.expired_token(), request_id + "-e", openai.AuthenticationError)
    nonsense = ask_openai(proxy, "eyJhbGciOi.nonsense.nonsense", request_id + "-g", openai.AuthenticationError)
    assert expired.message == nonsense.message


@pytest.mark.parametrize("stream", [False, True])
def test_a_denied_model_is_refused_with_the_policys_reason(proxy, request_id, stream):
    reason = "this model is not approved here"
    native = ask_ollama(proxy, proxy.token, request_id + "-n", model=stack.FORBIDDEN, stream=stream)
    assert native.status_code == 403 and reason in native.error
    styled = ask_openai(proxy, proxy.token, request_id + "-o", openai.PermissionDeniedError, model=stack.FORBIDDEN,
                        stream=stream)
    assert styled.code == "policy_denied" and reason in styled.message
    assert styled.response.headers["x-should-retry"] == "false"
    for name in ("-n", "-o"):
        final = assert_refused(proxy, request_id + name, 403)
        assert reason in final["policy_reason"] and final["extra"]["model"] == stack.FORBIDDEN
        assert final["extra"]["upstream_status"] is None


def test_a_missing_permission_is_named(proxy, request_id):
    reader = proxy.mint(permissions=("web:read",))
    refused = ask_ollama(proxy, reader, request_id)
    assert refused.status_code == 403 and "web:write" in refused.error
    assert_refused(proxy, request_id, 403)


@pytest.mark.parametrize("stream", [False, True])
def test_a_backend_that_is_down_is_named(proxy_without_backend, request_id, stream):
    """S0: 502 -- "Cannot reach Ollama ... Is it running?"."""
    proxy = proxy_without_backend
    words = f"Cannot reach Ollama at {proxy.backend_url}. Is it running?"
    native = ask_ollama(proxy, proxy.token, request_id + "-n", stream=stream)
    assert native.status_code == 502 and words in native.error
    styled = ask_openai(proxy, proxy.token, request_id + "-o", openai.InternalServerError, stream=stream)
    assert styled.status_code == 502 and styled.code == "backend_unreachable" and words in styled.message
    for name in ("-n", "-o"):
        final = assert_refused(proxy, request_id + name, 502, result="allow")
        assert final["extra"]["upstream_status"] is None and final["extra"]["output_tokens"] is None


def test_every_reply_has_the_request_id_it_was_asked_with(proxy, request_id):
    refused = stack.call(proxy.base + "/api/chat", {"model": stack.CHAT}, {"x-request-id": request_id})
    assert (refused.status, refused.headers["x-request-id"]) == (401, request_id)
    assert refused.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize("path", ["/metrics", "/readyz", "/api/v1/ollama/metrics", "/api/v1/ollama/api/nothing"])
def test_what_is_not_in_the_table_is_not_there(proxy, request_id, path):
    reply = stack.call(proxy.origin + path, headers={"Authorization": f"Bearer {proxy.token}", "x-request-id": request_id})
    assert reply.status == 404 and reply.json["code"] == "unknown_route"
    assert_refused(proxy, request_id, 404)
