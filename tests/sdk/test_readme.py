"""The README's Python, as printed, with the official clients; its commands are run by tests/e2e/readme.rs."""
import re
import subprocess
import sys

import pytest

import stack

README = (stack.ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"^<!-- test: python -->\n```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_readme_has_an_example_for_each_client():
    assert len(EXAMPLES) == README.count("```python") == 2


@pytest.mark.parametrize("example", EXAMPLES, ids=["ollama", "openai"])
def test_an_example_works_as_printed(proxy, example):
    environment = stack.clean_environment(BEHAVRY_JWT=proxy.token)
    done = subprocess.run([sys.executable, "-c", example.replace("http://localhost:8000", proxy.origin)],
                          env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
