//! The door alone, in this process, around hooks that the product does not have: they say where they are, and panic on demand.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use behavry_ollama_proxy::config::{Config, Flags};
use behavry_ollama_proxy::door::{Door, DoorSettings, Readers, Shield, Ticket};
use behavry_ollama_proxy::ledger::audit::AuditSettings;
use behavry_ollama_proxy::ledger::{Ledger, Metrics};
use behavry_ollama_proxy::memory::Memory;
use behavry_ollama_proxy::models::Models;
use behavry_ollama_proxy::server::{self, assemble};
use behavry_ollama_proxy::simulator::{Simulator, SimulatorOptions};
use behavry_ollama_proxy::site::Site;
use bytes::Bytes;
use pingora::apps::ServerApp;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::prelude::*;
use pingora::protocols::Stream;
use pingora::protocols::l4::stream::Stream as L4Stream;
use pingora::server::configuration::ServerConf;
use pingora_proxy::{ProxyHttp, Session};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::client::Request;
use crate::house::{KEY, read_records, wait_until};

/// The header that names the hook in which to panic.
const PANICS: &str = "x-panic";

pub struct BareDoor {
    pub address: SocketAddr,
    _simulator: Simulator,
    pub site: Arc<Site>,
    dir: tempfile::TempDir,
    _closing: watch::Sender<bool>,
}

impl BareDoor {
    pub async fn open() -> BareDoor {
        let simulator = Simulator::start(SimulatorOptions::for_tests()).await.expect("the simulator listens");
        let dir = tempfile::tempdir().expect("a folder");
        let site = Arc::new(site(&simulator, dir.path()));
        let proxy = pingora_proxy::http_proxy(&Arc::new(ServerConf::default()), Trap { backend: simulator.addr() });
        let settings = DoorSettings {
            head: Duration::from_secs(30),
            head_bytes: 32 * 1024,
            keepalive: Duration::from_secs(30),
            readers: Readers {
                buffer_bytes: 1 << 20,
                memory: Memory::new(1 << 30),
                window: Duration::from_secs(30),
                floor_bytes: 1,
                blocking_floor_bytes: 1,
            },
            shield: Shield { grace: Duration::ZERO, load: Duration::ZERO },
            linger: Duration::from_secs(2),
        };
        let door = Arc::new(Door::new(proxy, settings, Arc::clone(&site)));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let (closing, closed) = watch::channel(false);
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (door, closed) = (Arc::clone(&door), closed.clone());
                let stream: Stream = Box::new(L4Stream::from(socket));
                tokio::spawn(async move { door.process_new(stream, &closed).await });
            }
        });
        BareDoor { address, _simulator: simulator, site, dir, _closing: closing }
    }

    /// A chat whose reply is a stream, and which panics in the hook of that name.
    pub fn chat(hook: &str) -> Request {
        let ask = serde_json::json!({ "model": "tiny-story", "messages": [{ "role": "user", "content": "hi" }] });
        Request::post("/api/chat", ask).header(PANICS, hook)
    }

    pub fn metrics(&self) -> String {
        self.site.ledger.metrics.render()
    }

    /// The final record of a request.
    pub async fn final_of(&self, id: &str) -> Value {
        let dir = self.dir.path().join("audit");
        wait_until(&format!("the final record of {id}"), || {
            let mut finals = read_records(&dir)
                .into_iter()
                .filter(|record| record["extra"]["request_id"] == *id && record["extra"]["phase"] == "final");
            finals.next()
        })
        .await
    }
}

fn site(simulator: &Simulator, dir: &std::path::Path) -> Site {
    let env = |name: &str| match name {
        "BEHAVRY_STATE_DIR" => Some(dir.to_string_lossy().into_owned()),
        "BEHAVRY_JWT_PRIVATE_KEY" => Some(String::from_utf8_lossy(KEY).into_owned()),
        "BEHAVRY_OLLAMA_URL" => Some(simulator.url()),
        _ => None,
    };
    let config = Config::load(&Flags::default(), &env).expect("a good configuration");
    let audit = AuditSettings { dir: Some(dir.join("audit")), stdout: false, ..AuditSettings::default() };
    let ledger = Ledger::start(audit, Arc::new(Metrics::new("test", &[]))).expect("an audit");
    server::site(&config, assemble::snapshot(&config).expect("a snapshot"), Models::default(), ledger).expect("a site")
}

/// Passes everything on, and panics where a request says.
struct Trap {
    backend: SocketAddr,
}

fn step_on(session: &Session, hook: &str) {
    if session.req_header().headers.get(PANICS).is_some_and(|own| own == hook) {
        panic!("canary-5150 in {hook}");
    }
}

#[async_trait]
impl ProxyHttp for Trap {
    type CTX = Ticket;

    fn new_ctx(&self) -> Ticket {
        Ticket::pick_up()
    }

    async fn request_filter(&self, session: &mut Session, _ticket: &mut Ticket) -> Result<bool> {
        assert!(session.as_downstream().as_custom().is_some(), "Pingora sees the door's session, not the client's");
        step_on(session, "request_filter");
        Ok(false)
    }

    async fn upstream_peer(&self, session: &mut Session, _ticket: &mut Ticket) -> Result<Box<HttpPeer>> {
        step_on(session, "upstream_peer");
        Ok(Box::new(HttpPeer::new(self.backend, false, String::new())))
    }

    async fn upstream_request_filter(
        &self,
        session: &mut Session,
        head: &mut RequestHeader,
        _ticket: &mut Ticket,
    ) -> Result<()> {
        step_on(session, "upstream_request_filter");
        head.insert_header("host", self.backend.to_string())?;
        Ok(())
    }

    async fn response_filter(
        &self,
        session: &mut Session,
        _head: &mut ResponseHeader,
        ticket: &mut Ticket,
    ) -> Result<()> {
        step_on(session, "response_filter");
        ticket.status = Some(200);
        Ok(())
    }

    fn response_body_filter(
        &self,
        session: &mut Session,
        _body: &mut Option<Bytes>,
        end: bool,
        ticket: &mut Ticket,
    ) -> Result<Option<Duration>> {
        ticket.streamed_bytes += 1; // in want of a better place: calls, here
        if ticket.streamed_bytes == 4 {
            step_on(session, "response_body_filter");
        }
        if end {
            step_on(session, "end_of_body");
        }
        Ok(None)
    }

    async fn logging(&self, session: &mut Session, _e: Option<&Error>, _ticket: &mut Ticket) {
        step_on(session, "logging");
    }
}
