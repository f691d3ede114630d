//! Lists of models: each model decided, the rest untouched byte for byte, and the status that depends on what is left
//! (contract, section 3).

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use behavry_ollama_proxy::simulator::Fault;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::client::{Connection, Reply, Request};
use crate::house::{House, Plan};

/// A backend of a few fixed replies by path, and a memory of the request lines: for what the simulator would never say.
pub struct Fixed {
    pub address: SocketAddr,
    lines: Arc<Mutex<Vec<String>>>,
    listening: tokio::task::JoinHandle<()>,
}

impl Fixed {
    /// `replies`: path, status, content type, body.
    pub async fn start(replies: &[(&str, u16, &str, &str)]) -> Fixed {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let lines = Arc::new(Mutex::new(Vec::new()));
        let table: HashMap<String, String> = replies
            .iter()
            .map(|(path, status, content_type, body)| {
                let head = format!("HTTP/1.1 {status} X\r\nContent-Type: {content_type}\r\n");
                ((*path).to_owned(), format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()))
            })
            .collect();
        let (table, told) = (Arc::new(table), Arc::clone(&lines));
        let listening = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (table, lines) = (Arc::clone(&table), Arc::clone(&told));
                tokio::spawn(async move {
                    let mut held = Vec::new();
                    let mut buffer = vec![0; 16 * 1024];
                    // One head, and whatever body came with it, for each reply: enough for tests that send one at a time.
                    while let Ok(n @ 1..) = stream.read(&mut buffer).await {
                        held.extend_from_slice(&buffer[..n]);
                        if !held.windows(4).any(|window| window == b"\r\n\r\n") {
                            continue;
                        }
                        let text = String::from_utf8_lossy(&std::mem::take(&mut held)).into_owned();
                        let line = text.lines().next().unwrap_or_default().to_owned();
                        let target = line.split(' ').nth(1).unwrap_or_default().to_owned();
                        lines.lock().expect("not poisoned").push(line);
                        let path = target.split('?').next().unwrap_or_default();
                        let absent = "HTTP/1.1 404 X\r\nContent-Length: 0\r\n\r\n".to_owned();
                        let _ = stream.write_all(table.get(path).unwrap_or(&absent).as_bytes()).await;
                    }
                });
            }
        });
        Fixed { address, lines, listening }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The request lines so far.
    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().expect("not poisoned").clone()
    }
}

impl Drop for Fixed {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

/// What the simulator itself says.
async fn straight(house: &House, path: &str) -> Reply {
    let mut connection = Connection::open(house.simulator.addr()).await;
    connection.write(format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n").as_bytes()).await;
    connection.reply(false).await.expect("a reply")
}

async fn behind(fixed: &Fixed, policy: &str) -> House {
    let policy = vec![("authz.rego", format!("package behavry.authz\n\n{policy}\n"))];
    House::with(Plan { backend: Some(fixed.url()), policy, ..Plan::default() }).await
}

async fn house_with(policy: &str) -> House {
    let policy = vec![("authz.rego", format!("package behavry.authz\n\n{policy}\n"))];
    House::with(Plan { policy, ..Plan::default() }).await
}

/// Shows two models, and nothing where no model is named.
const TWO: &str = "deny if not input.model in {\"mistral\", \"tiny-story\"}";

const TAGS: &str = "{\"models\":[{\"name\":\"a:latest\",\"model\":\"a:latest\",\"size\":1.50},\n {\"name\":\"secret-b\",\"model\":\"secret-b\"},{\"name\":\"c\",\"model\":\"c\",\"x\":\"\\u00e9 \u{e9}\"}],\"extra\":null}";

#[tokio::test]
async fn where_all_may_be_seen_a_list_passes_byte_for_byte() {
    let house = House::open().await;
    house
        .post(
            "/api/chat",
            json!({ "model": "tiny-story", "stream": false, "messages": [{ "role": "user", "content": "hi" }] }),
        )
        .await;
    for path in ["/api/tags", "/v1/models"] {
        let own = straight(&house, path).await;
        let reply = house.send(Request::get(path).bearer(&house.token()).id(path)).await;
        assert_eq!(reply.status, 200);
        assert!(reply.body == own.body, "{path} was changed");
        assert_eq!(reply.header("content-type"), Some("application/json; charset=utf-8"));
        assert_eq!(reply.header("x-behavry-backend"), Some("ollama"));
        let records = house.records_of(path).await;
        let phases: Vec<&str> = records.iter().filter_map(|record| record["extra"]["phase"].as_str()).collect();
        assert_eq!(phases, ["request", "final"], "{path}");
        let last = &records[1];
        assert_eq!((&last["extra"]["filters"], &last["extra"]["outcome"]), (&json!([]), &json!("complete")), "{path}");
        assert_eq!((&last["extra"]["model"], &last["extra"]["upstream_status"]), (&Value::Null, &json!(200)), "{path}");
    }
    let running = house.get("/api/ps").await.json();
    assert_eq!(running["models"][0]["name"], "tiny-story:latest");

    // Oddities of a backend's bytes stay as they are.
    let odd = Fixed::start(&[("/api/tags", 200, "application/json", TAGS)]).await;
    let house = behind(&odd, "deny if input.model == \"nothing\"").await;
    assert_eq!(house.get("/api/tags").await.text(), TAGS);
}

#[tokio::test]
async fn a_model_that_the_caller_may_not_use_is_not_shown_and_the_others_are_untouched() {
    let house = house_with(TWO).await;
    house.post("/api/chat", json!({ "model": "tiny-story", "messages": [] })).await;
    #[derive(serde::Deserialize)]
    struct Tags<'a> {
        #[serde(borrow)]
        models: Vec<&'a RawValue>,
    }
    #[derive(serde::Deserialize)]
    struct Models<'a> {
        #[serde(borrow)]
        data: Vec<&'a RawValue>,
    }
    for path in ["/api/tags", "/v1/models"] {
        let own = straight(&house, path).await.text();
        let entries = match path {
            "/api/tags" => serde_json::from_str::<Tags>(&own).expect("a list").models,
            _ => serde_json::from_str::<Models>(&own).expect("a list").data,
        };
        assert!(entries.len() > 10);
        let all = entries.iter().map(|entry| entry.get()).collect::<Vec<_>>().join(",");
        let shown = |entry: &&&RawValue| entry.get().contains("\"mistral:") || entry.get().contains("\"tiny-story:");
        let left = entries.iter().filter(shown).map(|entry| entry.get()).collect::<Vec<_>>().join(",");
        assert!(own.contains(&all) && left.contains("mistral"));
        let reply = house.send(Request::get(path).bearer(&house.token()).id(path)).await;
        assert_eq!(reply.text(), own.replace(&all, &left), "{path}");
        assert_eq!(reply.header("content-length"), Some(reply.body.len().to_string().as_str()));
        assert_eq!(house.final_of(path).await["extra"]["filters"], json!(["hidden_models"]));
    }
    // Running models are filtered as well.
    assert_eq!(house.get("/api/ps").await.json()["models"].as_array().map(Vec::len), Some(1));
    let odd = Fixed::start(&[("/api/ps", 200, "application/json", TAGS)]).await;
    let house = behind(&odd, "deny if input.model == \"secret-b\"").await;
    let reply = house.get("/api/ps").await;
    assert!(!reply.text().contains("secret-b"));
    assert_eq!(reply.text(), TAGS.replace(",\n {\"name\":\"secret-b\",\"model\":\"secret-b\"}", ""));
}

#[tokio::test]
async fn a_head_of_a_list_has_the_status_of_the_list_and_no_body() {
    let house = house_with(TWO).await;
    let reply = house.send(Request::new("HEAD", "/api/tags").bearer(&house.token()).id("head")).await;
    assert_eq!((reply.status, reply.body.len()), (200, 0));
    assert_eq!(house.final_of("head").await["action"], "HEAD");
    let hidden = house_with("deny if true").await;
    let mut connection = Connection::open(hidden.public).await;
    connection.send(&Request::new("HEAD", "/api/tags").bearer(&hidden.token()).header("connection", "close")).await;
    let reply = connection.reply(true).await.expect("a reply");
    assert_eq!(reply.status, 403);
    while connection.more().await {}
    assert!(connection.unread.is_empty(), "a reply to HEAD has no body");
}

#[tokio::test]
async fn nothing_left_is_an_empty_list_where_null_is_allowed_and_a_403_where_it_is_denied() {
    let house = house_with("deny contains \"no models for you\" if input.model != null").await;
    for (path, list) in [("/api/tags", "models"), ("/v1/models", "data")] {
        let reply = house.get(path).await;
        assert_eq!((reply.status, &reply.json()[list]), (200, &json!([])), "{path}");
    }
    let house = house_with("deny contains \"nothing for you\" if not input.model in {\"absent\"}").await;
    for path in ["/api/tags", "/v1/models"] {
        let reply = house.send(Request::get(path).bearer(&house.token()).id(path)).await;
        assert_eq!((reply.status, reply.code()), (403, "policy_denied".to_owned()), "{path}");
        let detail = reply.json()["detail"].as_str().expect("words").to_owned();
        assert!(detail.contains("nothing for you"), "{detail}");
        let last = house.final_of(path).await;
        assert_eq!((&last["policy_result"], &last["response_code"]), (&json!("deny"), &json!(403)));
        assert_eq!(last["policy_reason"], "nothing for you");
    }
    // An Ollama without models says `null`, which clients of OpenAI's do not expect.
    let none = Fixed::start(&[("/v1/models", 200, "application/json", "{\"object\":\"list\",\"data\":null}\n")]).await;
    let open = behind(&none, "deny if input.model == \"x\"").await;
    assert_eq!(open.get("/v1/models").await.text(), "{\"object\":\"list\",\"data\":[]}\n");
    let closed = behind(&none, "deny if input.model == null").await;
    assert_eq!(closed.get("/v1/models").await.status, 403);
}

#[tokio::test]
async fn a_backend_that_is_down_or_answers_no_list_is_said_so_and_never_quoted() {
    let house = House::open().await;
    house.simulator.set_fault(Some(Fault::Refuses)).await.expect("set");
    for (n, path) in ["/api/tags", "/api/ps", "/v1/models"].into_iter().enumerate() {
        let id = format!("down-{n}");
        let reply = house.send(Request::get(path).bearer(&house.token()).id(&id)).await;
        assert_eq!((reply.status, reply.code()), (502, "backend_unreachable".to_owned()), "{path}");
        let detail = reply.json()["detail"].as_str().expect("words").to_owned();
        assert_eq!(detail, format!("Cannot reach Ollama at {}. Is it running?", house.simulator.url()));
        let last = house.final_of(&id).await;
        assert_eq!((&last["policy_result"], &last["extra"]["outcome"]), (&json!("allow"), &json!("upstream_error")));
    }
    house.simulator.set_fault(None).await.expect("set");
    assert_eq!(house.get("/api/tags").await.status, 200, "and it serves again");

    for body in
        ["<html>WRONG-SERVICE</html>", "{\"models\":{}}", "{\"models\":[],\"models\":[]}", "{\"WRONG-SERVICE\":1", ""]
    {
        let wrong = Fixed::start(&[("/api/tags", 200, "application/json", body)]).await;
        let house = behind(&wrong, "deny if input.model == \"x\"").await;
        let reply = house.send(Request::get("/api/tags").bearer(&house.token()).id("wrong")).await;
        assert_eq!((reply.status, reply.code()), (502, "bad_backend_reply".to_owned()), "{body}");
        let said = reply.text() + &house.log() + &house.final_of("wrong").await.to_string();
        assert!(!said.contains("WRONG-SERVICE"), "a backend's bytes are never quoted");
    }
    let failing = Fixed::start(&[("/api/tags", 500, "application/json", "{\"error\":\"WRONG-SERVICE\"}")]).await;
    let house = behind(&failing, "deny if input.model == \"x\"").await;
    let reply = house.get("/api/tags").await;
    assert_eq!((reply.status, reply.code()), (502, "bad_backend_reply".to_owned()));
}

#[tokio::test]
async fn a_list_larger_than_the_limit_is_refused() {
    let padding = "x".repeat(3000);
    let large = format!("{{\"models\":[{{\"name\":\"a\",\"x\":\"{padding}\"}}]}}");
    let backend = Fixed::start(&[("/api/tags", 200, "application/json", &large)]).await;
    let config = "[limits]\nlist_bytes = 2048\n".to_owned();
    let house = House::with(Plan { backend: Some(backend.url()), config, ..Plan::default() }).await;
    let reply = house.get("/api/tags").await;
    assert_eq!((reply.status, reply.code()), (502, "bad_backend_reply".to_owned()));
}

#[tokio::test]
async fn one_model_of_the_list_is_decided_like_any_other_request() {
    let house = house_with(TWO).await;
    let allowed = house.send(Request::get("/v1/models/mistral").bearer(&house.token()).id("one")).await;
    assert_eq!(allowed.status, 200);
    assert!(allowed.body == straight(&house, "/v1/models/mistral").await.body);
    let last = house.final_of("one").await;
    assert_eq!((&last["target"], &last["extra"]["model"]), (&json!("/v1/models/mistral"), &json!("mistral")));

    let seen = house.simulator.seen().len();
    let denied = house.send(Request::get("/v1/models/llama3.2").bearer(&house.token()).id("other")).await;
    assert_eq!((denied.status, denied.code()), (403, "policy_denied".to_owned()));
    assert_eq!(house.final_of("other").await["extra"]["model"], "llama3.2");
    assert_eq!(house.simulator.seen().len(), seen);

    let absent = house_with("deny if input.model == \"x\"").await;
    let own = straight(&absent, "/v1/models/absent").await;
    let reply = absent.get("/v1/models/absent").await;
    assert_eq!(reply.status, 404);
    assert!(reply.body == own.body, "Ollama's own 404 passes unchanged");
}

/// While a list is fetched the client is watched for leaving: what it sends early must not be lost by that.
#[tokio::test]
async fn requests_that_come_while_a_list_is_fetched_are_answered_in_their_order() {
    let house = House::open().await;
    let token = house.token();
    let mut connection = Connection::open(house.public).await;
    let mut bytes = Vec::new();
    for path in ["/api/tags", "/v1/models", "/api/version", "/api/ps"] {
        bytes.extend_from_slice(&Request::get(path).bearer(&token).id(path).head_bytes());
    }
    connection.write(&bytes).await;
    for path in ["/api/tags", "/v1/models", "/api/version", "/api/ps"] {
        let reply = connection.reply(false).await.expect("a reply");
        assert_eq!((reply.status, reply.header("x-request-id")), (200, Some(path)));
    }
}
