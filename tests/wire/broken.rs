//! Replies that no Ollama has sent us yet: the recorded ones, bent. Each says what an auditor should read from it.
use crate::recordings::{Recording, recordings};
use behavry_ollama_proxy::wire::{Endpoint, Framing, Usage};
use serde_json::json;

/// What is read of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Read {
    pub input: Option<u64>,
    pub output: Option<u64>,
    pub finish: Option<&'static str>,
    /// The dialect's own end came.
    pub terminal: bool,
    /// The backend said that it failed.
    pub error: bool,
}

const NOTHING: Read = Read { input: None, output: None, finish: None, terminal: false, error: false };

pub struct Broken {
    pub recording: Recording,
    pub read: Read,
}

impl Broken {
    pub fn check(&self, usage: &Usage) {
        let finish = usage.finish_reason;
        let found = Read {
            input: usage.input_tokens,
            output: usage.output_tokens,
            finish: finish
                .as_ref()
                .and_then(|word| [self.read.finish?].into_iter().find(|known| *known == word.as_str())),
            terminal: usage.terminal,
            error: usage.error_frame,
        };
        assert_eq!(found, self.read, "{}", self.recording.name);
        assert_eq!(finish.is_some(), self.read.finish.is_some(), "{}: {finish:?}", self.recording.name);
    }
}

/// A recorded reply that says `24` and `17`, and where its parts are.
struct Base {
    recording: Recording,
    finish: &'static str,
    /// The key of the output tokens, and where the record begins that has them.
    output: &'static str,
    /// An event of the dialect in which the backend says that it failed.
    error: &'static str,
    /// A record with a text: what stands before the text, and behind it.
    says: (&'static str, &'static str),
}

impl Base {
    fn is_stream(&self) -> bool {
        self.recording.framing != Framing::Json
    }

    fn is_events(&self) -> bool {
        self.recording.framing == Framing::Sse
    }

    fn whole(&self) -> Read {
        Read { input: Some(24), output: Some(17), finish: Some(self.finish), terminal: true, error: false }
    }

    fn text(&self) -> &str {
        std::str::from_utf8(&self.recording.reply).expect("recorded as UTF-8")
    }

    /// The records, each with its end.
    fn records(&self) -> Vec<&str> {
        self.text().split_inclusive(if self.is_events() { "\n\n" } else { "\n" }).collect()
    }

    fn broken(&self, how: &str, reply: impl Into<Vec<u8>>, read: Read) -> Broken {
        let of = &self.recording;
        let recording = Recording {
            name: format!("{}, {how}", of.name),
            endpoint: of.endpoint,
            request: vec![],
            framing: of.framing,
            reply: reply.into(),
            expected: json!({ "status": 200 }),
        };
        Broken { recording, read }
    }

    /// With `more` behind the first `after` records.
    fn with(&self, after: usize, more: &str) -> String {
        let mut records = self.records();
        records.insert(after, more);
        records.concat()
    }

    fn saying(&self, text: &str) -> String {
        let text = json!(text).to_string();
        format!("{}{}{}", self.says.0, &text[1..text.len() - 1], self.says.1)
    }
}

/// A text that says how every dialect ends.
const IMITATION: &str = "\"done\":true,\"eval_count\":9}\n{\"done\":true,\"done_reason\":\"stop\",\"prompt_eval_count\":1,\"eval_count\":2}\n\n\
    data: {\"choices\":[{\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":4}}\n\ndata: [DONE]\n\n\
    event: response.completed\ndata: {\"type\":\"response.completed\",\"response\":{\"status\":\"completed\",\"usage\":{\"input_tokens\":5,\"output_tokens\":6}}}\n\n\
    event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\"},\"usage\":{\"input_tokens\":7,\"output_tokens\":8}}\n\n\
    event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n{\"error\":\"x\"}\ndata: {\"error\":\"y\"}\n\n\\\\\\\" \\u0022 \\\\";

fn bases() -> Vec<Base> {
    let all = recordings("0.33.0-rc2");
    let find = |name: &str| {
        let found = all.iter().find(|recording| recording.name == format!("0.33.0-rc2 {name}"));
        let Recording { name, endpoint, framing, reply, expected, .. } =
            found.unwrap_or_else(|| panic!("{name} is gone"));
        let (name, reply) = (name.clone(), reply.clone());
        Recording { name, endpoint: *endpoint, request: vec![], framing: *framing, reply, expected: expected.clone() }
    };
    let base = |name: &str, finish, output, error, says| Base { recording: find(name), finish, output, error, says };
    let native = "{\"error\":\"it broke\"}\n";
    let openai = "data: {\"error\":{\"message\":\"it broke\",\"type\":\"api_error\"}}\n\n";
    let responses = "event: error\ndata: {\"type\":\"error\",\"message\":\"it broke\"}\n\n";
    let anthropic =
        "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"api_error\",\"message\":\"it broke\"}}\n\n";
    let none = ("", "");
    vec![
        base(
            "native chat-stream-true",
            "stop",
            "eval_count",
            native,
            ("{\"message\":{\"content\":\"", "\"},\"done\":false}\n"),
        ),
        base("native generate-stream-true", "stop", "eval_count", native, ("{\"response\":\"", "\",\"done\":false}\n")),
        base(
            "openai chat-stream-usage",
            "stop",
            "completion_tokens",
            openai,
            ("data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"", "\"},\"finish_reason\":null}]}\n\n"),
        ),
        base(
            "openai completions-stream-usage",
            "stop",
            "completion_tokens",
            openai,
            ("data: {\"choices\":[{\"text\":\"", "\",\"index\":0,\"finish_reason\":null}]}\n\n"),
        ),
        base(
            "responses stream",
            "completed",
            "output_tokens",
            responses,
            (
                "event: response.output_text.delta\ndata: {\"delta\":\"",
                "\",\"sequence_number\":7,\"type\":\"response.output_text.delta\"}\n\n",
            ),
        ),
        base(
            "anthropic stream",
            "end_turn",
            "output_tokens",
            anthropic,
            (
                "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\"",
                "\"}}\n\n",
            ),
        ),
        base("native chat-stream-false", "stop", "eval_count", native, none),
        base("native generate-stream-false", "stop", "eval_count", native, none),
        base("openai chat-nonstream", "stop", "completion_tokens", openai, none),
        base("openai completions-nonstream", "stop", "completion_tokens", openai, none),
        base("responses nonstream", "completed", "output_tokens", responses, none),
        base("anthropic nonstream", "end_turn", "output_tokens", anthropic, none),
    ]
}

pub fn all() -> Vec<Broken> {
    let mut all = vec![];
    for base in bases() {
        all.extend(cut(&base));
        all.extend(odd_bytes(&base));
        if base.is_stream() {
            all.extend(odd_records(&base));
        }
        if base.is_events() {
            all.extend(odd_events(&base));
        }
    }
    all
}

/// The backend's reply just ends, in places that a careless reader takes for an end.
fn cut(base: &Base) -> Vec<Broken> {
    let text = base.text();
    let cut_at = |how: &str, at: usize| base.broken(how, &text.as_bytes()[..at], NOTHING);
    let mut all = vec![
        cut_at("cut inside a character", text.find('🦊').expect("it says so") + 2),
        cut_at("cut inside an escape", text.find("\\u003c").expect("it says so") + 3),
        cut_at("cut behind a backslash", text.find("\\u003c").expect("it says so") + 1),
        base.broken("nothing at all", "", NOTHING),
        base.broken("empty lines only", "\n\n\r\n\n", NOTHING),
    ];
    // `17` becomes `1`, and must not be read as that. What was said before stays said.
    let count = format!("\"{}\":17", base.output);
    let inside = text.rfind(&count).expect("it counts") + count.len() - 1;
    let said = match base.recording.endpoint {
        Endpoint::ChatCompletions | Endpoint::Completions if base.is_events() => {
            Read { finish: Some(base.finish), ..NOTHING }
        }
        _ => NOTHING,
    };
    all.push(base.broken("cut inside a count", &text[..inside], said));
    all.push(base.broken("cut behind a count", &text[..inside + 1], said));
    all
}

fn odd_bytes(base: &Base) -> Vec<Broken> {
    let mut all = vec![];
    let fox = base.text().replacen('🦊', "\0", 1);
    all.push(base.broken("a NUL in a text", fox, base.whole()));
    let mut latin = base.recording.reply.clone();
    let at = base.text().find('🦊').expect("it says so");
    latin.splice(at..at + 4, [0xe9, 0xff]);
    all.push(base.broken("a text that is not UTF-8", latin, base.whole()));
    all.push(base.broken("white space behind it", format!("{}\r\n \t\n\n", base.text()), base.whole()));
    all
}

fn odd_records(base: &Base) -> Vec<Broken> {
    let records = base.records();
    let count = records.len();
    let mut all = vec![];
    let failed = Read { error: true, ..base.whole() };
    all.push(base.broken("an error in the middle", base.with(3, base.error), failed));
    let end = records.iter().position(|record| record.contains(&format!("\"{}\":17", base.output))).expect("it counts");
    let twice = [base.text(), &records[end..].concat()].concat();
    all.push(base.broken("its end twice", twice, base.whole()));
    let later = records[end..].concat().replace(&format!("\"{}\":17", base.output), &format!("\"{}\":18", base.output));
    let other = Read { output: Some(18), ..base.whole() };
    all.push(base.broken("another end behind its end", [base.text(), &later].concat(), other));
    all.push(base.broken("a line of NULs", base.with(2, "\0\0\0\0\n\n"), base.whole()));
    all.push(base.broken("lines that end in CR LF", base.text().replace('\n', "\r\n"), base.whole()));
    all.push(base.broken("empty lines between", records.join("\n"), base.whole()));
    // Nobody says which of the two is meant, so neither is.
    let data = |record: &str| {
        record.trim_end().rsplit_once("data: ").map_or(record.trim_end().to_owned(), |(_, data)| data.to_owned())
    };
    let joined =
        records[end - 1].trim_end().to_owned() + &data(records[end]) + if base.is_events() { "\n\n" } else { "\n" };
    let two = [&records[..end - 1].concat(), &joined, &records[end + 1..].concat()].map(String::as_str).concat();
    let ended = match base.recording.endpoint {
        Endpoint::ChatCompletions | Endpoint::Completions | Endpoint::Messages => Read { terminal: true, ..NOTHING },
        _ => NOTHING,
    };
    all.push(base.broken("two records in a line", two, ended));
    let imitated = base.with(1, &base.saying(IMITATION));
    all.push(base.broken("a text that imitates every end", imitated, base.whole()));
    let cut = [records[0], &base.saying(IMITATION), records[1]].concat();
    all.push(base.broken("a text that imitates every end, and no end", cut, NOTHING));
    let junk = base.with(count - 2, if base.is_events() { "data: {not json}\n\n" } else { "{not json}\n" });
    all.push(base.broken("a record that is no JSON", junk, base.whole()));
    all
}

fn odd_events(base: &Base) -> Vec<Broken> {
    let text = base.text();
    let commented = text.replace("\n\n", "\n\n: still here\n\n:\n").replace("data: ", ":x\ndata: ");
    let all = [
        ("comments everywhere", commented),
        ("data without a space", text.replace("data: ", "data:")),
        ("CR LF and no space", text.replace("data: ", "data:").replace('\n', "\r\n")),
        (
            "ids, retries and unknown fields",
            text.replace("data: ", "id: 7\nretry: 100\nfoo: data: x\ndata\ndata: ").replace("data\ndata: ", "data: "),
        ),
        ("an event without data", text.replace("\n\n", "\n\nevent: nothing\n\n")),
        ("a byte order mark", format!("\u{feff}{text}")),
        ("no empty line at its end", text.trim_end().to_owned()),
    ];
    all.into_iter().map(|(how, reply)| base.broken(how, reply, base.whole())).collect()
}
