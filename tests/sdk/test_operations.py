"""The page "Ollama" of Bifrost's documentation, its tables row by row, with openai-python as the client."""
import openai
import pytest

import stack
from test_several_backends import known

HELLO = [{"role": "user", "content": "Hello!"}]
TOOL = {"name": "get_weather", "description": "the weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}


def chat(client, stream):
    if stream:
        with client.chat.completions.stream(model=stack.CHAT, messages=HELLO) as events:
            return events.get_final_completion().choices[0].message.content
    return client.chat.completions.create(model=stack.CHAT, messages=HELLO).choices[0].message.content


def responses(client, stream):
    if stream:
        with client.responses.stream(model=stack.CHAT, input="Hello!") as events:
            return events.get_final_response().output_text
    return client.responses.create(model=stack.CHAT, input="Hello!").output_text


def text(client, stream):
    if stream:
        return "".join(chunk.choices[0].text for chunk in client.completions.create(model=stack.CHAT, prompt="Hello!", stream=True))
    return client.completions.create(model=stack.CHAT, prompt="Hello!").choices[0].text


def embeddings(client, stream):
    return client.embeddings.create(model=stack.EMBED, input="Hello!").data[0].embedding


def models(client, stream):
    return list(client.models.list())


# Operation, streamed, endpoint: the rows of "Supported Operations". Where Ollama has /v1/responses it is asked for that; where not, for
# the chat that the page names (test_responses.py).
@pytest.mark.parametrize("operation, stream, endpoint", [
    (chat, False, "/v1/chat/completions"), (chat, True, "/v1/chat/completions"),
    (responses, False, "/v1/responses"), (responses, True, "/v1/responses"),
    (text, False, "/v1/completions"), (text, True, "/v1/completions"),
    (embeddings, False, "/v1/embeddings"), (models, False, "/v1/models"),
])
def test_what_the_page_supports_works(proxy, openai_client, request_id, operation, stream, endpoint):
    assert operation(openai_client, stream)
    final = proxy.exchange(request_id).final
    extra = final["extra"]
    assert (final["target"], final["response_code"], extra["outcome"]) == (endpoint, 200, "complete")
    if operation is not models:
        assert extra["stream"] is stream and extra["input_tokens"] > 0
    if operation in (chat, responses, text):
        assert extra["output_tokens"] > 0 and extra["finish_reason"] in ("stop", "completed")


def test_text_completions_take_the_pages_parameters(proxy, openai_client, request_id):
    reply = openai_client.completions.create(
        model=stack.CHAT, prompt="Hello!", max_tokens=3, temperature=0.5, top_p=0.9, stop=["never said"])
    assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens <= 3
    assert proxy.exchange(request_id).final["extra"]["filters"] == [], "all of them pass"


def test_models_are_listed_with_capabilities_and_context(proxy):
    listed = {entry["id"].removesuffix(":latest"): entry for entry in known(proxy)}
    assert {stack.CHAT, stack.EMBED} <= set(listed)
    assert stack.FORBIDDEN not in listed, "what a caller may not use is not shown"
    assert "completion" in listed[stack.CHAT]["capabilities"] and listed[stack.CHAT]["context_length"] > 0
    assert isinstance(listed[stack.CHAT]["loaded"], bool)


@pytest.mark.parametrize("operation, call", [
    ("image_generation", lambda client: client.images.generate(model=stack.CHAT, prompt="a cat")),
    ("image_generation_stream", lambda client: client.images.generate(model=stack.CHAT, prompt="a cat", stream=True)),
    ("image_edit", lambda client: client.images.edit(model=stack.CHAT, prompt="a hat", image=b"png")),
    ("image_variation", lambda client: client.post("/images/variations", body={"model": stack.CHAT}, cast_to=object)),
    ("speech", lambda client: client.audio.speech.create(model=stack.CHAT, input="hi", voice="alloy")),
    ("speech_stream", lambda client: client.audio.speech.create(model=stack.CHAT, input="hi", voice="alloy", stream_format="sse")),
    # A form is not read to its end for one word more (docs/adr/0075).
    ("transcription", lambda client: client.audio.transcriptions.create(model=stack.CHAT, file=b"wav", stream=True)),
    ("transcription", lambda client: client.audio.transcriptions.create(model=stack.CHAT, file=b"wav")),
    ("file_upload", lambda client: client.files.create(file=b"{}", purpose="batch")),
    ("file_list", lambda client: client.files.list()),
    ("file_retrieve", lambda client: client.files.retrieve("file-1")),
    ("file_delete", lambda client: client.files.delete("file-1")),
    ("file_content", lambda client: client.files.content("file-1")),
    ("batch_create", lambda client: client.batches.create(completion_window="24h", endpoint="/v1/embeddings", input_file_id="f")),
    ("batch_list", lambda client: client.batches.list()),
    ("batch_retrieve", lambda client: client.batches.retrieve("batch_1")),
    ("batch_cancel", lambda client: client.batches.cancel("batch_1")),
    ("container_list", lambda client: client.containers.list()),
    ("video_retrieve", lambda client: client.get("/videos/video_1", cast_to=object)),
    ("rerank", lambda client: client.post("/rerank", body={"model": stack.CHAT}, cast_to=object)),
])
def test_what_the_page_does_not_support_says_so(proxy, openai_client, request_id, operation, call):
    with pytest.raises(openai.BadRequestError) as caught:
        call(openai_client)
    assert caught.value.code == "unsupported_operation"
    assert f"{operation} is not supported by ollama provider" in caught.value.message
    final = proxy.exchange(request_id).final
    assert (final["error"], final["extra"]["upstream_status"]) == ("unsupported_operation", None)


def test_what_the_page_filters_is_filtered(proxy, openai_client, request_id):
    reply = openai_client.chat.completions.create(
        model="ollama/" + stack.CHAT, prompt_cache_key="k", verbosity="low", store=True, service_tier="auto", user="u" * 65,
        max_completion_tokens=3, messages=[{"role": "user", "content": [
            {"type": "text", "text": "Hello!", "cache_control": {"type": "ephemeral"}}]}])
    assert reply.usage.completion_tokens <= 3 and reply.choices[0].finish_reason == "length"
    extra = proxy.exchange(request_id).final["extra"]
    assert extra["filters"] == ["model_prefix", "prompt_cache_key", "verbosity", "store", "service_tier", "cache_control", "user",
                                "max_completion_tokens"]
    assert extra["model"] == stack.CHAT


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_embeddings_come_in_either_encoding(proxy, openai_client, request_id, encoding):
    reply = openai_client.embeddings.create(model=stack.EMBED, input=["one", "two"], encoding_format=encoding)
    assert len(reply.data) == 2
    assert (type(reply.data[0].embedding) is str) == (encoding == "base64")
    assert proxy.exchange(request_id).final["extra"]["input_tokens"] == reply.usage.prompt_tokens


def test_embeddings_can_be_shorter(openai_client):
    assert len(openai_client.embeddings.create(model=stack.EMBED, input="one", dimensions=4).data[0].embedding) == 4


def test_tools_can_be_offered(proxy, openai_client, request_id):
    if not can_use_tools(proxy):
        pytest.skip("the model behind this proxy knows no tools")
    openai_client.chat.completions.create(model=stack.CHAT, messages=HELLO, tools=[{"type": "function", "function": TOOL}])
    assert proxy.exchange(request_id).final["extra"]["has_tools"] is True


def can_use_tools(proxy):
    shown = stack.call(proxy.base + "/api/show", {"model": stack.CHAT}, {"Authorization": f"Bearer {proxy.token}"})
    return "tools" in shown.json["capabilities"]


def test_a_conversation_that_ollama_would_forget_is_refused_by_name(proxy, openai_client, request_id):
    with pytest.raises(openai.BadRequestError) as caught:
        openai_client.responses.create(model=stack.CHAT, input="and now?", previous_response_id="resp_1")
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "previous_response_id")
    assert proxy.exchange(request_id).final["error"] == "unsupported_parameter"


def test_a_refusal_that_will_not_change_is_not_sent_again(proxy, request_id):
    with openai.OpenAI(base_url=proxy.base + "/v1", api_key=proxy.token, max_retries=5, timeout=60,
                       default_headers={"x-request-id": request_id}) as client:
        with pytest.raises(openai.PermissionDeniedError):
            client.chat.completions.create(model=stack.FORBIDDEN, messages=HELLO)
    assert len(proxy.exchange(request_id).records) == 1, "one attempt"
