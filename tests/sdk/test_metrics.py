"""The operator's listener: Prometheus can read it, and no client can put words into it."""
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse

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


CONF = stack.ROOT / "conf"


def dashboard_queries():
    board = json.loads((CONF / "grafana/dashboard.json").read_text())
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def alert_text():
    return (CONF / "prometheus/alerts.yml").read_text()


def test_each_alert_fires_for_whom_it_should_and_for_nobody_else(tmp_path):
    stack.needs("promtool", "prometheus")
    shutil.copy(CONF / "prometheus/alerts.yml", tmp_path)
    shutil.copy(stack.ROOT / "tests/sdk/alerts_test.yml", tmp_path)
    for words in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run(["promtool", *words], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
    tested = re.findall(r"alertname: (\w+)", (tmp_path / "alerts_test.yml").read_text())
    assert set(tested) == set(re.findall(r"- alert: (\w+)", alert_text()))


def test_the_dashboards_queries_are_promql(tmp_path):
    stack.needs("promtool", "prometheus")
    queries = [query.replace("$__rate_interval", "5m").replace("$instance", ".*") for query in dashboard_queries()]
    assert len(queries) > 20 and not any("$" in query for query in queries)
    rules = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(queries)]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", "rules.yml"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def metrics_with_a_sink(tmp_path, backend):
    """A sink has series where it is configured. Nobody listens at this one."""
    nobody = stack.DeadPort()
    secret = tmp_path / "webhook.secret"
    secret.write_text("0123456789abcdef" * 2)
    secret.chmod(0o600)
    (tmp_path / "proxy.toml").write_text(f'[audit.webhook]\nurl = "{nobody.url}"\nsecret_file = "{secret}"\n')
    running = stack.Proxy(tmp_path / "p", backend, BEHAVRY_CONFIG=tmp_path / "proxy.toml")
    try:
        return stack.call(running.operator + "/metrics").body.decode()
    finally:
        running.stop()
        nobody.socket.close()


def test_dashboard_and_alerts_name_only_metrics_that_are_there(proxy, metrics, tmp_path, backend):
    # Some families are there once something of theirs has happened: the fixture saw to the others.
    address = urllib.parse.urlsplit(proxy.base)
    with socket.create_connection((address.hostname, address.port), timeout=10) as stranger:
        stranger.sendall(b"NO REQUEST\r\n\r\n")
        while stranger.recv(4096):
            pass
    metrics = stack.call(proxy.operator + "/metrics").body.decode() + metrics_with_a_sink(tmp_path, backend)
    there = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)", metrics, re.MULTILINE):
        there |= {name + end for end in ("_bucket", "_sum", "_count")} if kind == "histogram" else {name}
    named = set(re.findall(r"behavry_ollama_\w+", "\n".join(dashboard_queries()) + alert_text()))
    assert len(named) > 20 and named <= there, named - there
