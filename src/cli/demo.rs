//! `demo`: what the proxy does, shown on this machine in a few seconds, and then left running to be tried.

use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{Failure, announce, first_start};
use crate::config::{BackendUrl, Config};
use crate::identity::issuer::Claims;
use crate::server::{self, assemble};
use crate::simulator::{Simulator, SimulatorOptions};

/// The model that the demo asks for, if the backend lists no other.
const MODEL: &str = "llama3.2";
const REPLY_BYTES: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(120);

pub fn run(mut config: Config) -> Result<(), Failure> {
    first_start::make_agent(&config)?;
    // Records go to the file; on this terminal they would bury what the demo shows.
    config.audit.stdout = false;
    let runtime = server::runtime(&config)?;
    let shown = runtime.block_on(async {
        let simulator = backend_or_simulator(&mut config).await?;
        let token = demo_token(&config)?;
        let audit = config.audit.dir.clone();
        let (told, started) = tokio::sync::oneshot::channel();
        let serving = server::serve(config, move |started| {
            announce(&started);
            let _ = told.send(started); // the demo below waits for it
        });
        let show = async move {
            if let Ok(started) = started.await {
                let shown = show(started.public, &token, &audit).await;
                if let Err(what) = &shown {
                    eprintln!("the demo's requests failed: {what}");
                }
                paste(started.public, started.operator, &token);
                std::future::pending::<()>().await; // keeps `started` and with it the proxy
            }
        };
        let served = tokio::select! {
            served = serving => served,
            () = show => Ok(()),
        };
        drop(simulator);
        served.map_err(Failure::from)
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    shown
}

/// A simulator takes the backend's place if nothing answers there. Never one that is not on this machine: a URL that somebody set
/// and that is down is told instead, by the requests themselves.
async fn backend_or_simulator(config: &mut Config) -> Result<Option<Simulator>, Failure> {
    let url = config.backend[0].url.clone();
    let there = TcpStream::connect((url.host().to_owned(), url.port()));
    if matches!(tokio::time::timeout(Duration::from_secs(2), there).await, Ok(Ok(_))) {
        eprintln!("Ollama answers at {url}");
        return Ok(None);
    }
    let options = SimulatorOptions { port: 0, tokens_per_second: 40.0, ..SimulatorOptions::default() };
    let simulator =
        Simulator::start(options).await.map_err(|e| Failure::runtime(format!("the simulator cannot listen: {e}")))?;
    eprintln!("nothing answers at {url}; a simulator stands in for Ollama at {}", simulator.url());
    config.backend[0].url = BackendUrl::parse(&simulator.url()).map_err(Failure::runtime)?;
    Ok(Some(simulator))
}

fn demo_token(config: &Config) -> Result<String, Failure> {
    let issuer = assemble::keys::load(config).map_err(Failure::configuration)?.issuer;
    let issuer = issuer
        .ok_or_else(|| Failure::configuration("the demo signs its own token, and no signing key is configured"))?;
    let claims = Claims {
        sub: "demo".to_owned(),
        permissions: vec!["web:read".to_owned(), "web:write".to_owned()],
        ..Claims::default()
    };
    let (token, _) =
        issuer.mint(&claims, jiff::Timestamp::now().as_second()).map_err(|e| Failure::runtime(e.to_string()))?;
    Ok(token)
}

async fn show(public: std::net::SocketAddr, token: &str, audit: &std::path::Path) -> Result<(), String> {
    let models = request(public, token, "GET", "/api/v1/ollama/api/tags", "demo-list", None).await?;
    let model = first_model(&models).unwrap_or_else(|| MODEL.to_owned());
    println!("\n== a native request, streamed: POST /api/v1/ollama/api/chat, model {model}");
    let native = serde_json::json!({ "model": model, "messages": [{ "role": "user", "content": "Hello!" }] });
    let reply = request(public, token, "POST", "/api/v1/ollama/api/chat", "demo-native", Some(&native)).await?;
    print_lines(&reply);
    println!("\n== the same in OpenAI's words, streamed: POST /api/v1/ollama/v1/chat/completions");
    let openai =
        serde_json::json!({ "model": model, "stream": true, "messages": [{ "role": "user", "content": "Hello!" }] });
    let reply =
        request(public, token, "POST", "/api/v1/ollama/v1/chat/completions", "demo-openai", Some(&openai)).await?;
    print_lines(&reply);

    println!("\n== what the audit says ({})", audit.display());
    for line in records_of(audit, &["demo-native", "demo-openai"]).await {
        println!("{line}");
    }
    Ok(())
}

/// The text of all segments of the audit.
async fn all_lines(folder: &std::path::Path) -> std::io::Result<String> {
    let mut names = Vec::new();
    let mut entries = tokio::fs::read_dir(folder).await?;
    while let Some(entry) = entries.next_entry().await? {
        names.push(entry.path());
    }
    names.retain(|name| name.extension().is_some_and(|extension| extension == "jsonl"));
    names.sort();
    let mut text = String::new();
    for name in names {
        text.push_str(&tokio::fs::read_to_string(name).await?);
    }
    Ok(text)
}

/// The final records are written a moment after the client has its last byte.
async fn records_of(audit: &std::path::Path, request_ids: &[&str]) -> Vec<String> {
    let mut lines = Vec::new();
    for _ in 0..50 {
        let text = all_lines(audit).await.unwrap_or_default();
        let ours = |line: &&str| {
            let record: Value = serde_json::from_str(line).unwrap_or_default();
            request_ids.iter().any(|id| record["extra"]["request_id"] == *id)
        };
        lines = text.lines().filter(ours).map(str::to_owned).collect();
        if lines.iter().filter(|line| line.contains("\"phase\":\"final\"")).count() >= request_ids.len() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // An earlier demo's records carry the same ids; the last ones are ours.
    let from = lines.len().saturating_sub(3 * request_ids.len());
    lines.split_off(from)
}

fn first_model(tags: &str) -> Option<String> {
    let tags: Value = serde_json::from_str(tags).ok()?;
    let names: Vec<&str> = tags["models"].as_array()?.iter().filter_map(|entry| entry["name"].as_str()).collect();
    let wanted = names.iter().find(|name| name.starts_with(MODEL)).or(names.first())?;
    Some(wanted.trim_end_matches(":latest").to_owned())
}

fn print_lines(reply: &str) {
    let lines: Vec<&str> = reply.lines().filter(|line| !line.is_empty()).collect();
    for line in lines.iter().take(3) {
        println!("{line}");
    }
    if lines.len() > 6 {
        println!("  .. {} more lines ..", lines.len() - 6);
    }
    for line in lines.iter().skip(3.max(lines.len().saturating_sub(3))) {
        println!("{line}");
    }
}

/// One request as the simplest client makes it: HTTP/1.0, so that the connection's end is the reply's.
async fn request(
    public: std::net::SocketAddr,
    token: &str,
    method: &str,
    path: &str,
    id: &str,
    body: Option<&Value>,
) -> Result<String, String> {
    let body = body.map(Value::to_string).unwrap_or_default();
    let text = format!(
        "{method} {path} HTTP/1.0\r\nHost: {public}\r\nAuthorization: Bearer {token}\r\nX-Request-Id: {id}\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let exchange = async {
        let mut stream = TcpStream::connect(public).await?;
        stream.write_all(text.as_bytes()).await?;
        let mut reply = Vec::new();
        stream.take(REPLY_BYTES).read_to_end(&mut reply).await?;
        Ok::<_, std::io::Error>(reply)
    };
    let reply = tokio::time::timeout(PATIENCE, exchange).await.map_err(|_| "no reply in time".to_owned())?;
    let reply = String::from_utf8_lossy(&reply.map_err(|e| e.to_string())?).into_owned();
    let (head, body) = reply.split_once("\r\n\r\n").ok_or("the reply has no head")?;
    match head.split(' ').nth(1) {
        Some("200") => Ok(body.to_owned()),
        _ => Err(format!("{}: {}", head.lines().next().unwrap_or(""), body.trim())),
    }
}

fn paste(public: std::net::SocketAddr, operator: std::net::SocketAddr, token: &str) {
    println!(
        r#"
== try it yourself; this keeps serving until Ctrl-C and is to be watched at http://{operator}/

export BEHAVRY_JWT={token}

curl -s http://{public}/api/v1/ollama/api/chat -H "Authorization: Bearer $BEHAVRY_JWT" -d '{{"model": "{MODEL}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'

python3 -c 'import os; from ollama import Client; c = Client(host="http://{public}/api/v1/ollama", headers={{"Authorization": "Bearer " + os.environ["BEHAVRY_JWT"]}}); print(c.chat(model="{MODEL}", messages=[{{"role": "user", "content": "Hello!"}}]).message.content)'

python3 -c 'import os; from openai import OpenAI; c = OpenAI(base_url="http://{public}/api/v1/ollama/v1", api_key=os.environ["BEHAVRY_JWT"]); print(c.chat.completions.create(model="{MODEL}", messages=[{{"role": "user", "content": "Hello!"}}]).choices[0].message.content)'
"#
    );
}
