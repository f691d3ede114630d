"""What is measured: the same backend behind each of these, and nothing behind `direct`."""
import base64
import hashlib
import hmac
import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

from machine import GATEWAY_CORES, ROOT, Program, free_port

MODEL = "llama3.2"
# No comma and no space: it stands inside an expression of haproxy.cfg.
HMAC_SECRET = "a-secret-that-only-this-bench-knows-of"
PROXY = ROOT / "target/release/behavry-ollama-proxy"
BARE = ROOT / "target/release/examples/bare_pingora"


class Gateway:
    def __init__(self, name, work, program=None, base="", headers=(), environment=None):
        self.name, self.work, self.program, self.base = name, work, program, base
        self.headers, self.environment = list(headers), environment

    def __repr__(self):
        return self.name


def missing(with_proxy=True):
    """Why a gateway cannot take part, by name."""
    reasons = {}
    if shutil.which("nginx") is None:
        reasons["nginx"] = "nginx is not installed (Debian: nginx)"
    if shutil.which("haproxy") is None:
        reasons["haproxy"] = reasons["haproxy-hs256"] = "haproxy is not installed (Debian: haproxy)"
    if not BARE.exists():
        reasons["bare-pingora"] = f"{BARE.relative_to(ROOT)} is not built"
    if not (with_proxy and PROXY.exists()):
        reasons["ours-rs256"] = reasons["ours-hs256"] = f"{PROXY.relative_to(ROOT)} is not built"
    return reasons


def start_all(backend, folder, only=None):
    """Every gateway that is here and wanted, started in front of `backend` (host:port). Returns (gateways, missing)."""
    absent = missing()
    makers = {
        "direct": lambda place: Gateway("direct", "-", None, f"http://{backend}"),
        "nginx": lambda place: nginx(backend, place),
        "haproxy": lambda place: haproxy(backend, place, guarded=False),
        "haproxy-hs256": lambda place: haproxy(backend, place, guarded=True),
        "bare-pingora": lambda place: bare_pingora(backend, place),
        "ours-rs256": lambda place: ours(backend, place, "RS256"),
        "ours-hs256": lambda place: ours(backend, place, "HS256"),
    }
    if only and "ours-dead-sinks" in only:  # beside ours-rs256, for those who ask
        makers["ours-dead-sinks"] = lambda place: ours(backend, place, "RS256", dead_sinks(place))
    started = []
    try:
        for name, make in makers.items():
            if name in absent or (only and name not in only):
                continue
            place = Path(folder) / name
            place.mkdir(parents=True)
            place.chmod(0o755)  # nginx's worker runs as another user
            started.append(make(place))
    except BaseException:
        stop_all(started)
        raise
    return started, {name: why for name, why in absent.items() if not only or name in only}


def stop_all(gateways):
    for gateway in gateways:
        if gateway.program:
            gateway.program.stop()


def nginx(backend, place):
    port = free_port()
    config = written(place / "nginx.conf", "nginx.conf", DIR=place, LISTEN=f"127.0.0.1:{port}", BACKEND=backend)
    program = Program(["nginx", "-p", place, "-c", config], GATEWAY_CORES, place / "log")
    program.wait_for_port(port)
    return Gateway("nginx", "forward", program, f"http://127.0.0.1:{port}")


def haproxy(backend, place, guarded):
    plain, jwt = free_port(), free_port()
    config = written(place / "haproxy.cfg", "haproxy.cfg", PLAIN=f"127.0.0.1:{plain}", JWT=f"127.0.0.1:{jwt}",
                     BACKEND=backend, ALG="HS256", KEY=HMAC_SECRET)
    program = Program(["haproxy", "-db", "-f", config], GATEWAY_CORES, place / "log")
    program.wait_for_port(jwt)
    if not guarded:
        return Gateway("haproxy", "forward", program, f"http://127.0.0.1:{plain}")
    return Gateway("haproxy-hs256", "token, model rule", program, f"http://127.0.0.1:{jwt}",
                   ["Authorization: Bearer " + hs256_token(0)])


def bare_pingora(backend, place):
    port = free_port()
    program = Program([BARE, f"127.0.0.1:{port}", backend], GATEWAY_CORES, place / "log")
    program.wait_for_port(port)
    return Gateway("bare-pingora", "forward", program, f"http://127.0.0.1:{port}")


def ours(backend, place, algorithm, sinks=""):
    """The proxy with its shipped policy and its audit on disk; the token is the proxy's own, or HS256's."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BEHAVRY_")}
    environment |= {
        "BEHAVRY_LISTEN": "127.0.0.1:0", "BEHAVRY_OPERATOR_LISTEN": "127.0.0.1:0",
        "BEHAVRY_STATE_DIR": str(place / "state"), "BEHAVRY_AUDIT_DIR": str(place / "audit"),
        "BEHAVRY_CONFIG": str(place / "proxy.toml"),
    }
    settings = "threads = 1\n" + sinks
    if algorithm == "HS256":
        secret = place / "secret"
        secret.write_text(HMAC_SECRET)
        secret.chmod(0o600)
        settings += '[identity]\nalgorithm = "HS256"\nsecret_file = "secret"\n'
    # The backend computes as much at once as it is asked for, and none of the others has a queue.
    settings += f'[[backend]]\nurl = "http://{backend}"\nslots = 100000\n'
    (place / "proxy.toml").write_text(settings)
    program = Program([PROXY, "serve"], GATEWAY_CORES, place / "log", environment)
    base = program.wait_for_line("listening on ")
    token = minted(environment) if algorithm == "RS256" else hs256_token(0)
    return Gateway("ours-dead-sinks" if sinks else f"ours-{algorithm.lower()}", "token, policy, counts, audit, metrics", program,
                   base + "/api/v1/ollama", ["Authorization: Bearer " + token], environment)


HUNG = []


def dead_sinks(place):
    """Settings of three secondary sinks of the audit that each take a connection and never answer or read."""
    hung = [socket.create_server(("127.0.0.1", 0), backlog=64) for _ in range(3)]
    HUNG.extend(hung)  # open until the end: the kernel takes the connections, and nobody does after it
    webhook, syslog, otlp = (server.getsockname()[1] for server in hung)
    secret = place / "webhook-secret"
    secret.write_text("0" * 64)
    secret.chmod(0o600)
    return (f'[audit.webhook]\nurl = "http://127.0.0.1:{webhook}/"\nsecret_file = "webhook-secret"\n'
            f'[audit.syslog]\naddress = "tcp://127.0.0.1:{syslog}"\n[audit.otlp]\nurl = "http://127.0.0.1:{otlp}/v1/logs"\n')


def minted(environment):
    done = subprocess.run([PROXY, "token", "mint", "--agent", "bench", "--role", "internal", "--permission", "web:read",
                           "--permission", "web:write"], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError("token mint: " + done.stderr)
    return done.stdout.strip()


def fresh_tokens(gateway, count):
    """Tokens that the gateway has never seen, or None where it reads no tokens."""
    if gateway.name.endswith("hs256"):
        base = time.time_ns()
        return [hs256_token(base + serial) for serial in range(count)]
    if gateway.name == "ours-rs256":
        return [minted(gateway.environment) for _ in range(count)]
    return None


def hs256_token(serial):
    """One for all gateways: Behavry's claims, and the `role` that HAProxy's rule reads."""
    now = int(time.time())
    claims = {"sub": "bench", "jti": f"bench-{serial}", "iss": "behavry", "iat": now, "exp": now + 86400, "role": "internal",
              "roles": ["internal"], "permissions": ["web:read", "web:write"], "risk_tier": "medium"}
    signed = b".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=")
                       for part in ({"alg": "HS256", "typ": "JWT"}, claims))
    signature = hmac.new(HMAC_SECRET.encode(), signed, hashlib.sha256).digest()
    return (signed + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()


def written(path, template, **values):
    text = (ROOT / "bench" / template).read_text()
    for name, value in values.items():
        text = text.replace(f"@{name}@", str(value))
    path.write_text(text)
    return path
