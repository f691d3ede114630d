"""The Responses API with an Ollama that has no such route, held against one that has it: openai-python builds equal objects.

Equal but for ids and times, for `incomplete` (Ollama's own route never says it), and for a text beside a call (which it drops).
With a real Ollama both are the same one, which stands once behind a server that does not know the route; or the old one is a real one
too, from the folder `BEHAVRY_TEST_OLD_OLLAMA` (tests/real/tiny-ollama/install-ollama FOLDER v0.13.2).
"""
import os

import pytest

import stack

REAL = "BEHAVRY_TEST_REAL_OLLAMA" in os.environ
OLD = os.environ.get("BEHAVRY_TEST_OLD_OLLAMA")
# What is not recited by heart would differ from one answer to the next.
STEADY = {"temperature": 0} if REAL else {}
MODELS = "tiny-story,tiny-tools,tiny-jinja,tiny-think,tiny"
WEATHER = {"type": "function", "name": "get_weather", "description": "Weather of a city",
           "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}
ASKED = {
    "text": {"model": "tiny-story", "input": "hi"},
    "instructions": {"model": "tiny-story", "input": "hi", "instructions": "Be brief."},
    "items": {"model": "tiny-story", "input": [{"type": "message", "role": "system", "content": "Be brief."},
                                                 {"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]},
    "call": {"model": "tiny-tools", "input": "hi", "tools": [WEATHER]},
    "call-last": {"model": "tiny-jinja", "input": "hi", "tools": [WEATHER]},
    "thought": {"model": "tiny-think", "input": "hi"},
    "length": {"model": "tiny", "input": "hi", "max_output_tokens": 8, **STEADY},
    "format": {"model": "tiny-story", "input": "hi", "text": {"format": {
        "type": "json_schema", "name": "any", "schema": {"type": "object"}}}, **STEADY},
    "results": {"model": "tiny-story", "input": [
        {"role": "user", "content": "The time and the weather?"},
        {"type": "function_call", "call_id": "call_1", "name": "now", "arguments": ""},
        {"type": "function_call", "call_id": "call_2", "name": "get_weather", "arguments": '{"city": "Oslo"}'},
        {"type": "function_call_output", "call_id": "call_1", "output": "noon"},
        {"type": "function_call_output", "call_id": "call_2", "output": "rain"}]},
}


@pytest.fixture(scope="module", params=["real"] if REAL else ["0.12.6", "0.13.2"])
def pair(request, tmp_path_factory, backend):
    """Clients of two proxies: in front of an Ollama without the route, and of one with it."""
    openai = pytest.importorskip("openai")
    running, clients = [], []
    for is_old in (True, False):
        if REAL and not is_old:
            program, url = None, backend
        elif REAL and OLD:
            program, url = stack.real_ollama(OLD)
        elif REAL:
            program = stack.Older(backend)
            url = program.url
        else:
            flags = ["--ollama-version", request.param, "--wire", "old"] if is_old else []
            program, url = stack.simulator("--tokens-per-second", "0", "--models", MODELS, *flags)
        proxy = stack.Proxy(tmp_path_factory.mktemp("proxy") / "p", url)
        running += [proxy, *([program] if program else [])]
        clients.append((proxy, openai.OpenAI(base_url=proxy.base + "/v1", api_key=proxy.token, max_retries=0, timeout=120)))
    yield clients
    for _, client in clients:
        client.close()
    for program in running:
        program.stop()


def essence(response):
    """The object without what differs from one answer to the next, and without what Ollama's own route does not say."""
    found = response.model_dump() if hasattr(response, "model_dump") else response

    def strip(value):
        if isinstance(value, dict):
            return {name: strip(inner) for name, inner in value.items()
                    if name not in ("id", "call_id", "created_at", "completed_at", "status", "incomplete_details")}
        if isinstance(value, list):
            return [strip(inner) for inner in value]
        return value
    return strip(found)


def built(client, asked, how):
    """What the client makes of an answer."""
    if how == "whole":
        return client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [essence(item) for item in done] == [essence(item) for item in last.response.output]
    if how == "events":
        return last.response
    # The helper raises on `incomplete`, whoever says it: the client's rule.
    if last.type == "response.incomplete":
        pytest.skip("the helper takes no incomplete response")
    with client.responses.stream(**asked) as stream:
        for _ in stream:
            pass
        return stream.get_final_response()


@pytest.mark.parametrize("how", ["whole", "events"] if REAL else ["whole", "events", "helper"])
@pytest.mark.parametrize("case", ASKED)
def test_the_client_builds_equal_objects_of_a_converted_and_a_native_answer(pair, case, how):
    if REAL and case == "call-last":
        pytest.skip("a model of newer Ollamas")
    (_, old), (_, new) = pair
    converted, native = built(old, ASKED[case], how), built(new, ASKED[case], how)
    assert essence(converted) == essence(native)
    assert converted.output_text == native.output_text
    assert converted.output and converted.usage.total_tokens > 0
    assert native.status == "completed"
    if case == "length":
        assert (converted.status, converted.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    else:
        assert converted.status == "completed"
    for item in converted.output:
        prefix = {"reasoning": "rs_", "message": "msg_", "function_call": "fc_"}[item.type]
        assert item.id.startswith(prefix)


def test_a_call_goes_back_with_its_result_and_a_text_comes(pair):
    """What an agent does, with what the client built of either answer."""
    for _, client in pair:
        first = client.responses.create(**ASKED["call"])
        calls = [item for item in first.output if item.type == "function_call"]
        assert calls and calls[0].name == "get_weather"
        back = [{"role": "user", "content": "hi"}, *first.output,
                *[{"type": "function_call_output", "call_id": call.call_id, "output": "rain"} for call in calls]]
        with client.responses.stream(model="tiny-story", input=back) as stream:
            assert "quick" in stream.get_final_response().output_text


def test_records_of_both_are_alike(pair):
    finals = []
    for proxy, client in pair:
        client.responses.create(**ASKED["call"], extra_headers={"x-request-id": "alike"})
        finals.append(proxy.exchange("alike").final)
    old, new = (final["extra"] for final in finals)
    for name in ("model", "dialect", "stream", "has_tools", "has_system_prompt", "message_count", "input_tokens",
                 "output_tokens", "finish_reason", "outcome"):
        assert old[name] == new[name], name
    assert finals[0]["target"] == finals[1]["target"] == "/v1/responses"
    assert (old["filters"], new["filters"]) == (["responses_to_chat"], [])


def test_what_is_not_honoured_raises_and_names_the_parameter(pair):
    import openai

    for _, client in pair:
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(model="tiny-story", input="hi", previous_response_id="resp_1")
        assert (refused.value.code, refused.value.param) == ("unsupported_parameter", "previous_response_id")


@pytest.mark.skipif(REAL, reason="a real one fails at no word of ours")
def test_a_failure_in_the_middle_is_a_failed_response(pair):
    import openai

    (_, old), (_, new) = pair
    events = list(old.responses.create(model="fault-no-terminal", input="hi", stream=True))
    assert events[-1].type == "response.failed" and events[-1].response.error.message
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert said and events[-1].response.output_text == said
    with pytest.raises(openai.APIError) as raised:
        list(new.responses.create(model="fault-no-terminal", input="hi", stream=True))
    assert "ended before it was complete" in str(raised.value)
    for client in (old, new):
        with pytest.raises(openai.InternalServerError):
            client.responses.create(model="fault-no-terminal", input="hi")
