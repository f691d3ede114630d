//! The recorded cases, and a backend that answers each as its own backend did.

use std::sync::Arc;

use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::sync::Notify;

use crate::puppet::{Hand, Puppet};

/// One line of `cases.jsonl`.
#[derive(Clone, Deserialize)]
pub struct Case {
    #[serde(rename = "case")]
    pub name: String,
    pub client: Client,
    /// What was answered to Bifrost: status, headers, body, and a note where it was cut or waited.
    backend: Option<String>,
    result: Option<Value>,
    result_sse: Option<String>,
    seen: Seen,
}

#[derive(Clone, Deserialize)]
pub struct Client {
    pub method: String,
    pub path: String,
    #[serde(default)]
    pub config: Value,
    body: Option<Box<RawValue>>,
    raw_body: Option<String>,
}

#[derive(Clone, Deserialize)]
struct Seen {
    status: u16,
}

/// What a backend answers.
pub struct Answer {
    pub status: u16,
    /// Without those of the framing.
    headers: String,
    pub content_type: String,
    pub body: String,
    pub then: Then,
}

/// What the backend does after the last byte of its answer.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Then {
    Ends,
    Resets,
    /// Says nothing more, and waits until it is left.
    Waits,
    /// The same before the first byte.
    NeverBegins,
}

/// What Bifrost's caller got.
pub struct Got {
    pub status: u16,
    pub is_stream: bool,
    pub body: String,
}

pub fn all() -> Vec<Case> {
    let path = format!("{}/tests/fixtures/bifrost/cases.jsonl", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(path).expect("the recorded cases");
    text.lines().map(|line| serde_json::from_str(line).expect("a case")).collect()
}

impl Case {
    /// As it was sent.
    pub fn body(&self) -> String {
        self.client.raw_body.clone().or(self.client.body.as_ref().map(|body| body.get().to_owned())).unwrap_or_default()
    }

    pub fn asked(&self) -> Value {
        serde_json::from_str(&self.body()).unwrap_or(Value::Null)
    }

    pub fn got(&self) -> Got {
        let is_stream = self.result_sse.is_some();
        let body =
            self.result_sse.clone().unwrap_or_else(|| self.result.as_ref().map_or_else(String::new, Value::to_string));
        Got { status: self.seen.status, is_stream, body }
    }

    /// `None`: Bifrost sent nothing, so nothing was recorded.
    pub fn answer(&self) -> Option<Answer> {
        let (head, body) = self.backend.as_ref()?.split_once("\n\n").expect("a head");
        let mut lines = head.lines();
        let status = lines.next().expect("a status line").split(' ').nth(1).expect("a status");
        let headers: String = lines.map(|line| format!("{line}\r\n")).collect();
        let content_type = head.lines().find_map(|line| line.strip_prefix("Content-Type: ")).expect("a type");
        let (body, then) = match body.rfind("\n(") {
            Some(note) if body.ends_with(")\n") => (&body[..note], then(&body[note + 1..])),
            _ => (body, Then::Ends),
        };
        Some(Answer {
            status: status.parse().expect("a status"),
            content_type: content_type.to_owned(),
            headers,
            body: body.to_owned(),
            then,
        })
    }
}

fn then(note: &str) -> Then {
    match note.trim_end() {
        "(then a TCP reset)" => Then::Resets,
        "(then 5 s of silence)" => Then::Waits,
        "(nothing sent after this; the backend waits for its connection to be closed)" => Then::Waits,
        "(sent after 4 s)" => Then::NeverBegins,
        other => panic!("a note that nobody knows: {other}"),
    }
}

impl Answer {
    pub fn is_stream(&self) -> bool {
        self.content_type == "text/event-stream"
    }

    async fn say(&self, hand: &mut Hand) {
        let head = format!("HTTP/1.1 {} X\r\n{}", self.status, self.headers);
        if !self.is_stream() {
            return hand.try_say(format!("{head}Content-Length: {}\r\n\r\n{}", self.body.len(), self.body)).await;
        }
        hand.try_say(format!("{head}Transfer-Encoding: chunked\r\n\r\n")).await;
        if !self.body.is_empty() {
            hand.try_say(format!("{:x}\r\n{}\r\n", self.body.len(), self.body)).await;
        }
        if self.then == Then::Ends {
            hand.try_say("0\r\n\r\n").await;
        }
    }
}

/// What stands in for Bifrost's backend. It finds the case by the request's id.
#[derive(Clone)]
pub struct Backend {
    pub url: String,
    shared: Arc<Shared>,
}

struct Shared {
    cases: Vec<Case>,
    /// What `GET /v1/models` is answered with: that request is the proxy's own and carries no id.
    list: Mutex<Option<Case>>,
    requests: Mutex<Vec<Request>>,
    left: Mutex<Vec<String>>,
    /// The client has read what came before the reset, which would swallow it.
    read: Notify,
}

#[derive(Clone)]
pub struct Request {
    /// The case, or the path.
    pub of: String,
    pub head: String,
    pub body: String,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut fields = self.head.lines().filter_map(|line| line.split_once(": "));
        fields.find(|(field, _)| field.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }
}

impl Backend {
    pub async fn start(cases: Vec<Case>) -> Backend {
        let puppet = Puppet::listen().await;
        let shared = Shared {
            cases,
            list: Mutex::default(),
            requests: Mutex::default(),
            left: Mutex::default(),
            read: Notify::new(),
        };
        let backend = Backend { url: puppet.url(), shared: Arc::new(shared) };
        let serving = backend.clone();
        tokio::spawn(async move {
            loop {
                let hand = puppet.accept().await;
                tokio::spawn(serving.clone().serve(hand));
            }
        });
        backend
    }

    pub fn list(&self, case: &Case) {
        *self.shared.list.lock() = Some(case.clone());
    }

    /// Lets a connection that is to be reset be reset.
    pub fn reset(&self) {
        self.shared.read.notify_one();
    }

    /// What was asked for a case, in order.
    pub fn requests_of(&self, case: &str) -> Vec<Request> {
        self.shared.requests.lock().iter().filter(|request| request.of == case).cloned().collect()
    }

    /// The proxy closed the connection of this case before its answer had ended.
    pub fn was_left(&self, case: &str) -> bool {
        self.shared.left.lock().iter().any(|left| left == case)
    }

    async fn serve(self, mut hand: Hand) {
        while let Some(request) = hand.next_request().await {
            let (head, body) = request.split_once("\r\n\r\n").expect("a head");
            let path = head.split(' ').nth(1).expect("a path").to_owned();
            let id = head.lines().find_map(|line| line.strip_prefix("x-request-id: "));
            // A case that is asked again has another id: `case~2`.
            let case = match id.and_then(|id| id.split('~').next()) {
                Some(name) => self.shared.cases.iter().find(|case| case.name == name).cloned(),
                None if path == "/v1/models" => self.shared.list.lock().clone(),
                None => None,
            };
            let of = case.as_ref().map_or(path.clone(), |case| case.name.clone());
            let request = Request { of: of.clone(), head: head.to_owned(), body: body.to_owned() };
            self.shared.requests.lock().push(request);
            if path == "/v1/responses" || case.is_none() {
                // As an Ollama before 0.13.3 answers, so that the request comes again as a chat.
                let words = "404 page not found";
                let head = format!(
                    "HTTP/1.1 404 Not Found\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n",
                    words.len()
                );
                hand.try_say(head + words).await;
                continue;
            }
            let answer = case.and_then(|case| case.answer()).unwrap_or_else(plain);
            if answer.then != Then::NeverBegins && !(answer.then == Then::Waits && answer.body.is_empty()) {
                answer.say(&mut hand).await;
            }
            match answer.then {
                Then::Ends => {}
                Then::Resets => {
                    self.shared.read.notified().await;
                    return hand.reset();
                }
                Then::Waits | Then::NeverBegins => {
                    hand.closed().await;
                    self.shared.left.lock().push(of);
                    return;
                }
            }
        }
    }
}

/// The answer to what Bifrost refused and Ollama takes.
pub fn plain() -> Answer {
    let plain = all().into_iter().find(|case| case.name == "chat_plain").expect("it is there");
    plain.answer().expect("it was answered")
}
