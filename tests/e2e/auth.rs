//! Who: tokens of every algorithm and from every source of keys, the attacks on them, the token endpoint, and what of a client's
//! head a backend never sees (contract, sections 1 and 2; promise I6).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use behavry_ollama_proxy::identity::issuer::Claims;
use behavry_ollama_proxy::identity::keys::VerificationKey;
use behavry_ollama_proxy::identity::secret::{Secret, SecretHash};
use behavry_ollama_proxy::identity::{Algorithm, Issuer, KeySet, SigningKey, Verifier, VerifierSettings};
use jsonwebtoken::EncodingKey;
use serde_json::{Value, json};

use crate::client::{Connection, Reply, Request};
use crate::house::{House, PATIENCE, Plan, wait_until};

macro_rules! key_file {
    ($name:literal) => {
        include_bytes!(concat!("../fixtures/keys/", $name))
    };
}

const RSA_PRIVATE: &[u8] = key_file!("rsa2048.private.pem");
const RSA_PUBLIC: &[u8] = key_file!("rsa2048.public.pem");
const P256_PRIVATE: &[u8] = key_file!("p256.private.pem");
const P256_PUBLIC: &[u8] = key_file!("p256.public.pem");
const ED25519_PRIVATE: &[u8] = key_file!("ed25519.private.pem");
const ED25519_PUBLIC: &[u8] = key_file!("ed25519.public.pem");
const SECRET: &[u8] = b"a test secret of more than thirty-two bytes";

/// More than the tests' refusals in a second, so that each has a record of its own.
const NO_FOLDING: &str = "[audit]\nrefusals_per_second = 100000\n";

/// Who signs in these tests: not the code under test.
#[derive(Clone, Copy)]
enum Signer {
    Rs256,
    Es256,
    EdDsa,
    Hs256(&'static [u8]),
}

impl Signer {
    fn name(self) -> &'static str {
        match self {
            Signer::Rs256 => "RS256",
            Signer::Es256 => "ES256",
            Signer::EdDsa => "EdDSA",
            Signer::Hs256(_) => "HS256",
        }
    }

    fn sign(self, message: &str) -> String {
        use jsonwebtoken::Algorithm;
        let (key, algorithm) = match self {
            Signer::Rs256 => (EncodingKey::from_rsa_pem(RSA_PRIVATE).unwrap(), Algorithm::RS256),
            Signer::Es256 => (EncodingKey::from_ec_pem(P256_PRIVATE).unwrap(), Algorithm::ES256),
            Signer::EdDsa => (EncodingKey::from_ed_pem(ED25519_PRIVATE).unwrap(), Algorithm::EdDSA),
            Signer::Hs256(secret) => (EncodingKey::from_secret(secret), Algorithm::HS256),
        };
        jsonwebtoken::crypto::sign(message.as_bytes(), &key, algorithm).unwrap()
    }

    fn token(self, header: &str, claims: &str) -> String {
        let message = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
        format!("{message}.{}", self.sign(&message))
    }

    /// A token with good claims.
    fn good(self) -> String {
        self.token(&json!({ "alg": self.name(), "typ": "JWT" }).to_string(), &good_claims().to_string())
    }
}

fn now_s() -> i64 {
    std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_secs() as i64
}

fn good_claims() -> Value {
    let now_s = now_s();
    json!({ "sub": "agent-1", "jti": "session-1", "iss": "behavry", "iat": now_s, "exp": now_s + 3600,
            "roles": ["internal"], "permissions": ["web:read", "web:write"], "risk_tier": "medium" })
}

fn claims_with(name: &str, value: Option<Value>) -> String {
    let mut claims = good_claims();
    match value {
        Some(value) => claims[name] = value,
        None => drop(claims.as_object_mut().unwrap().remove(name)),
    }
    claims.to_string()
}

fn chat() -> Request {
    let ask = json!({ "model": "tiny-story", "stream": false, "messages": [{ "role": "user", "content": "hi" }] });
    Request::post("/api/v1/ollama/api/chat", ask)
}

fn write(dir: &Path, name: &str, content: &[u8], mode: u32) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let path = dir.join(name);
    std::fs::write(&path, content).expect("written");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("ours");
    path
}

/// A proxy that believes what the lines of `[identity]` say, or a key in the environment.
async fn house_with_keys(identity: &str, env: Vec<(String, String)>) -> House {
    let config = format!("{NO_FOLDING}[identity]\n{identity}\n");
    House::with(Plan { config, env, no_key: true, ..Plan::default() }).await
}

// ---- sources of keys

#[tokio::test]
async fn a_token_of_each_algorithm_and_source_of_keys_passes_and_one_of_another_key_does_not() {
    let dir = tempfile::tempdir().expect("a folder");
    let rsa = write(dir.path(), "rsa.pem", RSA_PUBLIC, 0o644);
    let ed = write(dir.path(), "ed.pem", ED25519_PUBLIC, 0o644);
    let secret = write(dir.path(), "secret", &[SECRET, b"\n"].concat(), 0o600);
    let env_pem = vec![("BEHAVRY_JWT_PUBLIC_KEY".to_owned(), String::from_utf8_lossy(P256_PUBLIC).into_owned())];
    let file = |key: &str, path: &Path| format!("{key} = \"{}\"", path.display());
    for (good, identity, env, bad) in [
        (Signer::Rs256, file("public_key_file", &rsa), vec![], Signer::Hs256(RSA_PUBLIC)),
        (Signer::Es256, String::new(), env_pem, Signer::Rs256),
        (Signer::EdDsa, file("public_key_file", &ed), vec![], Signer::Es256),
        (
            Signer::Hs256(SECRET),
            file("secret_file", &secret),
            vec![],
            Signer::Hs256(b"another secret of more than 32 bytes"),
        ),
    ] {
        let house = house_with_keys(&identity, env).await;
        let reply = house.send(chat().bearer(&good.good()).id("good")).await;
        assert_eq!(reply.status, 200, "{}", good.name());
        let last = house.final_of("good").await;
        assert_eq!((&last["agent_id"], &last["session_id"]), (&json!("agent-1"), &json!("session-1")));
        assert_eq!(last["extra"]["agent_roles"], json!(["internal"]));
        let reply = house.send(chat().bearer(&bad.good())).await;
        assert_eq!((reply.status, reply.code()), (401, "invalid_token".to_owned()), "{}", good.name());
        assert_eq!(house.simulator.seen().len(), 1);
    }
}

#[tokio::test]
async fn the_keys_of_a_jwks_file_are_chosen_by_their_names() {
    let jwk = |pem: &[u8], kid: &str| {
        VerificationKey::from_pem(pem).unwrap().with_kid(kid.to_owned()).public_jwk().expect("a public key")
    };
    let keys = json!({ "keys": [jwk(RSA_PUBLIC, "r"), jwk(P256_PUBLIC, "e"), jwk(ED25519_PUBLIC, "d")] });
    let dir = tempfile::tempdir().expect("a folder");
    let path = write(dir.path(), "jwks.json", keys.to_string().as_bytes(), 0o644);
    let house = house_with_keys(&format!("jwks_file = \"{}\"", path.display()), vec![]).await;
    let token = |signer: Signer, kid: &str| {
        let header = json!({ "alg": signer.name(), "kid": kid });
        signer.token(&header.to_string(), &good_claims().to_string())
    };
    for (signer, kid) in [(Signer::Rs256, "r"), (Signer::Es256, "e"), (Signer::EdDsa, "d")] {
        assert_eq!(house.send(chat().bearer(&token(signer, kid))).await.status, 200, "{kid}");
    }
    for (signer, kid, cause) in [
        (Signer::Rs256, "e", "wrong_algorithm"),
        (Signer::Es256, "x", "unknown_key"),
        (Signer::EdDsa, "", "unknown_key"),
    ] {
        let id = format!("bad-{kid}");
        assert_eq!(house.send(chat().bearer(&token(signer, kid)).id(&id)).await.status, 401, "{kid}");
        assert_eq!(house.final_of(&id).await["error"], cause);
    }
    assert_eq!(house.simulator.seen().len(), 3);

    // Somebody else signs, so there is nobody here to fetch a token from.
    let ask = json!({ "client_id": "demo-agent", "client_secret": "x", "grant_type": "client_credentials" });
    assert_eq!(house.send(Request::post("/api/v1/auth/token", ask)).await.status, 404);
    assert!(!house.dir.path().join("state/agents.toml").exists(), "no agent is made where tokens come from elsewhere");
}

// ---- bad tokens

#[tokio::test]
async fn every_bad_token_gets_one_answer_and_only_the_audit_knows_its_cause() {
    let dir = tempfile::tempdir().expect("a folder");
    let key = write(dir.path(), "key.pem", P256_PUBLIC, 0o644);
    let house = house_with_keys(&format!("public_key_file = \"{}\"", key.display()), vec![]).await;
    let es256 = |claims: &str| Signer::Es256.token(r#"{"alg":"ES256","typ":"JWT"}"#, claims);
    let headed = |header: Value| Signer::Es256.token(&header.to_string(), &good_claims().to_string());
    let good = Signer::Es256.good();
    let (message, signature) = good.rsplit_once('.').unwrap();
    let (header, _) = message.split_once('.').unwrap();
    let promoted = URL_SAFE_NO_PAD.encode(claims_with("permissions", Some(json!(["ollama:admin"]))));
    let unsigned = URL_SAFE_NO_PAD.encode(r#"{"alg":"none"}"#);
    let now_s = now_s();
    let nine: Vec<String> = (0..9).map(|n| format!("r{n}")).collect();
    let bearer = |token: String| vec![("authorization", format!("Bearer {token}"))];
    let attacks: Vec<(&str, Vec<(&str, String)>)> = vec![
        ("wrong_algorithm", bearer(format!("{unsigned}.{}.", URL_SAFE_NO_PAD.encode(good_claims().to_string())))),
        ("wrong_algorithm", bearer(Signer::Hs256(P256_PUBLIC).good())),
        ("bad_signature", bearer(format!("{header}.{promoted}.{signature}"))),
        ("bad_signature", bearer(format!("{message}.{}", URL_SAFE_NO_PAD.encode([0; 64])))),
        ("unsupported_header", bearer(headed(json!({ "alg": "ES256", "jku": "http://127.0.0.1:1/keys" })))),
        ("unsupported_header", bearer(headed(json!({ "alg": "ES256", "crit": ["x"], "x": 1 })))),
        ("duplicate_member", bearer(es256(&good_claims().to_string().replacen('{', r#"{"sub":"root","#, 1)))),
        ("expired", bearer(es256(&claims_with("exp", Some(json!(now_s - 40)))))),
        ("not_yet_valid", bearer(es256(&claims_with("nbf", Some(json!(now_s + 3000)))))),
        ("missing_claim", bearer(es256(&claims_with("exp", None)))),
        ("bad_claim", bearer(es256(&claims_with("exp", Some(json!((now_s + 60).to_string())))))),
        ("bad_claim", bearer(es256(&claims_with("sub", Some(json!("a\nb")))))),
        ("wrong_issuer", bearer(es256(&claims_with("iss", Some(json!("else")))))),
        ("wrong_audience", bearer(es256(&claims_with("aud", Some(json!("else")))))),
        ("not_an_agent", bearer(es256(&claims_with("jti", None)))),
        ("too_many_roles", bearer(es256(&claims_with("roles", Some(json!(nine)))))),
        ("malformed", bearer("not-a-token".to_owned())),
        ("oversized", bearer("a".repeat(9000))),
        ("not_bearer", vec![("authorization", format!("Basic {good}"))]),
        ("repeated_credential", [bearer(good.clone()), bearer(good.clone())].concat()),
        ("repeated_credential", vec![("x-api-key", good.clone()), ("x-api-key", good.clone())]),
        ("conflicting_credentials", [bearer(good.clone()), vec![("x-api-key", Signer::Rs256.good())]].concat()),
        ("conflicting_credentials", vec![("x-api-key", good.clone()), ("authorization", "Bearer ".to_owned())]),
    ];
    let mut answers = std::collections::BTreeSet::new();
    let mut counts: BTreeMap<&str, u32> = BTreeMap::new();
    for (n, (cause, headers)) in attacks.iter().enumerate() {
        let id = format!("bad-{n}");
        let request = headers.iter().fold(chat().id(&id), |request, (name, value)| request.header(name, value));
        let reply = house.send(request).await;
        assert_eq!(reply.status, 401, "{cause} ({n})");
        assert_eq!(reply.header("x-request-id"), Some(id.as_str()));
        let plain = |(name, value): &(String, String)| {
            let own = ["x-request-id", "date"].iter().any(|own| name.eq_ignore_ascii_case(own));
            (!own).then(|| format!("{name}: {value}"))
        };
        let headers: Vec<String> = reply.headers.iter().filter_map(plain).collect();
        answers.insert((headers, reply.text()));
        let last = house.final_of(&id).await;
        assert_eq!(last["error"], *cause, "attack {n}");
        assert_eq!((&last["policy_result"], &last["policy_id"]), (&json!("deny"), &Value::Null));
        assert_eq!(
            (&last["agent_id"], &last["extra"]["outcome"]),
            (&Value::Null, &json!("refused")),
            "nobody is named"
        );
        *counts.entry(cause).or_default() += 1;
    }
    assert_eq!(answers.len(), 1, "one answer for all: {answers:?}");
    let (headers, body) = answers.first().expect("one");
    assert!(headers.iter().any(|header| header.eq_ignore_ascii_case("www-authenticate: Bearer")), "{headers:?}");
    assert!(body.contains("invalid_token") && body.contains("POST /api/v1/auth/token"), "{body}");
    assert_eq!(house.simulator.connections(), 0, "a refused request opens no connection");

    let metrics = house.metrics().await;
    for (cause, count) in counts {
        let line = format!("behavry_ollama_token_verification_failures_total{{cause=\"{cause}\"}} {count}");
        assert!(metrics.lines().any(|have| have == line), "{line}");
    }
    let (log, audit) = (house.log(), house.audit_text());
    for (_, headers) in &attacks {
        for (_, value) in headers {
            let Some((_, tail)) = value.rsplit_once('.').filter(|(_, tail)| tail.len() > 40) else { continue };
            assert!(!log.contains(tail) && !audit.contains(tail), "a token was written down");
        }
    }
    assert_eq!(house.send(chat().bearer(&good)).await.status, 200, "the good one still passes");
}

#[tokio::test]
async fn a_token_may_come_in_either_header_or_in_both_and_clocks_may_differ_a_little() {
    let house = House::open().await;
    let token = house.token();
    assert_eq!(house.send(chat().header("X-Api-Key", &token)).await.status, 200);
    assert_eq!(house.send(chat().header("authorization", &format!("bEARER  {token}"))).await.status, 200);
    assert_eq!(house.send(chat().bearer(&token).header("x-api-key", &token)).await.status, 200);
    for request in [chat(), chat().header("authorization", "Bearer "), chat().header("x-api-key", "")] {
        let reply = house.send(request).await;
        assert_eq!((reply.status, reply.code()), (401, "missing_token".to_owned()));
    }
    let expired = claims_with("exp", Some(json!(now_s() - 10)));
    let just = Signer::EdDsa.token(r#"{"alg":"EdDSA"}"#, &expired);
    assert_eq!(house.send(chat().bearer(&just)).await.status, 200, "identity.leeway_s is 30");
    let eight: Vec<String> = (0..8).map(|n| format!("r{n}")).collect();
    let eight = Signer::EdDsa.token(r#"{"alg":"EdDSA"}"#, &claims_with("roles", Some(json!(eight))));
    assert_eq!(house.send(chat().bearer(&eight)).await.status, 200, "eight roles are not too many");
}

#[tokio::test]
async fn an_audience_once_configured_is_required_and_put_into_tokens_made_here() {
    let house = House::with(Plan {
        config: "[identity]\naudience = \"ollama\"\nissuer = \"elsewhere\"\nleeway_s = 0\n".to_owned(),
        ..Plan::default()
    })
    .await;
    let sign = |claims: Value| Signer::EdDsa.token(r#"{"alg":"EdDSA"}"#, &claims.to_string());
    let mut claims = good_claims();
    claims["iss"] = json!("elsewhere");
    assert_eq!(house.send(chat().bearer(&sign(claims.clone()))).await.status, 401, "without aud");
    for (audience, status) in [(json!("other"), 401), (json!("ollama"), 200), (json!(["other", "ollama"]), 200)] {
        claims["aud"] = audience;
        assert_eq!(house.send(chat().bearer(&sign(claims.clone()))).await.status, status, "{}", claims["aud"]);
    }
    claims["exp"] = json!(now_s() - 2);
    assert_eq!(house.send(chat().bearer(&sign(claims))).await.status, 401, "no leeway is granted");
}

// ---- scopes

#[tokio::test]
async fn each_class_of_endpoint_needs_its_permission_and_the_403_names_it() {
    let house = House::open().await;
    let digest = format!("/api/blobs/sha256:{}", "0".repeat(64));
    let body = || json!({ "model": "tiny-story", "prompt": "hi", "stream": false });
    let read = |path: &str| Request::get(path);
    let (write, manage) = (["web:read", "ollama:admin"], ["web:read", "web:write"]);
    let cases: Vec<(Request, &[&str], &str)> = vec![
        (read("/"), &["web:write"], "web:read"),
        (read("/api/version"), &["web:write"], "web:read"),
        (read("/api/tags"), &["web:write"], "web:read"),
        (read("/api/ps"), &["web:write"], "web:read"),
        (read("/v1/models"), &["web:write"], "web:read"),
        (read("/v1/models/tiny"), &["web:write"], "web:read"),
        (Request::post("/api/show", body()), &["web:write"], "web:read"),
        (Request::post("/api/chat", body()), &write, "web:write"),
        (Request::post("/api/generate", body()), &write, "web:write"),
        (Request::post("/api/embed", body()), &write, "web:write"),
        (Request::post("/v1/chat/completions", body()), &write, "web:write"),
        (Request::post("/v1/completions", body()), &write, "web:write"),
        (Request::post("/v1/embeddings", body()), &write, "web:write"),
        (Request::post("/api/pull", body()), &manage, "ollama:admin"),
        (Request::post("/api/push", body()), &manage, "ollama:admin"),
        (Request::post("/api/create", body()), &manage, "ollama:admin"),
        (Request::post("/api/copy", body()), &manage, "ollama:admin"),
        (Request { method: "DELETE".into(), ..Request::post("/api/delete", body()) }, &manage, "ollama:admin"),
        (Request::new("HEAD", &digest), &manage, "ollama:admin"),
        (Request::new("POST", &digest).body("x"), &manage, "ollama:admin"),
        (Request::post("/api/pull", body()), &["ollama:admin", "web:write"], "web:read"),
        (Request::post("/api/pull", body()), &["ollama:admin", "web:read"], "web:write"),
        (read("/api/tags"), &["WEB:READ", "web:*", "web:reads", ""], "web:read"),
    ];
    for (n, (request, permissions, missing)) in cases.into_iter().enumerate() {
        let permissions: Vec<&str> = permissions.iter().copied().filter(|p| !p.is_empty()).collect();
        let (head_only, id) = (request.method == "HEAD", format!("scope-{n}"));
        let what = format!("{} {}", request.method, request.path);
        let reply = house.send(request.bearer(&house.token_with(&[], &permissions)).id(&id)).await;
        assert_eq!(reply.status, 403, "{what}");
        assert_eq!(reply.header("x-should-retry"), Some("false"), "{what}");
        if !head_only {
            assert_eq!(reply.code(), "insufficient_scope", "{what}");
            let detail = reply.json()["detail"].as_str().unwrap().to_owned();
            assert!(detail.contains(&format!("permission {missing}.")), "{what}: {detail}");
        }
        let last = house.final_of(&id).await;
        assert_eq!(last["error"], format!("missing permission {missing}"), "{what}");
        assert_eq!(last["agent_id"], "tester");
    }
    assert_eq!(house.simulator.connections(), 0);
    assert_eq!(house.send(Request::get("/api/tags").bearer(&house.token_with(&[], &["web:read"]))).await.status, 200);
    assert_eq!(house.send(chat().bearer(&house.token_with(&[], &["web:write"]))).await.status, 200);
}

// ---- the token endpoint

/// An agents file: `worker` may work, `idle` is suspended, `nobody` has no secret.
fn agents_file(worker: &Secret, idle: &Secret) -> String {
    format!(
        "[[agent]]\nid = \"worker\"\nroles = [\"internal\"]\npermissions = [\"web:read\", \"web:write\"]\n\
         risk_tier = \"low\"\nsecret_hash = \"{}\"\n\n\
         [[agent]]\nid = \"idle\"\nstate = \"suspended\"\nsecret_hash = \"{}\"\n\n[[agent]]\nid = \"nobody\"\n",
        SecretHash::of(worker).as_str(),
        SecretHash::of(idle).as_str()
    )
}

struct Office {
    house: House,
    worker: Secret,
    idle: Secret,
    agents: PathBuf,
    _dir: tempfile::TempDir,
}

impl Office {
    async fn open() -> Office {
        let (worker, idle) = (Secret::random(), Secret::random());
        let dir = tempfile::tempdir().expect("a folder");
        let agents = write(dir.path(), "agents.toml", agents_file(&worker, &idle).as_bytes(), 0o600);
        let house = House::with(Plan {
            config: format!("{NO_FOLDING}[policy]\nreload_s = 1\n"),
            env: vec![("BEHAVRY_AGENTS_FILE".to_owned(), agents.display().to_string())],
            ..Plan::default()
        })
        .await;
        Office { house, worker, idle, agents, _dir: dir }
    }

    /// Whole or not at all: between truncating and writing a file, there would be no agents in it.
    fn replace_agents(&self, text: &str) {
        let new = write(self.agents.parent().expect("a folder"), "new", text.as_bytes(), 0o600);
        std::fs::rename(new, &self.agents).expect("renamed");
    }

    async fn ask(&self, id: &str, secret: &Secret) -> Reply {
        self.house.send(ask_json(id, secret.expose())).await
    }
}

fn ask_json(id: &str, secret: &str) -> Request {
    let ask = json!({ "client_id": id, "client_secret": secret, "grant_type": "client_credentials" });
    Request::post("/api/v1/auth/token", ask)
}

fn form(body: &str) -> Request {
    Request::new("POST", "/api/v1/auth/token").header("content-type", "application/x-www-form-urlencoded").body(body)
}

#[tokio::test]
async fn the_token_endpoint_gives_a_token_that_works_for_json_and_for_a_form() {
    let office = Office::open().await;
    let house = &office.house;
    let secret = office.worker.expose();
    let as_form = format!("grant_type=client_credentials&client_id=worker&client_secret={secret}&scope=ignored");
    for (n, request) in [ask_json("worker", secret), form(&as_form)].into_iter().enumerate() {
        let reply = house.send(request.id(&format!("token-{n}"))).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        assert_eq!(reply.header("cache-control"), Some("no-store"));
        assert_eq!(reply.header("x-behavry-backend"), None);
        let granted = reply.json();
        let token = granted["access_token"].as_str().expect("a token").to_owned();
        let rest = json!({ "access_token": token, "token_type": "Bearer", "expires_in": 3600, "agent_id": "worker", "risk_tier": "low" });
        assert_eq!(granted, rest);
        let id = format!("chat-{n}");
        assert_eq!(house.send(chat().bearer(&token).id(&id)).await.status, 200);
        let last = house.final_of(&id).await;
        assert_eq!((&last["agent_id"], &last["extra"]["agent_roles"]), (&json!("worker"), &json!(["internal"])));

        let records = house.records_of(&format!("token-{n}")).await;
        assert_eq!(records.len(), 1, "one final record, and nothing for a backend");
        assert_eq!((&records[0]["agent_id"], &records[0]["policy_result"]), (&json!("worker"), &json!("allow")));
        assert_eq!((&records[0]["target"], &records[0]["response_code"]), (&json!("/api/v1/auth/token"), &json!(200)));
        let written = house.log() + &house.audit_text();
        assert!(!written.contains(secret) && !written.contains(&token), "a secret was written down");
    }
    // While tokens are being made, requests are served.
    let token = house.token();
    let asks = (0..6).map(|_| office.ask("worker", &office.worker));
    let (replies, served) = tokio::join!(futures::future::join_all(asks), house.send(chat().bearer(&token)));
    assert!(replies.iter().all(|reply| reply.status == 200));
    assert_eq!(served.status, 200);
}

#[tokio::test]
async fn a_wrong_id_and_a_wrong_secret_get_the_same_answer_and_a_suspended_agent_another() {
    let office = Office::open().await;
    let house = &office.house;
    let wrong = Secret::random();
    let mut answers = std::collections::BTreeSet::new();
    for (n, (id, secret)) in
        [("worker", &wrong), ("stranger", &wrong), ("stranger", &office.worker), ("nobody", &wrong), ("idle", &wrong)]
            .into_iter()
            .enumerate()
    {
        let request_id = format!("wrong-{n}");
        let reply = house.send(ask_json(id, secret.expose()).id(&request_id)).await;
        assert_eq!(reply.status, 401);
        assert_eq!(reply.header("cache-control"), Some("no-store"));
        answers.insert(reply.text());
        let last = house.final_of(&request_id).await;
        assert_eq!((&last["error"], &last["policy_result"]), (&json!("invalid_client"), &json!("deny")));
    }
    let only = json!({ "error": "invalid_client", "detail": "Invalid client_id or client_secret" });
    assert_eq!(answers.into_iter().collect::<Vec<_>>(), [only.to_string()]);

    let reply = office.ask("idle", &office.idle).await;
    assert_eq!((reply.status, &reply.json()["error"]), (403, &json!("unauthorized_client")));
    assert_eq!(house.simulator.connections(), 0);
}

#[tokio::test]
async fn what_is_no_token_request_is_refused_with_rfc_6749s_word() {
    let office = Office::open().await;
    let house = &office.house;
    let raw =
        |body: &str| Request::new("POST", "/api/v1/auth/token").header("content-type", "application/json").body(body);
    for (request, error) in [
        (raw(r#"{"client_id":"worker","client_secret":"x","grant_type":"password"}"#), "unsupported_grant_type"),
        (form("client_id=worker&client_secret=x&grant_type=authorization_code"), "unsupported_grant_type"),
        (raw(r#"{"client_id":"worker","client_secret":"x"}"#), "invalid_request"),
        (
            raw(r#"{"client_id":"idle","client_id":"worker","client_secret":"x","grant_type":"client_credentials"}"#),
            "invalid_request",
        ),
        (form("client_id=worker&client_id=idle&client_secret=x&grant_type=client_credentials"), "invalid_request"),
        (form("client_id=worker&client_secret=%zz&grant_type=client_credentials"), "invalid_request"),
        (raw("[]"), "invalid_request"),
        (raw(""), "invalid_request"),
        (raw(r#"{"client_id":1,"client_secret":"x","grant_type":"client_credentials"}"#), "invalid_request"),
        (Request::new("POST", "/api/v1/auth/token").body("{}"), "invalid_request"),
    ] {
        let reply = house.send(request).await;
        assert_eq!(reply.status, 400, "{}", reply.text());
        assert_eq!(reply.json()["error"], error, "{}", reply.text());
        assert!(reply.json()["detail"].is_string());
        assert_eq!(reply.header("cache-control"), Some("no-store"));
    }
    let reply = house.send(Request::get("/api/v1/auth/token")).await;
    assert_eq!((reply.status, reply.header("allow")), (405, Some("POST")));
    let reply = house.send(Request::get("/api/v1/auth/token/")).await;
    assert_eq!(reply.status, 404);
}

#[tokio::test]
async fn a_token_request_of_any_size_is_refused_at_its_limit_and_not_held() {
    let house = House::open().await;
    let large = "x".repeat(17 * 1024);
    let reply = house.send(ask_json("worker", &large)).await;
    assert_eq!((reply.status, reply.code()), (413, "body_too_large".to_owned()));
    // A stranger's body that never ends is not read to its end: the limit of the endpoint holds, not that of chat.
    let mut connection = Connection::open(house.public).await;
    let mut unended = ask_json("worker", &large).chunked(1 << 20);
    let head = unended.head_bytes();
    unended.body = unended.body.map(|body| [format!("{:x}\r\n", body.len()).as_bytes(), &body, b"\r\n"].concat());
    connection.write(&head).await;
    connection.write(unended.body.as_deref().expect("set")).await;
    let reply = connection.reply(false).await.expect("an answer before the body's end");
    assert_eq!((reply.status, reply.code()), (413, "body_too_large".to_owned()));
}

#[tokio::test]
async fn an_agents_file_is_reloaded_while_running_and_a_broken_one_is_not() {
    let office = Office::open().await;
    let house = &office.house;
    assert_eq!(office.ask("worker", &office.worker).await.status, 200);
    let good = std::fs::read_to_string(&office.agents).unwrap();

    office.replace_agents(&good.replacen("id = \"worker\"", "id = \"worker\"\nstate = \"suspended\"", 1));
    eventually(house, || office.ask("worker", &office.worker), 403).await;

    office.replace_agents("[[agent]\n");
    wait_until("the broken file is seen", || house.log().contains("not reloaded").then_some(())).await;
    assert_eq!(office.ask("worker", &office.worker).await.status, 403, "the last good one stays");
    assert!(house.metrics().await.contains(r#"behavry_ollama_reload_failures_total{what="agents"} 1"#));
    let log = house.log();
    assert!(log.contains(&format!("{}:1:", office.agents.display())), "the line is named: {log}");

    office.replace_agents(&good);
    eventually(house, || office.ask("worker", &office.worker), 200).await;
}

/// Asks until the status is the one that a reload brings.
async fn eventually<F: Future<Output = Reply>>(house: &House, ask: impl Fn() -> F, status: u16) {
    let began = std::time::Instant::now();
    while ask().await.status != status {
        assert!(began.elapsed() < PATIENCE, "the change was not taken:\n{}", house.log());
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn the_published_key_set_verifies_the_tokens_that_are_made_here() {
    let office = Office::open().await;
    let reply = office.house.send(Request::get("/.well-known/jwks.json").id("keys")).await;
    assert_eq!(reply.status, 200, "anybody may read it");
    let keys = reply.json();
    assert_eq!(keys["keys"].as_array().map(Vec::len), Some(1));
    assert!(keys["keys"][0].get("d").is_none(), "the private half is not in it");
    let granted = office.ask("worker", &office.worker).await.json();
    let token = granted["access_token"].as_str().unwrap();
    let header: Value =
        serde_json::from_slice(&URL_SAFE_NO_PAD.decode(token.split('.').next().unwrap()).unwrap()).unwrap();
    assert_eq!(header["kid"], keys["keys"][0]["kid"]);
    assert_eq!(header["alg"], keys["keys"][0]["alg"]);
    let settings = VerifierSettings { issuer: "behavry".to_owned(), audience: None, leeway_s: 0 };
    let verifier = Verifier::new(KeySet::from_jwks(&reply.body).expect("a key set"), settings);
    assert_eq!(verifier.verify_token(token, now_s()).expect("it holds").agent_id, "worker");
    let other = Issuer::new(SigningKey::generate(Algorithm::EdDsa).unwrap(), "behavry", 60);
    let (forged, _) = other.mint(&Claims { sub: "worker".into(), ..Claims::default() }, now_s()).unwrap();
    assert!(verifier.verify_token(&forged, now_s()).is_err());
    assert_eq!(office.house.final_of("keys").await["policy_result"], "allow");
    assert_eq!(office.house.simulator.connections(), 0);
}

// ---- what a backend sees of a client's head

/// A request with everything that clients, browsers, gateways and attackers put into heads.
fn loaded(request: Request, token: &str) -> Request {
    [
        ("authorization", &*format!("Bearer {token}")),
        ("x-api-key", token),
        ("cookie", "session=secret"),
        ("origin", "http://evil.example"),
        ("referer", "http://evil.example/page"),
        ("x-forwarded-for", "10.0.0.1"),
        ("x-forwarded-host", "evil.example"),
        ("x-forwarded-proto", "https"),
        ("x-real-ip", "10.0.0.1"),
        ("forwarded", "for=10.0.0.1;host=evil.example"),
        ("via", "1.1 other"),
        ("connection", "x-foo, x-foo, keep-alive, tracestate"),
        ("x-foo", "bar"),
        ("te", "trailers"),
        ("keep-alive", "timeout=5"),
        ("proxy-authorization", "Basic YTpi"),
        ("proxy-connection", "keep-alive"),
        ("x-behavry-priority", "high"),
        ("x-requester-id", "somebody"),
        ("x-agent-id", "root"),
        ("x-user", "root"),
        ("authorization_", "x"),
        ("accept-encoding", "gzip, zstd"),
        ("accept-language", "de"),
        ("if-none-match", "\"x\""),
        ("range", "bytes=0-1"),
        ("x-http-method-override", "DELETE"),
        ("x-original-url", "/api/delete"),
        ("openai-organization", "org"),
        ("x-stainless-lang", "python"),
        ("accept", "application/json"),
        ("user-agent", "tester/1.0"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("tracestate", "a=b"),
        ("anthropic-version", "2023-06-01"),
        ("anthropic-beta", "x"),
        ("x-request-id", "loaded"),
    ]
    .into_iter()
    .fold(request, |request, (name, value)| request.header(name, value))
}

/// The head that the simulator saw, names in lower case.
fn seen_headers(house: &House) -> Vec<BTreeMap<String, String>> {
    let heads = house.simulator.seen();
    heads
        .into_iter()
        .map(|seen| {
            let count = seen.headers.len();
            let map: BTreeMap<String, String> =
                seen.headers.into_iter().map(|(name, value)| (name.to_ascii_lowercase(), value)).collect();
            assert_eq!(map.len(), count, "no header comes twice");
            map
        })
        .collect()
}

#[tokio::test]
async fn only_the_allowed_headers_of_a_client_reach_a_backend() {
    let house = House::open().await;
    let reply = house.send(loaded(chat(), &house.token())).await;
    assert_eq!(reply.status, 200);
    let length = chat().body.unwrap().len().to_string();
    let host = house.simulator.addr().to_string();
    let wanted: BTreeMap<String, String> = [
        ("host", host.as_str()),
        ("accept-encoding", "identity"),
        ("x-request-id", "loaded"),
        ("content-type", "application/json"),
        ("accept", "application/json"),
        ("user-agent", "tester/1.0"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("anthropic-version", "2023-06-01"),
        ("anthropic-beta", "x"),
        ("content-length", length.as_str()),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .collect();
    assert_eq!(seen_headers(&house), [wanted], "and `tracestate` is nominated by `connection`");
}

#[tokio::test]
async fn no_route_lets_a_credential_or_an_identity_through() {
    let house = House::open().await;
    let token = house.token_with(&[], &["web:read", "web:write", "ollama:admin"]);
    let digest = "/api/blobs/sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    let model = json!({ "model": "tiny-story", "prompt": "hi", "messages": [{ "role": "user", "content": "hi" }], "max_tokens": 4 });
    let stream = json!({ "model": "tiny-story", "stream": true, "messages": [{ "role": "user", "content": "hi" }] });
    let requests = [
        Request::get("/"),
        Request::new("HEAD", "/"),
        Request::get("/api/version"),
        Request::get("/api/tags"),
        Request::new("HEAD", "/api/tags"),
        Request::get("/api/ps"),
        Request::get("/v1/models"),
        Request::get("/v1/models/tiny-story"),
        Request::post("/api/show", json!({ "model": "tiny-story" })),
        Request::post("/api/generate", model.clone()),
        Request::post("/v1/chat/completions", stream),
        Request::post("/v1/completions", model.clone()),
        Request::post("/v1/messages", model),
        Request::post("/api/pull", json!({ "model": "tiny-story" })),
        Request::new("POST", digest).body("abc"),
        Request::new("POST", digest).body("abc").chunked(2),
        Request::new("HEAD", digest),
    ];
    let count = requests.len();
    for request in requests {
        let what = format!("{} {}", request.method, request.path);
        let reply = house.send(loaded(request, &token)).await;
        assert!(reply.status < 300, "{what}: {}", reply.status);
    }
    let allowed = [
        "host",
        "accept-encoding",
        "x-request-id",
        "content-type",
        "accept",
        "user-agent",
        "traceparent",
        "anthropic-version",
        "anthropic-beta",
        "content-length",
        "transfer-encoding",
    ];
    let heads = seen_headers(&house);
    assert_eq!(heads.len(), count);
    for (head, seen) in heads.iter().zip(house.simulator.seen()) {
        for (name, value) in head {
            assert!(allowed.contains(&name.as_str()), "{} {}: {name}", seen.method, seen.target);
            assert!(!value.contains(&token));
        }
        assert_eq!(head["host"], house.simulator.addr().to_string());
        assert_eq!(head["x-request-id"], "loaded");
        assert_eq!(head["accept-encoding"], "identity");
    }
}

#[tokio::test]
async fn a_protected_backend_gets_its_own_bearer_on_every_request() {
    let house = House::with(Plan {
        config: "[catalogue]\nrefresh_s = 1\n".to_owned(),
        env: vec![("BEHAVRY_OLLAMA_API_KEY".to_owned(), "key-of-the-backend".to_owned())],
        ..Plan::default()
    })
    .await;
    let stream = json!({ "model": "tiny-story", "stream": true, "messages": [{ "role": "user", "content": "hi" }] });
    let token = house.token();
    for request in [
        chat(),
        Request::post("/api/chat", stream.clone()),
        Request::post("/v1/chat/completions", stream),
        Request::get("/api/tags"),
        Request::get("/v1/models"),
        Request::get("/api/version"),
        Request::post("/api/embed", json!({ "model": "tiny-embed", "input": "hi" })),
    ] {
        assert_eq!(house.send(request.bearer(&token)).await.status, 200);
    }
    let seen = house
        .simulator
        .wait_for(PATIENCE, |seen| {
            seen.len() >= 8 && seen.iter().any(|one| one.header("x-request-id") == Some("catalogue"))
        })
        .await
        .expect("the catalogue looks too");
    for one in seen {
        assert_eq!(one.header("authorization"), Some("Bearer key-of-the-backend"), "{} {}", one.method, one.target);
    }
    let written = house.log() + &house.audit_text() + &house.metrics().await;
    assert!(!written.contains("key-of-the-backend"));
}

#[tokio::test]
async fn a_callers_request_id_is_kept_if_it_is_a_good_one_and_replaced_if_not() {
    let house = House::open().await;
    let longest = "i".repeat(128);
    for id in ["a", "01-abc_DEF.~!", longest.as_str()] {
        house.simulator.forget();
        let reply = house.send(chat().bearer(&house.token()).id(id)).await;
        assert_eq!(reply.header("x-request-id"), Some(id));
        assert_eq!(house.simulator.seen()[0].header("x-request-id"), Some(id));
        assert_eq!(house.final_of(id).await["extra"]["request_id"], id);
    }
    let long = "i".repeat(129);
    let mut fresh = std::collections::BTreeSet::new();
    for id in ["", "a b", "\u{e4}", "a\tb", long.as_str()] {
        house.simulator.forget();
        let reply = house.send(chat().bearer(&house.token()).id(id)).await;
        assert_eq!(reply.status, 200, "{id:?}");
        let own = reply.header("x-request-id").expect("always there").to_owned();
        assert!(own != id && own.len() == 32 && own.bytes().all(|b| b.is_ascii_alphanumeric()), "{own}");
        assert_eq!(house.simulator.seen()[0].header("x-request-id"), Some(own.as_str()));
        house.final_of(&own).await;
        fresh.insert(own);
    }
    assert_eq!(fresh.len(), 5, "each its own");
}
