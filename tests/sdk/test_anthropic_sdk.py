"""anthropic-python through the proxy: identity from either header, usage from the end of the stream, refusals in its own words."""
import anthropic
import pytest

import stack

HELLO = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(params=["x-api-key", "bearer"])
def client(request, proxy, request_id):
    """The client as `ANTHROPIC_API_KEY` sets it up, and as `ANTHROPIC_AUTH_TOKEN` does."""
    identity = {"api_key": proxy.token} if request.param == "x-api-key" else {"auth_token": proxy.token}
    with anthropic.Anthropic(base_url=proxy.base, max_retries=0, timeout=120, default_headers={"x-request-id": request_id},
                             **identity) as made:
        yield made


def assert_recorded(exchange, message, *, stream):
    extra = exchange.final["extra"]
    assert (exchange.final["policy_result"], exchange.final["response_code"]) == ("allow", 200)
    assert (extra["dialect"], extra["model"], extra["stream"], extra["outcome"]) == ("anthropic", stack.CHAT, stream, "complete")
    assert (extra["input_tokens"], extra["output_tokens"]) == (message.usage.input_tokens, message.usage.output_tokens)
    assert extra["finish_reason"] == message.stop_reason


def test_a_message_is_answered_and_recorded(proxy, client, request_id, canary):
    message = client.messages.create(model=stack.CHAT, max_tokens=64, system=canary, messages=HELLO)
    assert message.content[0].text
    exchange = proxy.exchange(request_id)
    assert_recorded(exchange, message, stream=False)
    assert exchange.final["extra"]["has_system_prompt"] and exchange.final["extra"]["message_count"] == 1
    proxy.assert_kept_to_itself(canary)


def test_a_streamed_message_is_put_together_by_the_helper_and_counted_from_its_end(proxy, client, request_id):
    with client.messages.stream(model=stack.CHAT, max_tokens=64, messages=HELLO) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert text and message.content[0].text == text
    assert_recorded(proxy.exchange(request_id), message, stream=True)


def test_a_tool_that_a_client_reads_out_of_the_environment_works(proxy, request_id, monkeypatch):
    monkeypatch.setenv("ANTHROPIC_BASE_URL", proxy.origin)
    monkeypatch.setenv("ANTHROPIC_API_KEY", proxy.token)
    monkeypatch.delenv("ANTHROPIC_AUTH_TOKEN", raising=False)
    with anthropic.Anthropic(max_retries=0, timeout=120, default_headers={"x-request-id": request_id}) as client:
        assert client.messages.create(model=stack.CHAT, max_tokens=8, messages=HELLO).usage.output_tokens > 0
    assert proxy.exchange(request_id).final["extra"]["dialect"] == "anthropic"


def test_a_web_tool_is_cut_and_the_answer_comes(proxy, client, request_id):
    tools = [{"type": "web_search_20250305", "name": "web_search"}]
    message = client.messages.create(model=stack.CHAT, max_tokens=16, messages=HELLO, tools=tools)
    assert message.content[0].text
    extra = proxy.exchange(request_id).final["extra"]
    assert (extra["filters"], extra["has_tools"]) == (["web_tools"], False)


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_is_the_error_that_the_client_knows(proxy, client, request_id, stream):
    with pytest.raises(anthropic.PermissionDeniedError) as caught:
        client.messages.create(model=stack.FORBIDDEN, max_tokens=8, messages=HELLO, stream=stream)
    body = caught.value.body
    assert (body["type"], body["error"]["type"], body["request_id"]) == ("error", "permission_error", request_id)
    assert "not approved" in body["error"]["message"]
    assert proxy.exchange(request_id).final["policy_result"] == "deny"


def test_a_wrong_key_and_a_missing_model_have_their_own_errors(proxy, client, request_id):
    with anthropic.Anthropic(base_url=proxy.base, api_key="nonsense", max_retries=0) as stranger:
        with pytest.raises(anthropic.AuthenticationError):
            stranger.messages.create(model=stack.CHAT, max_tokens=8, messages=HELLO)
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model=stack.ABSENT, max_tokens=8, messages=HELLO)
    assert proxy.exchange(request_id).final["response_code"] == 404
