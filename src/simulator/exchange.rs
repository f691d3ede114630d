//! One connection, request after request: head, body, route, answer, and the faults around them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};
use tokio::net::TcpStream;

use super::Shared;
use super::fault::Fault;
use super::fetch::Fetch;
use super::generate::{Answered, Job, with_stream_headers};
use super::head::{BadHead, BodyFraming, BodyReader, Head};
use super::link::{Gone, Link};
use super::manage::Progress;
use super::refusal::{Raised, Refusal};
use super::reply::{Form, Framing, JSON, JSON_UTF8, NDJSON, Opening, Records, Reply};
use super::route::{Route, meet, unknown};
use super::text;
use super::witness::{Ending, Seen, Testimony};

/// A JSON body larger than this is not parsed: Ollama has no limit, a test machine has.
const MOST_JSON_BYTES: usize = 256 * 1024 * 1024;

/// What becomes of the connection behind an exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    Keep,
    /// Ended in good order: what the client still sends is read for a moment.
    Close,
    /// Dropped as it is.
    Cut,
    Reset,
}

/// Serves a connection until it ends.
pub(super) async fn serve(stream: TcpStream, shared: Arc<Shared>, connection_id: u64) {
    let mut link = Link::new(stream, Arc::clone(&shared.witnesses));
    for served in 0_u64.. {
        let head = match next_head(&mut link, &shared, served).await {
            Next::Head(head) => head,
            Next::Bad(bad) => {
                let _ = link.send(&bad_head(bad, &shared, connection_id)).await;
                return link.close().await;
            }
            Next::Over => return,
        };
        match exchange(&mut link, &shared, connection_id, *head, served > 0).await {
            After::Keep => {}
            After::Close => return link.close().await,
            After::Cut => return,
            After::Reset => return link.reset(),
        }
    }
}

enum Next {
    Head(Box<Head>),
    Bad(BadHead),
    Over,
}

async fn next_head(link: &mut Link, shared: &Shared, served: u64) -> Next {
    // A connection that was never used has no idle time, as with Go's server.
    let idle_until = match shared.idle_limit() {
        Some(limit) if served > 0 => Some(tokio::time::Instant::now() + limit),
        _ => None,
    };
    loop {
        if link.inbox.starts_with(b"PRI * HTTP/2.0") {
            return Next::Bad(BadHead::Http2);
        }
        match Head::take(&mut link.inbox, shared.witnesses.on()) {
            Ok(Some(head)) => return Next::Head(Box::new(head)),
            Ok(None) => {}
            Err(bad) => return Next::Bad(bad),
        }
        let received = match idle_until {
            Some(until) if link.inbox.is_empty() => match tokio::time::timeout_at(until, link.receive()).await {
                Ok(received) => received,
                Err(_) => return Next::Over,
            },
            _ => link.receive().await,
        };
        if received.is_err() {
            return Next::Over;
        }
    }
}

/// Go's answers to what is no request.
fn bad_head(bad: BadHead, shared: &Shared, connection_id: u64) -> Vec<u8> {
    let words = match bad {
        BadHead::Http2 => {
            let date = text::http_date(text::unix_now().as_secs());
            return format!(
                "HTTP/1.1 400 Bad Request\r\nConnection: close\r\nDate: {date}\r\nContent-Length: 0\r\n\r\n"
            )
            .into_bytes();
        }
        BadHead::Malformed => "400 Bad Request",
        BadHead::MissingHost => "400 Bad Request: missing required Host header",
        BadHead::TooLarge => "431 Request Header Fields Too Large",
    };
    shared.witnesses.begin(|| blank(connection_id)).end(Ending::BadRequest, Instant::now());
    format!("HTTP/1.1 {words}\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n{words}")
        .into_bytes()
}

fn blank(connection_id: u64) -> Seen {
    Seen {
        connection_id,
        method: String::new(),
        target: String::new(),
        raw_head: Vec::new(),
        headers: Vec::new(),
        body_bytes: 0,
        body_sha256: [0; 32],
        body: Vec::new(),
        body_whole: false,
        model: None,
        started: Instant::now(),
        first_byte: None,
        ended: None,
        ended_how: None,
    }
}

/// One request from its head to its end.
async fn exchange(link: &mut Link, shared: &Shared, connection_id: u64, mut head: Head, reused: bool) -> After {
    let testimony = shared.witnesses.begin(|| Seen {
        method: head.method.clone(),
        target: head.target.clone(),
        raw_head: std::mem::take(&mut head.raw),
        headers: head.headers.clone(),
        ..blank(connection_id)
    });
    let done = Exchange { link, shared, testimony: &testimony, head: &head, fault: None }.run(reused).await;
    match done {
        Ok((after, ending)) => {
            testimony.end(ending, Instant::now());
            after
        }
        Err(gone) => {
            testimony.end(Ending::ClientGone, gone.at);
            After::Cut
        }
    }
}

pub(super) struct Exchange<'a> {
    pub link: &'a mut Link,
    pub shared: &'a Shared,
    pub testimony: &'a Testimony,
    pub head: &'a Head,
    pub fault: Option<Fault>,
}

/// A body that came whole.
pub(super) struct Body {
    /// The bytes, where they are needed.
    pub bytes: Vec<u8>,
    pub sha256: Option<[u8; 32]>,
    pub too_large: bool,
}

/// What is to be said.
pub(super) enum Answer {
    Reply(Reply),
    Lines(Progress),
    /// A pull from a registry on this machine.
    Fetch(Fetch),
    Job(Box<Job>),
}

type Done = Result<(After, Ending), Gone>;

impl Exchange<'_> {
    async fn run(mut self, reused: bool) -> Done {
        let head = self.head;
        // Ollama lets an empty host pass, so nothing is checked with it.
        let host = if self.shared.options.any_host { Some("") } else { head.header("host") };
        let met = meet(&head.method, &head.target, host, head.header("origin"));
        let met = met.and_then(|met| match met.route {
            Route::Responses if !self.shared.options.has([0, 13, 3]) => Err(unknown()),
            Route::Messages if !self.shared.options.has([0, 14, 0]) => Err(unknown()),
            _ => Ok(met),
        });
        let infers = met.as_ref().is_ok_and(|met| met.route.infers());
        self.fault = self.shared.take_fault(infers, reused);
        if self.fault == Some(Fault::ClosesOnReuse) {
            return Ok((After::Cut, Ending::Fault));
        }
        if let Some(Fault::Early400 { keep }) = self.fault {
            return self.refuse_early(keep).await;
        }
        // Go says it when the handler begins to read, so not where there is nothing to read.
        if head.expects_continue && head.body != BodyFraming::None {
            self.link.send(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
        }
        let json = met.as_ref().is_ok_and(|met| head.method != "GET" && met.route != Route::Blob);
        let blob = met.as_ref().is_ok_and(|met| met.route == Route::Blob);
        let Some(body) = self.read_body(json, blob || self.testimony.wants_body()).await? else {
            let words = "400 Bad Request";
            let reply = format!(
                "HTTP/1.1 {words}\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n{words}"
            );
            self.link.send(reply.as_bytes()).await?;
            return Ok((After::Close, Ending::BadRequest));
        };
        let started = Instant::now();
        let answer = match met {
            Err(reply) => Answer::Reply(reply),
            Ok(_) if body.too_large => Answer::Reply(Reply::new(413, JSON, "{\"error\":\"request body too large\"}")),
            Ok(met) => {
                let answer = match self.answer(&met, &body, started).await? {
                    Ok(answer) => answer,
                    Err((refusal, streamed)) => Answer::Reply(self.refuse(met.route, &refusal, streamed)),
                };
                match (answer, met.origin) {
                    (Answer::Reply(reply), Some(origin)) => {
                        Answer::Reply(reply.with("Access-Control-Allow-Origin", origin).with("Vary", "Origin"))
                    }
                    (answer, _) => answer,
                }
            }
        };
        self.tell(answer).await
    }

    fn form(&self) -> Form {
        Form {
            http_1_0: self.head.http_1_0,
            head_only: self.head.method == "HEAD",
            says_close: !self.head.keep_alive && !self.head.http_1_0,
        }
    }

    fn refuse(&self, route: Route, refusal: &Refusal, streamed: bool) -> Reply {
        let reply = refusal.reply(route.dialect(), self.shared.options.wire, self.shared.id(), streamed);
        with_stream_headers(reply, route, streamed && refusal.raised != Raised::Cloud)
    }

    /// Answers before the body is read.
    async fn refuse_early(&mut self, keep: bool) -> Done {
        let mut out = Vec::new();
        let form = self.form();
        Reply::new(400, JSON_UTF8, "{\"error\":\"refused before the body was read\"}").write(
            &mut out,
            form,
            self.link.date(),
        );
        self.link.send(&out).await?;
        self.testimony.first_byte();
        if keep && self.read_body(false, self.testimony.wants_body()).await?.is_some() && self.head.keep_alive {
            return Ok((After::Keep, Ending::Complete));
        }
        Ok((After::Cut, Ending::Fault))
    }

    /// Reads the body to its end. `None`: its framing is broken.
    async fn read_body(&mut self, keep: bool, hash: bool) -> Result<Option<Body>, Gone> {
        let mut reader = BodyReader::new(self.head.body);
        let mut body = Body { bytes: Vec::new(), sha256: None, too_large: false };
        let mut hasher = hash.then(Sha256::new);
        let sample_bytes = if self.testimony.wants_body() { self.shared.options.keep_body_bytes } else { 0 };
        let mut sample = Vec::new();
        let mut length = 0_u64;
        loop {
            let read = reader.read(&mut self.link.inbox, |bytes| {
                length += bytes.len() as u64;
                if let Some(hasher) = &mut hasher {
                    hasher.update(bytes);
                }
                if keep && body.bytes.len() + bytes.len() <= MOST_JSON_BYTES {
                    body.bytes.extend_from_slice(bytes);
                } else {
                    body.too_large |= keep;
                }
                let room = sample_bytes - sample.len();
                sample.extend_from_slice(&bytes[..bytes.len().min(room)]);
            });
            if read.is_err() {
                return Ok(None);
            }
            if reader.is_done() {
                break;
            }
            if let Err(gone) = self.link.receive().await {
                self.testimony.add(|seen| {
                    seen.body_bytes = length;
                    seen.body = sample;
                });
                return Err(gone);
            }
        }
        body.sha256 = hasher.map(|hasher| hasher.finalize().into());
        self.testimony.add(|seen| {
            seen.body_bytes = length;
            seen.body_sha256 = body.sha256.unwrap_or_default();
            seen.body = sample;
            seen.body_whole = true;
        });
        Ok(Some(body))
    }

    /// Says it, unless a fault says something else.
    async fn tell(&mut self, answer: Answer) -> Done {
        let fault = self.fault.clone();
        let cut = |after| Ok((after, Ending::Fault));
        match &fault {
            Some(Fault::HangsBeforeHeaders) => return Err(self.link.left().await),
            Some(Fault::ClosesBeforeHeaders) => return cut(After::Cut),
            Some(Fault::ResetsBeforeHeaders) => return cut(After::Reset),
            Some(Fault::ClosesInHead) => {
                self.send(b"HTTP/1.1 200 OK\r\nContent-Type: appl").await?;
                return cut(After::Cut);
            }
            Some(Fault::GarbageHead) => {
                self.send(b"\x16\x03\x01\x02\x00this is no HTTP\r\n\r\nnor is this\r\n").await?;
                return cut(After::Cut);
            }
            Some(Fault::HugeHead { size_bytes }) => {
                let mut out = b"HTTP/1.1 200 OK\r\nX-Padding: ".to_vec();
                out.resize((*size_bytes).min(64 * 1024 * 1024), b'a');
                out.extend_from_slice(b"\r\nContent-Length: 2\r\n\r\n{}");
                self.send(&out).await?;
                return cut(After::Cut);
            }
            Some(Fault::Redirect { location }) => {
                let reply = Reply::empty(302).with("Location", location.clone());
                return self.deliver(&reply).await;
            }
            Some(Fault::Html) => {
                let page = "<!doctype html>\n<title>It works!</title>\n<p>This is another service.\n";
                return self.deliver(&Reply::new(200, "text/html; charset=utf-8", page)).await;
            }
            Some(Fault::Informational { status }) => {
                let words = super::reply::reason(*status);
                let extra = if *status == 101 { "Connection: upgrade\r\nUpgrade: websocket\r\n" } else { "" };
                self.send(format!("HTTP/1.1 {status} {words}\r\n{extra}\r\n").as_bytes()).await?;
            }
            Some(Fault::Drips { pause_ms }) => self.link.drip = Some(Duration::from_millis(*pause_ms)),
            _ => {}
        }
        let mut done = self.say(answer).await;
        self.link.drip = None;
        if fault == Some(Fault::TwoReplies) && matches!(done, Ok((After::Keep, _))) {
            self.send(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 16\r\n\r\n{\"response\":\"2\"}",
            )
            .await?;
            done = Ok((After::Keep, Ending::Fault));
        }
        done
    }

    async fn say(&mut self, answer: Answer) -> Done {
        match answer {
            Answer::Reply(reply) => self.deliver(&reply).await,
            Answer::Lines(progress) if !progress.streams => self.deliver(&progress.whole()).await,
            Answer::Lines(progress) => self.stream_lines(&progress).await,
            Answer::Fetch(fetch) => self.stream_fetch(fetch).await,
            Answer::Job(job) => {
                let form = self.form();
                match job.run(self.shared, self.link, form, self.fault.as_ref(), self.testimony).await? {
                    Answered::Whole(reply) => self.deliver(&reply).await,
                    Answered::Streamed if self.fault.as_ref().is_some_and(|fault| fault.strikes_after().is_some()) => {
                        Ok((self.after(false), Ending::Fault))
                    }
                    Answered::Streamed => Ok((self.after(false), Ending::Complete)),
                    Answered::Cut => Ok((After::Cut, Ending::Fault)),
                    Answered::Reset => Ok((After::Reset, Ending::Fault)),
                }
            }
        }
    }

    /// Whether the connection goes on behind a reply.
    fn after(&self, must_close: bool) -> After {
        if must_close || !self.head.keep_alive { After::Close } else { After::Keep }
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), Gone> {
        self.link.send(bytes).await?;
        self.testimony.first_byte();
        Ok(())
    }

    async fn stream_lines(&mut self, progress: &Progress) -> Done {
        let form = self.form();
        let mut records = Records::new(form.http_1_0);
        let mut opening = Opening::new(&mut records.out, 200, form, self.link.date());
        opening.header("Content-Type", NDJSON);
        opening.date();
        opening.length(None);
        opening.end();
        for line in &progress.lines {
            records.add(|record| {
                record.extend_from_slice(line);
                record.push(b'\n');
            });
            self.send(&records.out).await?;
            records.out.clear();
        }
        records.finish();
        self.send(&records.out).await?;
        Ok((self.after(false), Ending::Complete))
    }

    /// Fetches, and tells how far it is. A client that leaves ends the fetch.
    async fn stream_fetch(&mut self, fetch: Fetch) -> Done {
        let form = self.form();
        let mut records = Records::new(form.http_1_0);
        if fetch.streams {
            let mut opening = Opening::new(&mut records.out, 200, form, self.link.date());
            opening.header("Content-Type", NDJSON);
            opening.date();
            opening.length(None);
            opening.end();
            self.send(&records.out).await?;
            records.out.clear();
        }
        let streams = fetch.streams;
        let (tell, mut told) = tokio::sync::mpsc::channel(1);
        let mut last = Vec::new();
        let fetching = fetch.run(self.shared, tell);
        tokio::pin!(fetching);
        loop {
            let line = tokio::select! { biased;
                line = told.recv() => line,
                () = &mut fetching => continue, // `tell` went with it
                gone = self.link.left() => return Err(gone),
            };
            let Some(line) = line else { break };
            if streams {
                records.add(|record| {
                    record.extend_from_slice(&line);
                    record.push(b'\n');
                });
                self.send(&records.out).await?;
                records.out.clear();
            }
            last = line;
        }
        if !streams {
            let status = if last.starts_with(b"{\"error\"") { 500 } else { 200 };
            return self.deliver(&Reply::new(status, JSON, last)).await;
        }
        records.finish();
        self.send(&records.out).await?;
        Ok((self.after(false), Ending::Complete))
    }

    /// Sends a whole reply, spoiled as the fault wants it.
    async fn deliver(&mut self, reply: &Reply) -> Done {
        let form = self.form();
        let mut out = Vec::with_capacity(reply.body.len() + 256);
        let spoiled;
        let reply = match &self.fault {
            Some(Fault::Compressed) => {
                spoiled = reply.clone().with("Content-Encoding", "gzip");
                &spoiled
            }
            Some(Fault::WrongContentLength { difference }) => {
                spoiled = Reply { framing: Framing::Wrong(*difference), ..reply.clone() };
                &spoiled
            }
            _ => reply,
        };
        let (body_at, must_close) = reply.write(&mut out, form, self.link.date());
        let strikes = match self.fault {
            Some(Fault::StallsMidStream { .. } | Fault::ResetsMidStream { .. } | Fault::ClosesMidStream { .. }) => {
                out.truncate(body_at + (out.len() - body_at) / 2);
                true
            }
            _ => false,
        };
        self.send(&out).await?;
        match self.fault {
            Some(Fault::ResetsMidStream { .. }) => Ok((After::Reset, Ending::Fault)),
            Some(Fault::ClosesMidStream { .. }) => Ok((After::Cut, Ending::Fault)),
            _ if strikes => Err(self.link.left().await),
            // The body ends short of what was announced.
            Some(Fault::WrongContentLength { difference }) if difference > 0 => Ok((After::Cut, Ending::Fault)),
            Some(Fault::WrongContentLength { .. }) => Ok((self.after(must_close), Ending::Fault)),
            _ => Ok((self.after(must_close), Ending::Complete)),
        }
    }
}
