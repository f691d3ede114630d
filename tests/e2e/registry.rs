//! A registry of models on a socket, honest or not, which counts what is fetched from it.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What it does with blobs.
#[derive(Clone, Debug)]
pub enum Conduct {
    Honest,
    /// Sends so many bytes of a blob and the rest once it is released.
    Holds {
        after: usize,
    },
    /// Sends so many bytes of the first blob that is asked for whole, and closes; from then on it is honest.
    CutsOnce {
        after: usize,
    },
    /// Asks for a key, for everything.
    NeedsKey,
    /// Sends those who ask for a blob there, with the path behind it.
    Redirects {
        to: String,
    },
}

/// One request.
#[derive(Clone, Debug)]
pub struct Asked {
    pub method: String,
    pub target: String,
    pub range: Option<String>,
    /// Its connection has ended before everything was sent.
    pub broke_off: bool,
}

pub struct Registry {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    released: watch::Sender<bool>,
    task: JoinHandle<()>,
}

struct Shared {
    conduct: Mutex<Conduct>,
    /// By path.
    held: Mutex<HashMap<String, Vec<u8>>>,
    asked: Mutex<Vec<Asked>>,
    released: watch::Receiver<bool>,
}

/// A model that was put there.
pub struct Published {
    pub digests: Vec<String>,
    /// Of the manifest, as lists show it.
    pub digest: String,
    /// Manifest and blobs.
    pub bytes: usize,
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes that nothing else has.
pub fn blob(seed: u8, size: usize) -> Vec<u8> {
    (0..size).map(|i| (i as u8).wrapping_mul(31).wrapping_add((i >> 8) as u8).wrapping_add(seed)).collect()
}

impl Registry {
    pub async fn open() -> Registry {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let (released, receiver) = watch::channel(false);
        let shared = Arc::new(Shared {
            conduct: Mutex::new(Conduct::Honest),
            held: Mutex::default(),
            asked: Mutex::default(),
            released: receiver,
        });
        let own = Arc::clone(&shared);
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, Arc::clone(&own)));
            }
        });
        Registry { address, shared, released, task }
    }

    /// As it stands in the name of a model.
    pub fn name(&self, path: &str) -> String {
        format!("{}/{path}", self.address)
    }

    /// Puts `library/NAME:latest` there.
    pub fn publish(&self, name: &str, blobs: &[Vec<u8>]) -> Published {
        let mut held = self.shared.held.lock().expect("not poisoned");
        let digests: Vec<String> = blobs.iter().map(|blob| format!("sha256:{}", sha256(blob))).collect();
        let layer = |i: usize| json!({ "mediaType": "application/vnd.ollama.image.model", "digest": digests[i], "size": blobs[i].len() });
        let layers: Vec<_> = (1..blobs.len()).map(layer).collect();
        let manifest = json!({ "schemaVersion": 2, "config": layer(0), "layers": layers }).to_string();
        let bytes = manifest.len() + blobs.iter().map(Vec::len).sum::<usize>();
        let digest = sha256(manifest.as_bytes());
        held.insert(format!("/v2/library/{name}/manifests/latest"), manifest.into_bytes());
        for (digest, blob) in digests.iter().zip(blobs) {
            held.insert(format!("/v2/library/{name}/blobs/{digest}"), blob.clone());
        }
        Published { digests, digest, bytes }
    }

    /// Puts other bytes where a blob is, as many.
    pub fn spoil(&self, name: &str, digest: &str) {
        let mut held = self.shared.held.lock().expect("not poisoned");
        let blob = held.get_mut(&format!("/v2/library/{name}/blobs/{digest}")).expect("it is there");
        *blob.last_mut().expect("a byte") ^= 1;
    }

    pub fn set(&self, conduct: Conduct) {
        self.released.send_replace(false);
        *self.shared.conduct.lock().expect("not poisoned") = conduct;
    }

    pub fn release(&self) {
        self.released.send_replace(true);
    }

    pub fn asked(&self) -> Vec<Asked> {
        self.shared.asked.lock().expect("not poisoned").clone()
    }

    pub fn forget(&self) {
        self.shared.asked.lock().expect("not poisoned").clear();
    }

    /// How often a blob was fetched whole, as the mirror does, and in ranges, as backends do.
    pub fn fetches(&self, digest: &str) -> (usize, usize) {
        let asked = self.asked();
        let of_it = || asked.iter().filter(|asked| asked.method == "GET" && asked.target.ends_with(digest));
        (of_it().filter(|asked| asked.range.is_none()).count(), of_it().filter(|asked| asked.range.is_some()).count())
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(mut stream: TcpStream, shared: Arc<Shared>) {
    let mut bytes = Vec::new();
    while !bytes.windows(4).any(|end| end == b"\r\n\r\n") {
        if stream.read_buf(&mut bytes).await.unwrap_or(0) == 0 {
            return;
        }
    }
    let head = String::from_utf8_lossy(&bytes).into_owned();
    let mut words = head.split_whitespace();
    let (method, target) = (words.next().unwrap_or_default().to_owned(), words.next().unwrap_or_default().to_owned());
    let range = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("range").then(|| value.trim().to_owned())
    });
    let number = {
        let mut asked = shared.asked.lock().expect("not poisoned");
        asked.push(Asked { method: method.clone(), target: target.clone(), range: range.clone(), broke_off: false });
        asked.len() - 1
    };
    let sent = answer(&mut stream, &shared, &method, &target, range.as_deref()).await;
    if sent.is_none()
        && let Some(asked) = shared.asked.lock().expect("not poisoned").get_mut(number)
    {
        asked.broke_off = true;
    }
    let _ = stream.shutdown().await;
}

/// `None`: the client left.
async fn answer(
    stream: &mut TcpStream,
    shared: &Shared,
    method: &str,
    target: &str,
    range: Option<&str>,
) -> Option<()> {
    let conduct = shared.conduct.lock().expect("not poisoned").clone();
    let is_blob = target.contains("/blobs/");
    let mut say = async |status: &str, headers: &str, body: &[u8]| {
        let head = format!("HTTP/1.1 {status}\r\nConnection: close\r\n{headers}\r\n");
        stream.write_all(head.as_bytes()).await.ok()?;
        stream.write_all(body).await.ok()
    };
    match &conduct {
        Conduct::NeedsKey => {
            let challenge = "WWW-Authenticate: Bearer realm=\"http://elsewhere/token\"\r\nContent-Length: 0\r\n";
            return say("401 Unauthorized", challenge, b"").await;
        }
        Conduct::Redirects { to } if is_blob => {
            let headers = format!("Location: {to}{target}\r\nContent-Length: 0\r\n");
            return say("307 Temporary Redirect", &headers, b"").await;
        }
        _ => {}
    }
    let held = shared.held.lock().expect("not poisoned").get(target).cloned();
    let Some(held) = held else { return say("404 Not Found", "Content-Length: 0\r\n", b"").await };
    let (mut part, mut status, mut more) = (&held[..], "200 OK", String::new());
    if let Some((from, last)) = range.and_then(|range| range.strip_prefix("bytes=")?.split_once('-')) {
        let (from, last): (usize, usize) = (from.parse().ok()?, last.parse().ok()?);
        part = &held[from..=last];
        (status, more) = ("206 Partial Content", format!("Content-Range: bytes {from}-{last}/{}\r\n", held.len()));
    } else if is_blob {
        more = format!("Location: {target}\r\n"); // Ollama wants one
    }
    say(status, &format!("Content-Length: {}\r\n{more}", part.len()), b"").await?;
    if method == "HEAD" {
        return Some(());
    }
    match conduct {
        Conduct::Holds { after } if is_blob && part.len() > after => {
            stream.write_all(&part[..after]).await.ok()?;
            let mut released = shared.released.clone();
            let mut byte = [0];
            tokio::select! {
                _ = released.wait_for(|released| *released) => {}
                _ = stream.read(&mut byte) => return None, // nothing else comes but the end
            }
            stream.write_all(&part[after..]).await.ok()
        }
        Conduct::CutsOnce { after } if is_blob && range.is_none() && part.len() > after => {
            *shared.conduct.lock().expect("not poisoned") = Conduct::Honest;
            stream.write_all(&part[..after]).await.ok()
        }
        _ => stream.write_all(part).await.ok(),
    }
}
