"""The official JavaScript clients, ollama and openai, through the proxy: what they get, and what the records say of it."""
import pytest

import stack

pytestmark = stack.NEEDS_JAVASCRIPT


@pytest.fixture
def run(proxy, request_id):
    """What one call of a client came to."""
    return lambda case: stack.javascript(case, proxy.base, proxy.token, request_id)


@pytest.mark.parametrize("case, dialect, stream", [
    ("ollama_chat", "native", False),
    ("ollama_chat_streamed", "native", True),
    ("ollama_generate", "native", False),
    ("openai_chat", "openai", False),
    ("openai_chat_streamed", "openai", True),
    ("openai_completion", "openai", False),
])
def test_an_answer_arrives_and_is_counted(proxy, request_id, run, case, dialect, stream):
    got = run(case)
    assert got.get("text") or got.get("parts", 0) > 3, got
    final = proxy.exchange(request_id).final
    extra = final["extra"]
    assert (final["policy_result"], final["response_code"], extra["outcome"]) == ("allow", 200, "complete")
    assert (extra["dialect"], extra["stream"], extra["model"]) == (dialect, stream, stack.CHAT)
    assert (extra["input_tokens"], extra["output_tokens"]) == (got["input"], got["output"])
    assert extra["finish_reason"] == got["reason"]


@pytest.mark.parametrize("case", ["openai_response", "openai_response_streamed"])
def test_a_response_arrives_and_is_counted(proxy, request_id, run, case):
    got = run(case)
    assert got.get("text"), got
    extra = proxy.exchange(request_id).final["extra"]
    assert (extra["input_tokens"], extra["output_tokens"], extra["outcome"]) == (got["input"], got["output"], "complete")


@pytest.mark.parametrize("case", ["ollama_embed", "openai_embeddings"])
def test_embeddings_arrive_and_are_counted(proxy, request_id, run, case):
    got = run(case)
    assert got.get("vectors") == 2, got
    extra = proxy.exchange(request_id).final["extra"]
    assert (extra["message_count"], extra["input_tokens"], extra["output_tokens"]) == (2, got["input"], None)


@pytest.mark.parametrize("case", ["ollama_list", "openai_models"])
def test_the_list_shows_what_the_caller_may_use(run, case):
    models = {name.removesuffix(":latest") for name in run(case)["models"]}
    assert stack.CHAT in models and stack.FORBIDDEN not in models


def test_ollama_raises_its_error_with_the_policys_reason(proxy, request_id, run):
    got = run("ollama_refused")
    assert (got["error"], got["status"]) == ("ResponseError", 403), got
    assert "not approved" in got["message"]
    assert proxy.exchange(request_id).final["policy_result"] == "deny"


def test_openai_raises_its_error_with_code_and_reason(run):
    got = run("openai_refused")
    assert (got["kind"], got["status"], got["code"]) == ("PermissionDeniedError", 403, "policy_denied"), got
    assert "not approved" in got["message"]
    got = run("openai_unsupported")
    assert (got["kind"], got["status"], got["code"]) == ("BadRequestError", 400, "unsupported_operation"), got
