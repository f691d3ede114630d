"""ollama-python through the proxy: what the client gets, and what the records say of it."""
import pytest

import stack


def question(canary):
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Hello {canary}"}]


def assert_recorded(exchange, last, *, model=stack.CHAT, stream, messages, system, target):
    """The records carry what the reply itself says, and S0's names."""
    final, extra = exchange.final, exchange.final["extra"]
    assert (final["tool_name"], final["mcp_server"], final["action"]) == ("ollama-api", "ollama-proxy", "POST")
    assert (final["policy_result"], final["response_code"], final["agent_id"]) == ("allow", 200, "sdk-agent")
    assert final["target"].endswith(target)
    assert (extra["model"], extra["stream"], extra["outcome"]) == (model, stream, "complete")
    assert (extra["message_count"], extra["has_system_prompt"], extra["has_tools"]) == (messages, system, False)
    assert (extra["input_tokens"], extra["output_tokens"]) == (last.get("prompt_eval_count"), last.get("eval_count"))
    assert extra["finish_reason"] == last.get("done_reason")
    assert exchange.request["policy_result"] == "allow" and exchange.request["extra"]["model"] == model
    assert [start["extra"]["upstream_status"] for start in exchange.stream_starts] == ([200] if stream else [])


def test_a_chat_is_answered_and_recorded(proxy, ollama_client, request_id, canary):
    reply = ollama_client.chat(model=stack.CHAT, messages=question(canary))
    assert reply["message"]["content"] and reply.done_reason
    assert reply.prompt_eval_count > 0 and reply.eval_count > 0
    assert_recorded(proxy.exchange(request_id), reply, stream=False, messages=2, system=True, target="/api/chat")
    proxy.assert_kept_to_itself(canary, reply.message.content)


def test_a_streamed_chat_arrives_in_pieces_and_is_recorded(proxy, ollama_client, request_id, canary):
    pieces = list(ollama_client.chat(model=stack.CHAT, messages=question(canary), stream=True))
    assert len(pieces) > 3 and pieces[-1].done and not any(piece.done for piece in pieces[:-1])
    text = "".join(piece.message.content for piece in pieces)
    assert_recorded(proxy.exchange(request_id), pieces[-1], stream=True, messages=2, system=True, target="/api/chat")
    proxy.assert_kept_to_itself(canary, text)


def test_a_generation_is_answered_and_recorded(proxy, ollama_client, request_id, canary):
    reply = ollama_client.generate(model=stack.CHAT, prompt=canary)
    assert reply.response and reply.done
    assert_recorded(proxy.exchange(request_id), reply, stream=False, messages=1, system=False, target="/api/generate")
    proxy.assert_kept_to_itself(canary)


def test_a_streamed_generation_arrives_in_pieces_and_is_recorded(proxy, ollama_client, request_id, canary):
    pieces = list(ollama_client.generate(model=stack.CHAT, prompt="Go on", system=canary, stream=True))
    assert len(pieces) > 3 and pieces[-1].done
    assert_recorded(proxy.exchange(request_id), pieces[-1], stream=True, messages=1, system=True, target="/api/generate")
    proxy.assert_kept_to_itself(canary)


def test_embeddings_are_counted_by_their_inputs(proxy, ollama_client, request_id, canary):
    reply = ollama_client.embed(model=stack.EMBED, input=["one", "two", canary])
    assert len(reply.embeddings) == 3 and len(reply.embeddings[0]) > 1
    extra = proxy.exchange(request_id).final["extra"]
    assert (extra["model"], extra["message_count"]) == (stack.EMBED, 3)
    assert (extra["input_tokens"], extra["output_tokens"]) == (reply.prompt_eval_count, None)
    proxy.assert_kept_to_itself(canary)


def test_the_old_embeddings_call_has_no_counts(proxy, ollama_client, request_id):
    reply = ollama_client.embeddings(model=stack.EMBED, prompt="one")
    assert len(reply.embedding) > 1
    extra = proxy.exchange(request_id).final["extra"]
    assert (extra["input_tokens"], extra["output_tokens"]) == (None, None), "unknown is null, never 0"


def test_the_list_shows_what_the_caller_may_use(proxy, ollama_client, request_id, backend):
    names = {model.model.removesuffix(":latest") for model in ollama_client.list().models}
    there = {model["model"].removesuffix(":latest") for model in stack.call(backend + "/api/tags").json["models"]}
    assert stack.FORBIDDEN in there, "the backend has it, so its absence proves something"
    assert names == there - {stack.FORBIDDEN}
    final = proxy.exchange(request_id).final
    assert (final["action"], final["policy_result"], final["response_code"]) == ("GET", "allow", 200)


def test_a_model_can_be_shown(proxy, ollama_client, request_id, backend):
    details = ollama_client.show(stack.CHAT)
    assert details.details.family == stack.call(backend + "/api/show", {"model": stack.CHAT}).json["details"]["family"]
    assert proxy.exchange(request_id).final["extra"]["model"] == stack.CHAT


def test_running_models_can_be_listed(proxy, ollama_client, request_id):
    ollama_client.generate(model=stack.CHAT)  # an empty prompt only loads the model
    assert all(model.model.removesuffix(":latest") != stack.FORBIDDEN for model in ollama_client.ps().models)


def test_one_model_has_one_name_in_the_records(proxy, ollama_client, request_id):
    ollama_client.chat(model="Llama3.2:latest", messages=[{"role": "user", "content": "hi"}])
    extra = proxy.exchange(request_id).final["extra"]
    assert (extra["model"], extra["model_raw"]) == (stack.CHAT, "Llama3.2:latest")


@pytest.mark.parametrize("stream", [False, True])
def test_ollamas_own_404_passes_unchanged(proxy, ollama_client, request_id, backend, stream):
    import ollama

    with pytest.raises(ollama.ResponseError) as caught:
        reply = ollama_client.chat(model=stack.ABSENT, messages=[{"role": "user", "content": "hi"}], stream=stream)
        list(reply)
    assert caught.value.status_code == 404
    body = {"model": stack.ABSENT, "messages": [{"role": "user", "content": "hi"}], "stream": stream}
    direct = stack.call(backend + "/api/chat", body)
    passed = stack.call(proxy.base + "/api/chat", body, {"Authorization": f"Bearer {proxy.token}"})
    assert (passed.status, passed.body, passed.headers["content-type"]) == (404, direct.body, direct.headers["content-type"])
    assert proxy.exchange(request_id).final["response_code"] == 404
