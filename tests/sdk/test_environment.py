"""Programs that know nothing of the proxy but what stands in their environment, as tools built on the official clients are set up."""
import subprocess
import sys

import pytest

import stack

ANTHROPIC = """
import anthropic
with anthropic.Anthropic().messages.stream(model="%s", max_tokens=64, messages=[{"role": "user", "content": "Hello!"}]) as stream:
    print("".join(stream.text_stream))
"""
OPENAI = """
import openai
print(openai.OpenAI().chat.completions.create(model="%s", messages=[{"role": "user", "content": "Hello!"}]).choices[0].message.content)
"""
OLLAMA = """
import ollama
print(ollama.chat(model="%s", messages=[{"role": "user", "content": "Hello!"}]).message.content)
"""


def asked(proxy):
    """The ids of all requests so far: a record is written before a backend is asked."""
    return {record["extra"]["request_id"] for record in proxy.records()}


@pytest.mark.parametrize("below", ["", "/api/v1/ollama"], ids=["root", "base"])
@pytest.mark.parametrize("dialect, script, base, credential, end", [
    ("anthropic", ANTHROPIC, "ANTHROPIC_BASE_URL", "ANTHROPIC_API_KEY", ""),
    ("anthropic", ANTHROPIC, "ANTHROPIC_BASE_URL", "ANTHROPIC_AUTH_TOKEN", ""),
    ("openai", OPENAI, "OPENAI_BASE_URL", "OPENAI_API_KEY", "/v1"),
    ("native", OLLAMA, "OLLAMA_HOST", "OLLAMA_API_KEY", ""),
])
def test_two_variables_are_all_that_a_program_needs(proxy, dialect, script, base, credential, end, below):
    before = asked(proxy)
    environment = stack.clean_environment(**{base: proxy.origin + below + end, credential: proxy.token})
    done = subprocess.run([sys.executable, "-c", script % stack.CHAT], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    new = asked(proxy) - before
    assert len(new) == 1
    final = proxy.exchange(new.pop()).final
    assert (final["extra"]["dialect"], final["extra"]["outcome"], final["agent_id"]) == (dialect, "complete", "sdk-agent")
    assert final["extra"]["output_tokens"] > 0
