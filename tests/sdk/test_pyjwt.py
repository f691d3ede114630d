"""PyJWT as a second opinion: it makes tokens that the proxy takes, and reads those that the proxy makes."""
import base64
import time
import uuid

import jwt
import pytest

import stack

KEYS = stack.ROOT / "tests/fixtures/keys"
KEY_FILES = {"RS256": "rsa2048.private.pem", "ES256": "p256.private.pem", "EdDSA": "ed25519.private.pem"}
SECRET = "a shared secret of more than thirty-two bytes"


def claims(**more):
    now = int(time.time())
    return {"sub": "made-by-pyjwt", "jti": str(uuid.uuid4()), "iss": "behavry", "iat": now, "exp": now + 3600,
            "roles": ["internal"], "permissions": ["web:read", "web:write"], "risk_tier": "medium"} | more


class Issuer:
    """A proxy with one key of ours, and what PyJWT needs to sign and to verify with it."""

    def __init__(self, folder, backend, algorithm):
        self.algorithm = algorithm
        if algorithm == "HS256":
            folder.mkdir()
            (folder / "secret").write_text(SECRET + "\n")
            (folder / "secret").chmod(0o600)
            (folder / "proxy.toml").write_text('[identity]\nsecret_file = "secret"\n')
            self.private, self.environment = SECRET, {"BEHAVRY_CONFIG": folder / "proxy.toml"}
        else:
            self.private = (KEYS / KEY_FILES[algorithm]).read_text()
            self.environment = {"BEHAVRY_JWT_PRIVATE_KEY": self.private}
        self.proxy = stack.Proxy(folder / "p", backend, **self.environment)
        self.client_id, self.client_secret = stack.first_agent(self.proxy.program)

    def status_for(self, token):
        return stack.call(self.proxy.base + "/api/tags", headers={"Authorization": f"Bearer {token}"}).status

    def tokens(self):
        """One from the endpoint and one from the command line, each with the agent it is for."""
        body = {"client_id": self.client_id, "client_secret": self.client_secret, "grant_type": "client_credentials"}
        granted = stack.call(self.proxy.origin + "/api/v1/auth/token", body)
        assert granted.status == 200
        return [(granted.json["access_token"], self.client_id), (self.proxy.mint(), "sdk-agent")]

    def key_for(self, token):
        if self.algorithm == "HS256":
            return SECRET
        keys = jwt.PyJWKClient(self.proxy.origin + "/.well-known/jwks.json")
        return keys.get_signing_key_from_jwt(token).key


@pytest.fixture(scope="module", params=[*KEY_FILES, "HS256"])
def issuer(request, tmp_path_factory, backend):
    made = Issuer(tmp_path_factory.mktemp("pyjwt") / request.param, backend, request.param)
    yield made
    made.proxy.stop()


@pytest.fixture(autouse=True)
def straight_to_loopback(monkeypatch):
    """PyJWKClient would ask a proxy of the environment's for a loopback URL."""
    monkeypatch.setenv("no_proxy", "*")


def test_a_token_that_pyjwt_made_with_our_key_is_taken(issuer, request_id):
    token = jwt.encode(claims(), issuer.private, algorithm=issuer.algorithm)
    assert issuer.status_for(token) == 200
    with_kid = jwt.encode(claims(), issuer.private, algorithm=issuer.algorithm, headers={"kid": "unknown"})
    assert issuer.status_for(with_kid) == (200 if issuer.algorithm == "HS256" else 401), "a name that no key of ours has"
    head = {"Authorization": f"Bearer {token}", "x-request-id": request_id}
    assert stack.call(issuer.proxy.base + "/api/version", headers=head).status == 200
    assert issuer.proxy.exchange(request_id).final["agent_id"] == "made-by-pyjwt"


def test_what_pyjwt_makes_badly_is_refused(issuer):
    now = int(time.time())
    for bad in (claims(exp=now - 60), claims(nbf=now + 600), claims(iss="other"), claims(aud="other"), {"sub": "a"}):
        assert issuer.status_for(jwt.encode(bad, issuer.private, algorithm=issuer.algorithm)) == 401, bad
    assert issuer.status_for(jwt.encode(claims(), None, algorithm="none")) == 401
    other = jwt.encode(claims(), "another secret of more than thirty-two bytes", algorithm="HS256")
    assert issuer.status_for(other) == 401


def test_pyjwt_verifies_the_tokens_that_are_made_here(issuer):
    for token, agent in issuer.tokens():
        read = jwt.decode(token, issuer.key_for(token), algorithms=[issuer.algorithm], issuer="behavry",
                          options={"require": ["sub", "jti", "iss", "exp", "iat"]})
        assert read["sub"] == agent and read["exp"] - read["iat"] == 3600
        assert {"web:read", "web:write"} <= set(read["permissions"])
        message, signature = token.rsplit(".", 1)
        raw = bytearray(base64.urlsafe_b64decode(signature + "=="))
        raw[-1] ^= 1
        with pytest.raises(jwt.InvalidSignatureError):
            jwt.decode(message + "." + stack.padless(bytes(raw)).decode(), issuer.key_for(token),
                       algorithms=[issuer.algorithm], issuer="behavry")


def test_a_shared_secret_is_not_published(issuer):
    keys = stack.call(issuer.proxy.origin + "/.well-known/jwks.json").json["keys"]
    assert len(keys) == (0 if issuer.algorithm == "HS256" else 1)
    assert all(key["alg"] == issuer.algorithm and "d" not in key and "k" not in key for key in keys)
