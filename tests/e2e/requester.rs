//! Whom an agent says that it acts for: recorded, shown to the policy, believed by nobody, and kept from backends.

use serde_json::{Value, json};

use crate::client::Request;
use crate::house::{House, Plan};

fn chat() -> Request {
    let ask = json!({ "model": "tiny-story", "stream": false, "messages": [{ "role": "user", "content": "hi" }] });
    Request::post("/api/chat", ask)
}

#[tokio::test]
async fn the_requester_is_recorded_and_no_backend_hears_of_it() {
    let house = House::open().await;
    let request = chat().header("X-Requester-Id", "user@company.com").header("X-Requester-Channel", "claude-code");
    assert_eq!(house.send(request.bearer(&house.token()).id("both")).await.status, 200);
    for record in house.records_of("both").await {
        assert_eq!(record["extra"]["requester_id"], "user@company.com");
        assert_eq!(record["extra"]["requester_channel"], "claude-code");
    }
    for (name, value) in &house.simulator.seen()[0].headers {
        assert!(!name.to_ascii_lowercase().starts_with("x-requester"), "{name}");
        assert!(!value.contains("user@company.com") && !value.contains("claude-code"), "{name}");
    }
    assert_eq!(house.send(chat().bearer(&house.token()).id("none")).await.status, 200);
    let last = house.final_of("none").await;
    assert_eq!((&last["extra"]["requester_id"], &last["extra"]["requester_channel"]), (&Value::Null, &Value::Null));
}

#[tokio::test]
async fn a_policy_sees_the_requester_and_that_nobody_verified_it() {
    let policy = r#"package behavry.authz

deny contains "it says it is verified" if input.requester.verified != false
deny contains "mallory may not" if input.requester.id == "mallory"
deny contains "not from there" if input.requester.channel == "irc"
deny contains "nobody" if input.requester.id == null
"#;
    let house = House::with(Plan { policy: vec![("authz.rego", policy.to_owned())], ..Plan::default() }).await;
    let token = house.token();
    for (id, channel, reason) in [
        (Some("ann"), None, None),
        (Some("ann"), Some("slack"), None),
        (Some("mallory"), None, Some("mallory may not")),
        (Some("ann"), Some("irc"), Some("not from there")),
        (None, None, Some("nobody")),
        (Some(""), None, Some("nobody")),
    ] {
        let mut request = chat().bearer(&token);
        for (name, value) in [("x-requester-id", id), ("x-requester-channel", channel)] {
            request = value.into_iter().fold(request, |request, value| request.header(name, value));
        }
        let reply = house.send(request).await;
        match reason {
            None => assert_eq!(reply.status, 200, "{id:?} {channel:?}"),
            Some(reason) => {
                assert_eq!(reply.status, 403, "{id:?} {channel:?}");
                assert!(reply.text().contains(reason), "{}", reply.text());
            }
        }
    }
}

#[tokio::test]
async fn a_requester_that_is_repeated_or_unfit_is_refused_by_name_and_a_stranger_hears_of_its_token_first() {
    let house = House::open().await;
    let token = house.token();
    let long = "i".repeat(257);
    for (at, (name, values)) in [
        ("X-Requester-Id", vec!["a", "a"]),
        ("X-Requester-Id", vec![long.as_str()]),
        ("X-Requester-Id", vec!["a b"]),
        ("X-Requester-Channel", vec!["\u{e4}"]),
        ("X-Requester-Channel", vec!["slack", "irc"]),
    ]
    .into_iter()
    .enumerate()
    {
        let request = values.iter().fold(chat(), |request, value| request.header(name, value));
        let id = format!("bad-{at}");
        let reply = house.send(request.clone().bearer(&token).id(&id)).await;
        assert_eq!((reply.status, &reply.json()["code"]), (400, &json!("bad_framing")), "{name} {values:?}");
        assert!(reply.text().contains(name), "{}", reply.text());
        let last = house.final_of(&id).await;
        assert_eq!((&last["agent_id"], &last["extra"]["requester_id"]), (&json!("tester"), &Value::Null));
        assert_eq!(house.send(request).await.status, 401);
    }
    assert_eq!(house.simulator.connections(), 0);
}
