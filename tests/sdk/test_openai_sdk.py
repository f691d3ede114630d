"""openai-python through the proxy: what the client gets, and what the records say of it."""
import pytest

import stack

HELLO = [{"role": "user", "content": "Hello!"}]


def assert_recorded(exchange, usage, *, model=stack.CHAT, stream, reason):
    extra = exchange.final["extra"]
    assert (exchange.final["policy_result"], exchange.final["response_code"]) == ("allow", 200)
    assert (extra["dialect"], extra["model"], extra["stream"], extra["outcome"]) == ("openai", model, stream, "complete")
    assert (extra["input_tokens"], extra["output_tokens"]) == usage
    assert extra["finish_reason"] == reason
    assert [start["extra"]["upstream_status"] for start in exchange.stream_starts] == ([200] if stream else [])


@pytest.fixture
def counts(backend):
    """What the backend counts for HELLO on a route, asked directly: (input, output, reason)."""
    def ask(path, body):
        reply = stack.call(backend + path, body).json
        usage = reply["usage"]
        return (usage["prompt_tokens"], usage["completion_tokens"]), reply["choices"][0]["finish_reason"]
    return ask


def test_a_chat_is_answered_and_recorded(proxy, openai_client, request_id, canary):
    messages = [{"role": "developer", "content": canary}, *HELLO]
    reply = openai_client.chat.completions.create(model=stack.CHAT, messages=messages)
    choice = reply.choices[0]
    assert choice.message.content
    usage = (reply.usage.prompt_tokens, reply.usage.completion_tokens)
    exchange = proxy.exchange(request_id)
    assert_recorded(exchange, usage, stream=False, reason=choice.finish_reason)
    assert exchange.final["extra"]["has_system_prompt"] and exchange.final["extra"]["message_count"] == 2
    proxy.assert_kept_to_itself(canary, choice.message.content)


def test_a_stream_whose_client_asked_for_no_usage_gets_none_and_is_counted_all_the_same(
        proxy, openai_client, request_id, counts):
    chunks = list(openai_client.chat.completions.create(model=stack.CHAT, messages=HELLO, stream=True))
    assert len(chunks) > 3 and all(chunk.choices for chunk in chunks), "a chunk without choices is the usage chunk"
    assert not any(chunk.usage for chunk in chunks)
    reason = next(chunk.choices[0].finish_reason for chunk in reversed(chunks) if chunk.choices[0].finish_reason)
    usage, _ = counts("/v1/chat/completions", {"model": stack.CHAT, "messages": HELLO})
    assert_recorded(proxy.exchange(request_id), usage, stream=True, reason=reason)


def test_a_stream_whose_client_asked_for_usage_gets_it_once(proxy, openai_client, request_id):
    chunks = list(openai_client.chat.completions.create(
        model=stack.CHAT, messages=HELLO, stream=True, stream_options={"include_usage": True}))
    counted = [chunk for chunk in chunks if not chunk.choices]
    assert len(counted) == 1 and counted[0] is chunks[-1]
    usage = (counted[0].usage.prompt_tokens, counted[0].usage.completion_tokens)
    reason = next(chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason)
    assert_recorded(proxy.exchange(request_id), usage, stream=True, reason=reason)


def test_a_completion_is_answered_and_recorded(proxy, openai_client, request_id, canary):
    reply = openai_client.completions.create(model=stack.CHAT, prompt=canary)
    assert reply.choices[0].text
    usage = (reply.usage.prompt_tokens, reply.usage.completion_tokens)
    exchange = proxy.exchange(request_id)
    assert_recorded(exchange, usage, stream=False, reason=reply.choices[0].finish_reason)
    assert exchange.final["extra"]["message_count"] == 1
    proxy.assert_kept_to_itself(canary)


@pytest.mark.parametrize("asked", [False, True])
def test_a_streamed_completion_shows_usage_only_where_it_was_asked_for(proxy, openai_client, request_id, counts, asked):
    options = {"stream_options": {"include_usage": True}} if asked else {}
    chunks = list(openai_client.completions.create(model=stack.CHAT, prompt="Hello!", stream=True, **options))
    assert len(chunks) > 3
    assert sum(1 for chunk in chunks if not chunk.choices) == (1 if asked else 0)
    if not asked:
        assert not any(chunk.usage for chunk in chunks)
    usage, reason = counts("/v1/completions", {"model": stack.CHAT, "prompt": "Hello!"})
    assert_recorded(proxy.exchange(request_id), usage, stream=True, reason=reason)


def test_embeddings_are_answered_and_counted(proxy, openai_client, request_id):
    reply = openai_client.embeddings.create(model=stack.EMBED, input=["one", "two"])
    assert len(reply.data) == 2 and len(reply.data[0].embedding) > 1
    extra = proxy.exchange(request_id).final["extra"]
    assert (extra["model"], extra["message_count"]) == (stack.EMBED, 2)
    assert (extra["input_tokens"], extra["output_tokens"]) == (reply.usage.prompt_tokens, None)


def test_the_models_that_the_caller_may_use_are_listed(openai_client):
    names = {model.id.removesuffix(":latest") for model in openai_client.models.list()}
    assert stack.CHAT in names and stack.FORBIDDEN not in names


def test_one_model_can_be_retrieved(proxy, openai_client, request_id):
    assert openai_client.models.retrieve(stack.CHAT).id.removesuffix(":latest") == stack.CHAT
    assert proxy.exchange(request_id).final["extra"]["model"] == stack.CHAT


def test_ollamas_own_404_passes_unchanged(proxy, openai_client, request_id, backend):
    import openai

    with pytest.raises(openai.NotFoundError):
        openai_client.chat.completions.create(model=stack.ABSENT, messages=HELLO)
    body = {"model": stack.ABSENT, "messages": HELLO}
    direct = stack.call(backend + "/v1/chat/completions", body)
    passed = stack.call(proxy.base + "/v1/chat/completions", body, {"Authorization": f"Bearer {proxy.token}"})
    assert (passed.status, passed.body) == (404, direct.body)
    assert proxy.exchange(request_id).final["response_code"] == 404


IDENTITY = {"id", "timestamp", "latency_ms", "target", "previous_hash", "event_hash"}
IDENTITY_EXTRA = {"request_id", "dialect", "filters", "ttft_ms", "queue_ms", "bytes_in", "bytes_out"}


def without_identity(record):
    kept = {name: value for name, value in record.items() if name not in IDENTITY | {"extra"}}
    return kept | {"extra": {name: value for name, value in record["extra"].items() if name not in IDENTITY_EXTRA}}


@pytest.mark.parametrize("stream", [False, True])
def test_both_styles_produce_identical_audit_events(proxy, stream, request_id):
    """S0: "Both styles produce identical audit events in Behavry."."""
    head = {"Authorization": f"Bearer {proxy.token}"}
    ids = {"/api/chat": request_id + "-native", "/v1/chat/completions": request_id + "-openai"}
    for path, name in ids.items():
        body = {"model": stack.CHAT, "messages": HELLO, "stream": stream}
        assert stack.call(proxy.base + path, body, head | {"x-request-id": name}).status == 200
    native, openai = (proxy.exchange(name) for name in ids.values())
    assert without_identity(native.final) == without_identity(openai.final)
    assert without_identity(native.request) == without_identity(openai.request)
    assert list(map(without_identity, native.stream_starts)) == list(map(without_identity, openai.stream_starts))
    assert native.final["extra"]["output_tokens"] > 0
