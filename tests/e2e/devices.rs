//! Devices: what Ollama's own client signs under `OLLAMA_AUTH` stands for the agent that the key was tied to (contract, section 2).
//! The signatures are made here, after Ollama's source; the real command is tried in `tests/sdk/test_ollama_cli.py`.

use base64::{Engine, engine::general_purpose::STANDARD, engine::general_purpose::STANDARD_NO_PAD};
use ed25519_dalek::{Signer, SigningKey};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::client::Request;
use crate::keyholders::Keyholders;

/// Somebody's laptop.
struct Device(SigningKey);

impl Device {
    fn new(seed: u8) -> Device {
        Device(SigningKey::from_bytes(&[seed; 32]))
    }

    fn blob(&self) -> Vec<u8> {
        [&b"\0\0\0\x0bssh-ed25519\0\0\0\x20"[..], self.0.verifying_key().as_bytes()].concat()
    }

    fn line(&self) -> String {
        format!("ssh-ed25519 {} me@laptop", STANDARD.encode(self.blob()))
    }

    fn fingerprint(&self) -> String {
        format!("SHA256:{}", STANDARD_NO_PAD.encode(Sha256::digest(self.blob())))
    }

    /// The value for a message as `METHOD,/path?ts=UNIX`.
    fn signs(&self, message: &str) -> String {
        format!("{}:{}", STANDARD.encode(self.blob()), STANDARD.encode(self.0.sign(message.as_bytes()).to_bytes()))
    }

    /// A request as the client sends it: Ollama's own path is signed, `base` comes before it on the wire.
    fn request(&self, method: &str, base: &str, path: &str) -> Request {
        let ts = now_s();
        Request::new(method, &format!("{base}{path}?ts={ts}"))
            .header("authorization", &self.signs(&format!("{method},{path}?ts={ts}")))
    }

    fn chat(&self, base: &str) -> Request {
        let body = json!({ "model": "tiny-story", "stream": false, "messages": [{ "role": "user", "content": "hi" }] });
        self.request("POST", base, "/api/chat").header("content-type", "application/json").body(body.to_string())
    }
}

fn now_s() -> i64 {
    std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_secs() as i64
}

fn agent(id: &str, device: &Device, more: &str) -> String {
    format!(
        "[[agent]]\nid = \"{id}\"\nroles = [\"internal\"]\npermissions = [\"web:read\", \"web:write\"]\n\
         device_keys = [\"{}\"]\n{more}\n",
        device.line()
    )
}

#[tokio::test]
async fn ollamas_client_is_served_as_the_agent_that_its_key_was_tied_to() {
    let device = Device::new(1);
    let place = Keyholders::open(&agent("ann", &device, "name = \"Ann\"\nrisk_tier = \"low\""), "").await;
    for base in ["", "/api/v1/ollama"] {
        let requests = [
            device.request("HEAD", base, "/"),
            device.request("GET", base, "/api/tags"),
            device.request("GET", base, "/api/ps"),
            device.request("GET", base, "/api/version"),
            device.chat(base),
        ];
        for (at, request) in requests.into_iter().enumerate() {
            let id = format!("req-{}-{at}", base.len());
            let what = format!("{} {}", request.method, request.path);
            assert_eq!(place.house.send(request.id(&id)).await.status, 200, "{what}");
            let last = place.house.final_of(&id).await;
            assert_eq!(last["agent_id"], "ann", "{what}");
            assert_eq!(last["session_id"], *device.fingerprint(), "{what}: the key is named");
            assert_eq!(last["extra"]["agent_roles"], json!(["internal"]), "{what}");
        }
    }
}

#[tokio::test]
async fn the_base_without_its_slash_is_signed_as_the_root() {
    let device = Device::new(1);
    let place = Keyholders::open(&agent("ann", &device, ""), "").await;
    let ts = now_s();
    let request = Request::new("HEAD", &format!("/api/v1/ollama?ts={ts}"));
    let request = request.header("authorization", &device.signs(&format!("HEAD,/?ts={ts}")));
    assert_eq!(place.house.send(request).await.status, 200);
}

#[tokio::test]
async fn neither_the_signature_nor_its_time_reaches_a_backend_and_the_rest_of_the_query_does() {
    let device = Device::new(1);
    let place = Keyholders::open(&agent("ann", &device, ""), "").await;
    let ts = now_s();
    let authorization = device.signs(&format!("GET,/api/version?ts={ts}"));
    for (query, sent) in [
        (format!("ts={ts}"), "/api/version"),
        (format!("a=%2F+%41&ts={ts}&b&c=a[]"), "/api/version?a=%2F+%41&b&c=a[]"),
        (format!("ts={ts}&%74s=1"), "/api/version?%74s=1"),
    ] {
        place.house.simulator.forget();
        let request = Request::get(&format!("/api/version?{query}")).header("authorization", &authorization);
        assert_eq!(place.house.send(request).await.status, 200, "{query}");
        let seen = place.house.simulator.seen();
        assert_eq!(seen[0].target, sent);
        assert_eq!(seen[0].header("authorization"), None);
    }
    place.house.simulator.forget();
    let token = place.house.token();
    assert_eq!(place.house.send(Request::get("/api/version?ts=1&a").bearer(&token)).await.status, 200);
    assert_eq!(place.house.simulator.seen()[0].target, "/api/version?ts=1&a", "a token's query is left alone");
    let signature = authorization.split(':').nth(1).expect("behind the key").to_owned();
    assert!(!place.written().await.contains(&signature));
}

#[tokio::test]
async fn whatever_is_wrong_with_a_signature_has_one_answer_and_only_the_audit_knows_the_cause() {
    let (device, stranger, asleep) = (Device::new(1), Device::new(2), Device::new(3));
    let agents = agent("ann", &device, "") + &agent("bob", &asleep, "state = \"suspended\"");
    let place = Keyholders::open(&agents, "").await;
    let now_s = now_s();
    let tags = |query: &str, authorization: &str| {
        Request::get(&format!("/api/tags{query}")).header("authorization", authorization)
    };
    let good = device.signs(&format!("GET,/api/tags?ts={now_s}"));
    let good_query = format!("?ts={now_s}");
    let (key, signature) = good.split_once(':').expect("key and signature");
    let (old, ahead) = (now_s - 600, now_s + 600);
    let weak = STANDARD.encode([&b"\0\0\0\x0bssh-ed25519\0\0\0\x20"[..], &[0; 32]].concat());
    let cases = [
        ("unknown_device", stranger.request("GET", "", "/api/tags")),
        ("suspended", asleep.request("GET", "", "/api/tags")),
        ("bad_timestamp", tags("", &good)),
        ("bad_timestamp", tags(&format!("?ts={now_s}&ts={now_s}"), &good)),
        ("bad_timestamp", tags("?ts=soon", &good)),
        ("stale_timestamp", tags(&format!("?ts={old}"), &device.signs(&format!("GET,/api/tags?ts={old}")))),
        ("stale_timestamp", tags(&format!("?ts={ahead}"), &device.signs(&format!("GET,/api/tags?ts={ahead}")))),
        ("bad_signature", tags(&good_query, &device.signs(&format!("POST,/api/tags?ts={now_s}")))),
        ("bad_signature", tags(&good_query, &device.signs(&format!("GET,/api/ps?ts={now_s}")))),
        ("bad_signature", tags(&good_query, &device.signs(&format!("GET,/api/v1/ollama/api/tags?ts={now_s}")))),
        ("bad_signature", tags(&good_query, &format!("{key}:{}", STANDARD.encode([0; 64])))),
        ("malformed", tags(&good_query, &format!("{key}:"))),
        ("malformed", tags(&good_query, &format!("{weak}:{signature}"))),
        ("conflicting_credentials", tags(&good_query, &good).header("x-api-key", "other")),
        ("repeated_credential", tags(&good_query, &good).header("authorization", &good)),
        ("not_bearer", tags(&good_query, signature)),
    ];
    let mut answers = std::collections::BTreeSet::new();
    let before = place.house.simulator.connections();
    for (at, (cause, request)) in cases.into_iter().enumerate() {
        let id = format!("bad-{at}");
        let reply = place.house.send(request.id(&id)).await;
        assert_eq!((reply.status, reply.header("www-authenticate")), (401, Some("Bearer")), "{cause} {at}");
        answers.insert(reply.text());
        let last = place.house.final_of(&id).await;
        assert_eq!(last["error"], cause, "{at}");
        assert_eq!((&last["agent_id"], &last["session_id"]), (&Value::Null, &Value::Null), "nobody was verified");
    }
    assert_eq!(answers.len(), 1, "{answers:?}");
    assert_eq!(place.house.simulator.connections(), before, "nothing reached the backend");
    assert_eq!(place.house.send(tags(&good_query, &good)).await.status, 200, "the good one is good");
}

/// By design: a signature says nothing of the body, and Ollama's client may send the same one twice within a second.
#[tokio::test]
async fn a_signature_can_be_sent_again_within_its_time() {
    let device = Device::new(1);
    let place = Keyholders::open(&agent("ann", &device, ""), "").await;
    let request = device.chat("");
    assert_eq!(place.house.send(request.clone()).await.status, 200);
    assert_eq!(place.house.send(request).await.status, 200);
}

#[tokio::test]
async fn a_device_has_its_agents_permissions_and_the_policy_sees_its_agent() {
    let device = Device::new(1);
    let reader = agent("ann", &device, "risk_tier = \"high\"").replace(", \"web:write\"", "");
    let place = Keyholders::open(&reader, "").await;
    assert_eq!(place.house.send(device.request("GET", "", "/api/tags")).await.status, 200);
    let refused = place.house.send(device.chat("")).await;
    assert_eq!((refused.status, &refused.json()["code"]), (403, &json!("insufficient_scope")));

    place.replace_agents(&agent("ann", &device, "risk_tier = \"high\""));
    place.eventually(|| device.chat(""), 200).await;
}

#[tokio::test]
async fn a_key_is_tied_moved_and_taken_away_while_running() {
    let (device, other) = (Device::new(1), Device::new(2));
    let place = Keyholders::open("", "").await;
    let ask = || device.request("GET", "", "/api/tags");
    assert_eq!(place.house.send(ask()).await.status, 401);
    place.replace_agents(&agent("ann", &device, ""));
    place.eventually(ask, 200).await;
    // Tied to two: the file is refused, and what was good stays.
    place.replace_agents(&(agent("ann", &device, "") + &agent("bob", &device, "")));
    crate::house::wait_until("the refusal of the file", || {
        place.house.log().contains("belongs to one agent").then_some(())
    })
    .await;
    assert_eq!(place.house.send(ask()).await.status, 200);
    place.replace_agents(&agent("ann", &device, "state = \"suspended\""));
    place.eventually(ask, 401).await;
    place.replace_agents(&(agent("ann", &other, "") + &agent("bobby", &device, "")));
    place.eventually(ask, 200).await;
    assert_eq!(place.house.send(ask().id("moved")).await.status, 200);
    assert_eq!(place.house.final_of("moved").await["agent_id"], "bobby");
}
