"""Fixtures: one backend and one proxy for the whole run.

`BEHAVRY_TEST_REAL_OLLAMA=FOLDER` puts the real Ollama of that folder in the simulator's place (tests/run does).
"""
import os
import uuid

import pytest

import stack

# Everything that S0's clients may do passes, but for one model: the refusals have a reason to show.
POLICY = """package behavry.authz

deny contains "this model is not approved here" if input.model == "%s"
""" % stack.FORBIDDEN


@pytest.fixture(scope="session")
def backend():
    """The URL of what stands behind the proxy."""
    folder = os.environ.get("BEHAVRY_TEST_REAL_OLLAMA")
    program, url = stack.real_ollama(folder) if folder else stack.simulator("--tokens-per-second", "2000", "--tokens", "17")
    yield url
    if folder:
        for name in stack.COPIES:
            stack.call(url + "/api/delete", {"model": name}, method="DELETE")
    program.stop()


@pytest.fixture(scope="session")
def proxy(tmp_path_factory, backend):
    running = stack.Proxy(tmp_path_factory.mktemp("proxy") / "p", backend, POLICY)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def proxy_without_backend(tmp_path_factory):
    port = stack.DeadPort()
    running = stack.Proxy(tmp_path_factory.mktemp("proxy") / "p", port.url, POLICY)
    running.backend_url = port.url
    yield running
    running.stop()
    port.socket.close()


@pytest.fixture
def request_id():
    return "sdk-" + uuid.uuid4().hex


@pytest.fixture
def canary():
    """A word that no honest record can contain."""
    return "canary" + uuid.uuid4().hex


@pytest.fixture
def ollama_client(proxy, request_id):
    """ollama-python as in the seed's page, with an id to find its records by."""
    import ollama

    return ollama.Client(host=proxy.base, headers={"Authorization": f"Bearer {proxy.token}", "x-request-id": request_id},
                         timeout=120)


@pytest.fixture
def openai_client(proxy, request_id):
    """openai-python as in the seed's page. Retries are off: every refusal is seen."""
    import openai

    with openai.OpenAI(base_url=proxy.base + "/v1", api_key=proxy.token, max_retries=0, timeout=120,
                       default_headers={"x-request-id": request_id}) as client:
        yield client
