//! Requests and replies recorded from running Ollama servers, and the parts of the wire layer that read a reply.
use base64::Engine as _;
use behavry_ollama_proxy::route::{self, Route, RouteSettings};
use behavry_ollama_proxy::wire::rewrite::UsageHider;
use behavry_ollama_proxy::wire::{Endpoint, Framing, Meter, Usage, model};
use bytes::Bytes;
use serde_json::Value;

pub const VERSIONS: [&str; 3] = ["0.17.4", "0.24.0", "0.33.0-rc2"];

pub fn lines(version: &str, file: &str) -> Vec<Value> {
    let path = format!("{}/tests/fixtures/ollama/{version}/{file}.jsonl", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// One request and its reply.
pub struct Recording {
    pub name: String,
    pub endpoint: Endpoint,
    pub request: Vec<u8>,
    pub framing: Framing,
    pub reply: Vec<u8>,
    pub expected: Value,
}

impl Recording {
    pub fn status(&self) -> u64 {
        self.expected["status"].as_u64().unwrap_or(0)
    }
}

pub fn recordings(version: &str) -> Vec<Recording> {
    let mut found = vec![];
    for file in ["native", "openai", "responses", "anthropic", "transport"] {
        for line in lines(version, file) {
            let request = &line["request"];
            let Some(endpoint) = endpoint(request["method"].as_str().unwrap(), request["path"].as_str().unwrap())
            else {
                continue;
            };
            let body = match (&request["body"], &request["body_base64"]) {
                (Value::String(text), _) => text.clone().into_bytes(),
                (_, Value::String(text)) => base64::engine::general_purpose::STANDARD.decode(text).unwrap(),
                _ => vec![],
            };
            let head = line["head"].as_str().unwrap();
            let content_type = head
                .lines()
                .filter_map(|line| line.split_once(": "))
                .find(|(name, _)| name.eq_ignore_ascii_case("content-type"))
                .map_or("", |(_, value)| value);
            found.push(Recording {
                name: format!("{version} {file} {}", line["case"].as_str().unwrap()),
                endpoint,
                request: body,
                framing: Framing::of_content_type(content_type),
                reply: line["body"].as_str().unwrap().as_bytes().to_vec(),
                expected: line["expected"].clone(),
            });
        }
    }
    found
}

/// The distinct replies that were given to Bifrost (`fixtures/bifrost/README.md`), as those of what was asked for: a response is asked for
/// as a chat.
pub fn given_to_bifrost() -> Vec<Recording> {
    let path = format!("{}/tests/fixtures/bifrost/cases.jsonl", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let mut found: Vec<Recording> = vec![];
    for line in text.lines() {
        let case: Value = serde_json::from_str(line).unwrap();
        let endpoint = match case["client"]["path"].as_str().unwrap() {
            "/v1/chat/completions" | "/v1/responses" => Endpoint::ChatCompletions,
            "/v1/completions" => Endpoint::Completions,
            "/v1/embeddings" => Endpoint::OpenAiEmbeddings,
            _ => continue,
        };
        let Some((head, body)) = case["backend"].as_str().and_then(|reply| reply.split_once("\n\n")) else { continue };
        // A note says where the backend cut or waited.
        let body = body.rfind("\n(").filter(|_| body.ends_with(")\n")).map_or(body, |note| &body[..note]);
        let framing = if head.contains("text/event-stream") { Framing::Sse } else { Framing::Json };
        let is_known = |known: &Recording| known.endpoint == endpoint && known.reply == body.as_bytes();
        if !head.starts_with("HTTP/1.1 200") || found.iter().any(is_known) {
            continue;
        }
        let name = format!("bifrost {}", case["case"].as_str().unwrap());
        let reply = body.as_bytes().to_vec();
        found.push(Recording { name, endpoint, request: vec![], framing, reply, expected: Value::Null });
    }
    found
}

/// The endpoint of a request, by the table that the proxy has.
pub fn endpoint(method: &str, target: &str) -> Option<Endpoint> {
    let path = target.split('?').next().unwrap_or_default();
    match route::resolve(method, path, &RouteSettings::default()) {
        Ok(Route::Ollama { endpoint, .. }) => Some(endpoint),
        _ => None,
    }
}

pub fn canonical(name: &str) -> String {
    model::parse(name).unwrap_or_else(|error| panic!("a recorded name: {error}")).canonical()
}

/// Whether a reply of status 200 that reached its end is what the recording says an auditor should read.
pub fn check(recording: &Recording, usage: Usage, how: std::fmt::Arguments<'_>) {
    let (name, expected) = (&recording.name, &recording.expected);
    assert_eq!(usage.input_tokens, expected["input_tokens"].as_u64(), "{name}, {how}: input");
    assert_eq!(usage.output_tokens, expected["output_tokens"].as_u64(), "{name}, {how}: output");
    let finish = usage.finish_reason;
    assert_eq!(finish.as_ref().map(|word| word.as_str()), expected["finish_reason"].as_str(), "{name}, {how}: finish");
    if let Some(terminal) = expected["terminal_marker"].as_bool() {
        assert_eq!(usage.terminal, terminal, "{name}, {how}: end");
    }
}

pub fn metered<'a>(recording: &Recording, parts: impl IntoIterator<Item = &'a [u8]>) -> Usage {
    let mut meter = Meter::new(recording.endpoint, recording.framing);
    for part in parts {
        meter.feed(part);
    }
    meter.finish()
}

pub fn hidden<'a>(endpoint: Endpoint, parts: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut hider = UsageHider::new(endpoint);
    let mut out = vec![];
    for part in parts {
        out.extend_from_slice(&hider.pass(Bytes::copy_from_slice(part)));
    }
    out.extend_from_slice(&hider.finish());
    out
}

/// Numbers that look random and are the same every time (xorshift64*).
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self, below: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % below.max(1)
    }

    /// Changes some places of a text: bytes replaced, left out, put in, doubled.
    pub fn mutate(&mut self, text: &[u8]) -> Vec<u8> {
        const LIKELY: &[u8] = b"{}[]\",:\\u0 \n\r\tnulltrue1-.eE+data: MODELmodel\xc5\xbf\xff\x00";
        let mut text = text.to_vec();
        for _ in 0..=self.roll(4) {
            let at = self.roll(text.len() + 1);
            let byte = LIKELY[self.roll(LIKELY.len())];
            match self.roll(4) {
                0 if at < text.len() => text[at] = byte,
                1 if at < text.len() => drop(text.remove(at)),
                2 => text.insert(at, byte),
                _ => {
                    let end = (at + self.roll(30)).min(text.len());
                    let part = text[at..end].to_vec();
                    let to = self.roll(text.len() + 1);
                    text.splice(to..to, part);
                }
            }
        }
        text
    }
}
