//! Static API keys beside tokens, for clients that cannot fetch one: off unless configured, and then callers like any other.

use behavry_ollama_proxy::identity::api_key::{self, ApiKeyHash};
use serde_json::{Value, json};

use crate::client::Request;
use crate::keyholders::Keyholders;

const ON: &str = "[identity]\napi_keys = true\n";

fn agents(key: &str, more: &str) -> String {
    format!(
        "[[agent]]\nid = \"ann\"\nroles = [\"internal\"]\npermissions = [\"web:read\", \"web:write\"]\n\
         api_keys = [{{ name = \"ci\", sha256 = \"{}\" }}]\n{more}\n",
        ApiKeyHash::of(key).to_hex()
    )
}

fn chat(path: &str) -> Request {
    let ask = json!({ "model": "tiny-story", "stream": false, "max_tokens": 4, "messages": [{ "role": "user", "content": "hi" }] });
    Request::post(path, ask)
}

#[tokio::test]
async fn an_api_key_is_served_as_its_agent_from_either_header_and_in_every_dialect() {
    let key = api_key::random();
    let place = Keyholders::open(&agents(key.expose(), ""), ON).await;
    let requests = [
        chat("/api/chat").bearer(key.expose()),
        chat("/v1/chat/completions").bearer(key.expose()),
        chat("/v1/messages").header("x-api-key", key.expose()),
        chat("/api/v1/ollama/api/chat").header("x-api-key", key.expose()).bearer(key.expose()),
    ];
    for (at, request) in requests.into_iter().enumerate() {
        let id = format!("key-{at}");
        assert_eq!(place.house.send(request.id(&id)).await.status, 200, "{at}");
        let last = place.house.final_of(&id).await;
        assert_eq!(last["agent_id"], "ann");
        assert_eq!(last["session_id"], *ApiKeyHash::of(key.expose()).session_id());
        assert_eq!(last["extra"]["agent_roles"], json!(["internal"]));
    }
    for seen in place.house.simulator.seen() {
        assert_eq!((seen.header("authorization"), seen.header("x-api-key")), (None, None));
    }
    let token = place.house.token();
    assert_eq!(place.house.send(chat("/api/chat").bearer(&token)).await.status, 200, "tokens hold beside keys");
    let written = place.written().await;
    assert!(!written.contains(key.expose()) && !written.contains(&ApiKeyHash::of(key.expose()).to_hex()));
}

#[tokio::test]
async fn api_keys_are_off_unless_they_are_turned_on() {
    let key = api_key::random();
    let place = Keyholders::open(&agents(key.expose(), ""), "").await;
    let refused = place.house.send(chat("/api/chat").bearer(key.expose()).id("off")).await;
    assert_eq!((refused.status, &refused.json()["code"]), (401, &json!("invalid_token")));
    assert_eq!(place.house.final_of("off").await["error"], "api_keys_off");
    let token = place.house.send(chat("/api/chat").bearer("a.b.c")).await;
    assert_eq!(refused.text(), token.text(), "as every bad token");
    assert_eq!(place.house.simulator.connections(), 0);
}

#[tokio::test]
async fn a_key_that_is_unknown_or_whose_agent_is_suspended_has_the_one_answer() {
    let (key, suspended) = (api_key::random(), api_key::random());
    let asleep = agents(suspended.expose(), "state = \"suspended\"").replace("\"ann\"", "\"bob\"");
    let place = Keyholders::open(&(agents(key.expose(), "") + &asleep), ON).await;
    let stranger = api_key::random();
    let longer = format!("{}A", key.expose());
    // A token in form, but with a key's prefix: never tried as one.
    let disguised = format!("bop_{}", place.house.token());
    let hash = ApiKeyHash::of(key.expose()).to_hex();
    let mut answers = std::collections::BTreeSet::new();
    for (at, (text, cause)) in [
        (stranger.expose(), "unknown_api_key"),
        (&longer, "unknown_api_key"),
        (&disguised, "unknown_api_key"),
        ("bop_", "unknown_api_key"),
        (&format!("bop_{hash}"), "unknown_api_key"),
        (&hash, "malformed"),
        (suspended.expose(), "suspended"),
    ]
    .into_iter()
    .enumerate()
    {
        let id = format!("bad-{at}");
        let reply = place.house.send(chat("/api/chat").bearer(text).id(&id)).await;
        assert_eq!(reply.status, 401, "{at}");
        answers.insert(reply.text());
        let last = place.house.final_of(&id).await;
        assert_eq!((&last["error"], &last["agent_id"]), (&json!(cause), &Value::Null), "{at}");
    }
    assert_eq!(answers.len(), 1);
    assert_eq!(place.house.simulator.connections(), 0);
}

#[tokio::test]
async fn a_key_is_added_and_removed_while_running() {
    let (old, new) = (api_key::random(), api_key::random());
    let place = Keyholders::open(&agents(old.expose(), ""), ON).await;
    assert_eq!(place.house.send(chat("/api/chat").bearer(old.expose())).await.status, 200);
    place.replace_agents(&agents(new.expose(), ""));
    place.eventually(|| chat("/api/chat").bearer(new.expose()), 200).await;
    assert_eq!(place.house.send(chat("/api/chat").bearer(old.expose())).await.status, 401);
}
