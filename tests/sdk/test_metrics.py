"""The operator's listener: Prometheus can read it, and no client can put words into it."""
import json
import re
import socket
import subprocess
import time

import pytest

import stack


@pytest.fixture
def metrics(proxy, request_id):
    """The text of /metrics after a request whose model name and id no metric may repeat."""
    head = {"Authorization": f"Bearer {proxy.token}"}
    stack.call(proxy.base + "/api/chat", {"model": stack.CHAT, "messages": [{"role": "user", "content": "hi"}]}, head)
    stack.call(proxy.base + "/api/chat", {"model": "made-up-" + request_id, "messages": []}, head)
    reply = stack.call(proxy.operator + "/metrics")
    assert reply.status == 200 and reply.headers["content-type"].startswith("text/plain")
    return reply.body.decode()


def test_promtool_finds_nothing_to_complain_about(metrics):
    stack.needs("promtool", "prometheus")
    checked = subprocess.run(["promtool", "check", "metrics"], input=metrics, capture_output=True, text=True, timeout=60)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_every_family_has_the_prefix_and_no_label_comes_from_a_client(metrics, request_id):
    families = re.findall(r"^# TYPE (\S+)", metrics, re.MULTILINE)
    assert families and all(name.startswith(("behavry_ollama_", "process_")) for name in families)
    assert request_id not in metrics


def test_tokens_and_requests_are_counted(proxy, metrics):
    assert re.search(r'^behavry_ollama_\w*requests\w*\{[^}]*\} [1-9]', metrics, re.MULTILINE)
    assert re.search(r'^behavry_ollama_\w*tokens\w*\{[^}]*model="%s"[^}]*\} [1-9]' % re.escape(stack.CHAT), metrics,
                     re.MULTILINE)


def test_the_health_pages_answer(proxy):
    assert stack.call(proxy.operator + "/livez").status == 200
    assert stack.call(proxy.operator + "/readyz").status == 200


def test_a_real_prometheus_scrapes_it(proxy, metrics, tmp_path):
    stack.needs("prometheus", "prometheus")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "prometheus.yml").write_text(
        "global: {scrape_interval: 200ms, scrape_timeout: 200ms}\n"
        "scrape_configs: [{job_name: proxy, static_configs: [{targets: ['%s']}]}]\n" % proxy.operator.removeprefix("http://"))
    prometheus = stack.Running(["prometheus", f"--config.file={tmp_path}/prometheus.yml",
                                f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address=127.0.0.1:{port}"])
    try:
        prometheus.wait_for("Server is ready to receive web requests")
        deadline = time.monotonic() + 30
        while True:  # a scrape announces itself to nobody: ask until one is there
            found = stack.call(f"http://127.0.0.1:{port}/api/v1/query?query=up{{job=%22proxy%22}}").json["data"]["result"]
            if found and found[0]["value"][1] == "1":
                break
            assert time.monotonic() < deadline, json.dumps(found)
        names = stack.call(f"http://127.0.0.1:{port}/api/v1/label/__name__/values").json["data"]
        assert any(name.startswith("behavry_ollama_") for name in names)
    finally:
        prometheus.stop()


def test_the_readmes_scrape_configuration_works_with_a_credential(tmp_path, backend):
    stack.needs("prometheus", "prometheus")
    readme = (stack.ROOT / "README.md").read_text()
    [scrape] = re.findall(r"^<!-- test: scrape -->\n```yaml\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    token = tmp_path / "operator.token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    (tmp_path / "proxy.toml").write_text(f'[operator]\ncredential_file = "{token}"\n')
    guarded = stack.Proxy(tmp_path / "p", backend, BEHAVRY_CONFIG=tmp_path / "proxy.toml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    printed = "/etc/prometheus/operator.token"
    assert printed in scrape and "gateway.internal:5173" in scrape
    scrape = scrape.replace(printed, str(token)).replace("gateway.internal:5173", guarded.operator.removeprefix("http://"))
    (tmp_path / "prometheus.yml").write_text("global: {scrape_interval: 200ms, scrape_timeout: 200ms}\n" + scrape)
    prometheus = stack.Running(["prometheus", f"--config.file={tmp_path}/prometheus.yml",
                                f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address=127.0.0.1:{port}"])
    try:
        assert stack.call(guarded.operator + "/metrics").status == 401
        prometheus.wait_for("Server is ready to receive web requests")
        deadline = time.monotonic() + 30
        while True:
            found = stack.call(f"http://127.0.0.1:{port}/api/v1/query?query=up").json["data"]["result"]
            if found and found[0]["value"][1] == "1":
                break
            assert time.monotonic() < deadline, json.dumps(found)
    finally:
        prometheus.stop()
        guarded.stop()
