//! Load for the bench where oha is blind: streams, whose records it cannot count, and tokens that differ by request.
//!
//! ```text
//! stream_load URL --body JSON [--header 'Name: value'].. [--connections N] [--requests N] [--rate N] [--tokens FILE] [--hold]
//! ```
//! Every connection asks `--requests` times (1), one after the other. With `--rate` all of them together ask so often in a second, each
//! when its turn is: one that comes late because the answer before it was late counts from its turn. `--tokens` has a token a line: each is used for
//! one request, and the run ends when all are used. `--hold` prints `established N` when every stream has brought its
//! first record, and keeps them open until standard input ends. The result is one line of JSON; a request counts as
//! failed unless it is a 200 whose framing is complete and whose last record ends the stream in its dialect's words.
use std::collections::VecDeque;
use std::error::Error;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Barrier, watch};

/// No answer of a bench takes longer; a run must end.
const REQUEST_LIMIT: Duration = Duration::from_secs(120);
const DAY_US: u64 = 86_400_000_000;

type Failure = Box<dyn Error + Send + Sync>;

#[derive(Default)]
struct Plan {
    authority: String,
    path: String,
    headers: Vec<String>,
    body: String,
    connections: usize,
    requests: usize,
    /// Requests a second of all connections; as fast as they go without.
    rate: Option<f64>,
    tokens: Option<Mutex<VecDeque<String>>>,
    hold: bool,
}

/// What one request brought.
#[derive(Default)]
struct Answer {
    records: u64,
    bytes: u64,
    total_us: u64,
    first_us: u64,
    /// Age of each record on arrival, by the time stamp that it carries. Empty where it carries none.
    ages_us: Vec<u64>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let plan = match plan(std::env::args().skip(1)) {
        Ok(plan) => Arc::new(plan),
        Err(problem) => {
            eprintln!("stream_load: {problem}");
            return ExitCode::from(64);
        }
    };
    let established = Arc::new(Barrier::new(plan.connections + 1));
    let (release, released) = watch::channel(false);
    let began = Instant::now();
    let workers: Vec<_> = (0..plan.connections)
        .map(|place| tokio::spawn(work(plan.clone(), place, began, established.clone(), released.clone())))
        .collect();
    if plan.hold {
        established.wait().await;
        println!("established {}", plan.connections);
        let _ = tokio::task::spawn_blocking(|| std::io::copy(&mut std::io::stdin(), &mut std::io::sink())).await;
        let _ = release.send(true);
    }
    let (mut answers, mut failed, mut example) = (Vec::new(), 0_u64, None);
    for worker in workers {
        let Ok((mine, problems)) = worker.await else {
            failed += 1;
            continue;
        };
        answers.extend(mine);
        failed += problems.len() as u64;
        example = example.or(problems.into_iter().next());
    }
    let mut firsts: Vec<u64> = answers.iter().map(|answer| answer.first_us).collect();
    let mut totals: Vec<u64> = answers.iter().map(|answer| answer.total_us).collect();
    let mut ages: Vec<u64> = answers.iter().flat_map(|answer| answer.ages_us.iter().copied()).collect();
    println!(
        "{}",
        serde_json::json!({
            "ok": answers.len(),
            "failed": failed,
            "failure": example,
            "seconds": began.elapsed().as_secs_f64(),
            "records": answers.iter().map(|answer| answer.records).sum::<u64>(),
            "bytes": answers.iter().map(|answer| answer.bytes).sum::<u64>(),
            "first_us": percentiles(&mut firsts),
            "total_us": percentiles(&mut totals),
            "age_us": percentiles(&mut ages),
        })
    );
    ExitCode::SUCCESS
}

/// One connection's requests: the answers, and what went wrong.
async fn work(
    plan: Arc<Plan>,
    place: usize,
    run_began: Instant,
    established: Arc<Barrier>,
    released: watch::Receiver<bool>,
) -> (Vec<Answer>, Vec<String>) {
    let (mut answers, mut problems) = (Vec::new(), Vec::new());
    if plan.hold {
        // A stream that failed must not keep the others waiting: the count of failures tells.
        let mut stream = match open(&plan).await {
            Ok(stream) => Some(stream),
            Err(problem) => {
                problems.push(problem.to_string());
                None
            }
        };
        established.wait().await;
        let mut released = released;
        let _ = released.wait_for(|released| *released).await;
        if stream.take().is_some() {
            answers.push(Answer::default());
        }
        return (answers, problems);
    }
    let mut connection = None;
    let mut done = 0;
    while done < plan.requests || plan.tokens.is_some() {
        let token = match &plan.tokens {
            None => None,
            Some(tokens) => match tokens.lock().expect("no holder of this lock panics").pop_front() {
                Some(token) => Some(token),
                None => break,
            },
        };
        let mut from = None;
        if let Some(rate) = plan.rate {
            let turn = run_began + Duration::from_secs_f64((done * plan.connections + place) as f64 / rate);
            match turn.checked_duration_since(Instant::now()) {
                // When the timer comes, a millisecond late at the most, is not the gateway's doing.
                Some(early) => tokio::time::sleep(early).await,
                None => from = Some(turn),
            }
        }
        done += 1;
        match tokio::time::timeout(REQUEST_LIMIT, ask(&plan, connection.take(), token, from)).await {
            Ok(Ok((answer, kept))) => {
                answers.push(answer);
                connection = Some(kept);
            }
            Ok(Err(problem)) => problems.push(problem.to_string()),
            Err(_) => problems.push("no end within the limit".to_owned()),
        }
    }
    (answers, problems)
}

/// A stream that has brought its first record.
async fn open(plan: &Plan) -> Result<TcpStream, Failure> {
    tokio::time::timeout(REQUEST_LIMIT, async {
        let mut stream = connect(plan).await?;
        stream.write_all(request(plan, None).as_bytes()).await?;
        let mut seen = Vec::new();
        loop {
            if stream.read_buf(&mut seen).await? == 0 {
                return Err("closed before the first record".into());
            }
            let Some(head) = head(&seen)? else { continue };
            if seen[head.length..].contains(&b'{') {
                return Ok(stream);
            }
        }
    })
    .await?
}

/// One request and its whole answer, whose times count from `from` or from now; the connection comes back for the next one.
async fn ask(
    plan: &Plan,
    kept: Option<TcpStream>,
    token: Option<String>,
    from: Option<Instant>,
) -> Result<(Answer, TcpStream), Failure> {
    let mut stream = match kept {
        Some(stream) => stream,
        None => connect(plan).await?,
    };
    let began = from.unwrap_or_else(Instant::now);
    stream.write_all(request(plan, token).as_bytes()).await?;

    let mut raw = Vec::with_capacity(16 * 1024);
    let head = loop {
        if stream.read_buf(&mut raw).await? == 0 {
            return Err("closed before the head".into());
        }
        if let Some(head) = head(&raw)? {
            break head;
        }
    };
    raw.drain(..head.length);
    if head.status != 200 {
        return Err(format!("status {}", head.status).into());
    }

    let mut answer = Answer { first_us: us(began), ..Answer::default() };
    let mut body = Vec::new();
    let mut stamps_seen = 0;
    loop {
        let ended = head.framing.take(&mut raw, &mut body)?;
        if stamps_seen < body.len() {
            // Stamps never straddle the parts of a record that we are given: a record arrives in one chunk.
            answer.ages_us.extend(ages_us(&body[stamps_seen..]));
            stamps_seen = body.len();
        }
        if ended {
            break;
        }
        if stream.read_buf(&mut raw).await? == 0 {
            return Err("cut before the end of the body".into());
        }
    }
    answer.total_us = us(began);
    answer.bytes = body.len() as u64;
    let lines = body.iter().filter(|byte| **byte == b'\n').count() as u64;
    // An SSE event ends with an empty line; a record of NDJSON is a line; a body that is no stream is one record.
    answer.records = if head.events { lines / 2 } else { lines.max(1) };
    let tail = &body[body.len().saturating_sub(4096)..];
    if ![&b"\"done\":true"[..], b"data: [DONE]", b"\"finish_reason\":\"", b"\"done\": true"]
        .iter()
        .any(|end| contains(tail, end))
    {
        return Err("ended without the dialect's own end".into());
    }
    Ok((answer, stream))
}

async fn connect(plan: &Plan) -> Result<TcpStream, Failure> {
    let stream = TcpStream::connect(&plan.authority).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn request(plan: &Plan, token: Option<String>) -> String {
    let mut text = format!(
        "POST {} HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n",
        plan.path,
        plan.authority,
        plan.body.len()
    );
    for header in &plan.headers {
        text.push_str(header);
        text.push_str("\r\n");
    }
    if let Some(token) = token {
        text.push_str(&format!("authorization: Bearer {token}\r\n"));
    }
    text.push_str("\r\n");
    text.push_str(&plan.body);
    text
}

struct Head {
    length: usize,
    status: u16,
    framing: Framing,
    events: bool,
}

/// How the end of a body is known.
enum Framing {
    Length(usize),
    Chunked,
}

/// The head at the start of `raw`, once it is whole.
fn head(raw: &[u8]) -> Result<Option<Head>, Failure> {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut response = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(length) = response.parse(raw)? else { return Ok(None) };
    let value = |name: &str| {
        response.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name)).map(|header| header.value)
    };
    let framing = match value("content-length") {
        Some(length) => Framing::Length(std::str::from_utf8(length)?.trim().parse()?),
        None => Framing::Chunked,
    };
    let events = value("content-type").is_some_and(|value| value.starts_with(b"text/event-stream"));
    Ok(Some(Head { length, status: response.code.unwrap_or(0), framing, events }))
}

impl Framing {
    /// Moves what is whole from `raw` to `body`. True when the body has ended.
    fn take(&self, raw: &mut Vec<u8>, body: &mut Vec<u8>) -> Result<bool, Failure> {
        match self {
            Framing::Length(length) => {
                body.append(raw);
                Ok(body.len() >= *length)
            }
            Framing::Chunked => {
                let mut at = 0;
                let ended = loop {
                    let (skip, size) = match httparse::parse_chunk_size(&raw[at..]) {
                        Ok(httparse::Status::Complete(found)) => found,
                        Ok(httparse::Status::Partial) => break false,
                        Err(_) => return Err("a bad chunk size".into()),
                    };
                    let size = usize::try_from(size)?;
                    // The line of the size, the data, and the CRLF after it.
                    let Some(data) = raw.get(at + skip..at + skip + size + 2) else { break false };
                    body.extend_from_slice(&data[..size]);
                    at += skip + size + 2;
                    if size == 0 {
                        break true;
                    }
                };
                raw.drain(..at);
                Ok(ended)
            }
        }
    }
}

/// Now minus each `created_at` in `records`, of which only the time of day is read: a bench does not run at midnight
/// often enough to matter, and a stamp in the future counts as 0.
fn ages_us(records: &[u8]) -> Vec<u64> {
    let now_us = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64) % DAY_US;
    records
        .split(|byte| *byte == b'\n')
        .filter_map(|record| {
            let key = b"\"created_at\":\"";
            let at = record.windows(key.len()).position(|window| window == key)? + key.len();
            let stamp = std::str::from_utf8(record.get(at..)?.split(|byte| *byte == b'"').next()?).ok()?;
            let time = stamp.split_once('T')?.1.strip_suffix('Z')?;
            let (whole, fraction) = time.split_once('.')?;
            let mut parts = whole.split(':').map(str::parse::<u64>);
            let (hours, minutes, seconds) = (parts.next()?.ok()?, parts.next()?.ok()?, parts.next()?.ok()?);
            let micros: u64 = format!("{fraction:0<6}").get(..6)?.parse().ok()?;
            Some(((hours * 60 + minutes) * 60 + seconds) * 1_000_000 + micros)
        })
        .map(move |stamp_us| now_us.saturating_sub(stamp_us))
        .collect()
}

fn plan(mut words: impl Iterator<Item = String>) -> Result<Plan, Failure> {
    let url = words.next().ok_or("usage: stream_load URL --body JSON ..")?;
    let rest = url.strip_prefix("http://").ok_or("only http:// URLs")?;
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let mut plan = Plan {
        authority: authority.to_owned(),
        path: format!("/{path}"),
        connections: 1,
        requests: 1,
        ..Plan::default()
    };
    while let Some(flag) = words.next() {
        if flag == "--hold" {
            plan.hold = true;
            continue;
        }
        let value = words.next().ok_or_else(|| format!("{flag} needs a value"))?;
        match flag.as_str() {
            "--body" => plan.body = value,
            "--header" => plan.headers.push(value),
            "--connections" => plan.connections = value.parse()?,
            "--requests" => plan.requests = value.parse()?,
            "--rate" => plan.rate = Some(value.parse()?),
            "--tokens" => {
                plan.tokens = Some(Mutex::new(std::fs::read_to_string(value)?.lines().map(str::to_owned).collect()));
            }
            _ => return Err(format!("unknown flag {flag}").into()),
        }
    }
    Ok(plan)
}

fn percentiles(sample: &mut [u64]) -> serde_json::Value {
    if sample.is_empty() {
        return serde_json::Value::Null;
    }
    sample.sort_unstable();
    let at = |part: f64| sample[((sample.len() - 1) as f64 * part).round() as usize];
    serde_json::json!({ "p50": at(0.5), "p99": at(0.99), "max": at(1.0) })
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

fn us(since: Instant) -> u64 {
    since.elapsed().as_micros() as u64
}
