//! An evidence package, `behavry.apr_evidence_package.v1`: a part of the audit in the form that Behavry's public verifier
//! (`behavry-verify`) takes, signed with the audit's key.
//!
//! The log has one chain for each writer, a package one for each agent. So the package's chains are built afresh, and the log's own
//! hashes travel in each event's `extra.log`: whoever has both can find the line that an event is. Behavry's verifier does not
//! recompute `event_hash`; whoever does so needs to know what was hashed, and the manifest says it ([`HASH_FORM`]).

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Write};
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ed25519_dalek::{Signer, SigningKey};
use serde_json::{Value, json};
use uuid::Uuid;

use super::chain::{self, GENESIS, Head, SegmentName};
use super::record::Moment;
use super::trail::{Event, Follower, Place, Position, TrailError};

mod merkle;
mod zip;

use merkle::Merkle;
use zip::Zip;

/// What `event_hash` is made over. In the manifest, so signed.
pub const HASH_FORM: &str = "sha256 over json.dumps(event without event_hash, previous_hash, signature, signer_kid; sort_keys, \
                             separators=(',',':')) followed by previous_hash, or GENESIS where that is null";

/// The verifier takes no member of an archive that is larger: 128 MiB. It also bounds our memory.
const LARGEST_MEMBER: usize = 128 << 20;

/// How many agents' chains are built at once.
const AGENTS: usize = 100_000;

/// What goes into a package.
#[derive(Default)]
pub struct Selection {
    /// Records of this moment and later.
    pub from: Option<Moment>,
    /// Records before this moment.
    pub to: Option<Moment>,
    pub agent: Option<String>,
}

/// What was packed.
#[derive(Debug)]
pub struct Packed {
    pub events: u64,
    pub agents: usize,
    pub root_hash: String,
    /// Places that could not be read: segments that are gone, torn ends.
    pub losses: u64,
}

/// Why there is no package.
#[derive(Debug)]
pub enum EvidenceError {
    Unreadable(TrailError),
    /// A line that is not what was written.
    Altered {
        segment: String,
        offset: u64,
    },
    TooLarge,
    NothingSelected,
    Unwritable(io::Error),
}

impl fmt::Display for EvidenceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            EvidenceError::Unreadable(error) => error.fmt(f),
            EvidenceError::Altered { segment, offset } => write!(
                f,
                "{segment}: the line at byte {offset} is not what was written, so nothing is signed; `audit verify` says more"
            ),
            EvidenceError::TooLarge => f.write_str(
                "the package would be larger than its verifier takes (128 MiB); narrow it with --from, --to or --agent",
            ),
            EvidenceError::NothingSelected => {
                f.write_str("no record of the audit is selected by --from, --to and --agent")
            }
            EvidenceError::Unwritable(error) => write!(f, "cannot write the package: {error}"),
        }
    }
}

impl std::error::Error for EvidenceError {}

impl From<TrailError> for EvidenceError {
    fn from(error: TrailError) -> EvidenceError {
        EvidenceError::Unreadable(error)
    }
}

/// Packs what `selection` names of the audit in `folder`. Each line is checked by itself; whether lines are missing is `verify`'s.
pub fn package(
    folder: &Path,
    selection: &Selection,
    key: &SigningKey,
    into: impl Write,
) -> Result<Packed, EvidenceError> {
    let mut package = Package::new(key);
    let mut follower = Follower::new(folder, &Position::default());
    let mut losses = 0;
    while let Some(event) = follower.next()? {
        match event {
            Event::Line { writer, at: Place { segment, offset }, line } => {
                let altered =
                    || EvidenceError::Altered { segment: SegmentName { writer, number: segment }.to_string(), offset };
                let sealed = chain::open(line).filter(chain::Sealed::is_intact).ok_or_else(altered)?;
                let record: Value = serde_json::from_slice(&sealed.event).map_err(|_| altered())?;
                if selection.takes(&record) {
                    package.add(record, sealed.previous, sealed.hash)?;
                }
            }
            Event::Lost { .. } => losses += 1,
        }
    }
    if package.events == 0 {
        return Err(EvidenceError::NothingSelected);
    }
    package.finish(Moment::now(), losses, into)
}

/// The public half of the key, for `behavry-verify --trust-anchor`.
pub fn trust_anchor(key: &SigningKey) -> Value {
    let public = key.verifying_key();
    json!({
        "schema": "behavry.trust_anchor.v1",
        "keys": [{
            "kid": chain::key_id(public.as_bytes()),
            "public_key": STANDARD.encode(public.as_bytes()),
            // The key has no life of its own; the verifier finds it by its id.
            "not_before": null,
            "not_after": null,
        }],
    })
}

impl Selection {
    /// Marks are no events: they speak of the log and of no agent.
    fn takes(&self, record: &Value) -> bool {
        let phase = record["extra"]["phase"].as_str().unwrap_or_default();
        let time = record["timestamp"].as_str().unwrap_or_default();
        // Time stamps all have one form, in which they sort as text.
        matches!(phase, "request" | "stream_start" | "final")
            && self.from.is_none_or(|from| time >= from.to_string().as_str())
            && self.to.is_none_or(|to| time < to.to_string().as_str())
            && self.agent.as_deref().is_none_or(|agent| record["agent_id"].as_str() == Some(agent))
    }
}

/// A package that is being filled.
struct Package<'a> {
    key: &'a SigningKey,
    kid: String,
    /// Each agent's last hash.
    heads: HashMap<String, String>,
    timeline: Vec<u8>,
    chain: Vec<u8>,
    tree: Merkle,
    events: u64,
    last: String,
}

impl<'a> Package<'a> {
    fn new(key: &'a SigningKey) -> Package<'a> {
        Package {
            key,
            kid: chain::key_id(key.verifying_key().as_bytes()),
            heads: HashMap::new(),
            timeline: Vec::new(),
            chain: Vec::new(),
            tree: Merkle::default(),
            events: 0,
            last: String::new(),
        }
    }

    fn add(&mut self, mut event: Value, log_previous: Head, log_hash: Head) -> Result<(), EvidenceError> {
        event["extra"]["log"] =
            json!({ "event_hash": log_hash.to_string(), "previous_hash": log_previous.to_string() });
        let agent = event["agent_id"].as_str().map(str::to_owned);
        let previous = agent.as_ref().and_then(|agent| self.heads.get(agent)).cloned();
        let head: Head = previous.as_deref().unwrap_or(GENESIS).parse().unwrap_or(Head::Genesis);
        let hash = head.after(&canonical(&event)).to_string();
        let signed = json!({
            "event_hash": hash,
            "previous_hash": previous.as_deref().unwrap_or(GENESIS),
            "tenant_id": "",
            "timestamp": event["timestamp"],
        });
        let id = event["id"].clone();
        event["event_hash"] = hash.clone().into();
        event["previous_hash"] = previous.clone().into();
        event["signer_kid"] = self.kid.clone().into();
        event["signature"] = self.sign(&signed).into();
        item(&mut self.timeline, &event);
        item(&mut self.chain, &json!({ "event_id": id, "hash": hash, "previous_hash": previous, "verified": true }));
        self.tree.add(&hash);
        self.last.clone_from(&hash);
        if let Some(agent) = agent {
            self.heads.insert(agent, hash);
        }
        self.events += 1;
        let fits = self.timeline.len().max(self.chain.len()) < LARGEST_MEMBER && self.heads.len() <= AGENTS;
        if fits { Ok(()) } else { Err(EvidenceError::TooLarge) }
    }

    fn finish(mut self, at: Moment, losses: u64, into: impl Write) -> Result<Packed, EvidenceError> {
        self.timeline.extend_from_slice(b"]");
        self.chain.extend_from_slice(b"]");
        let id = Uuid::new_v4().to_string();
        let root_hash = self.tree.root();
        let mut manifest = json!({
            "schema": "behavry.apr_evidence_package.v1",
            "apr_identifier": format!("APR-{}-{}", &at.to_string()[..4], &id[..8]),
            "apr_id": id,
            "tenant_id": "",
            "package_version": "1.1",
            "created_at": at.to_string(),
            "event_count": self.events,
            "hash_algorithm": "sha256",
            "root_hash": root_hash,
            "merkle_depth": self.tree.depth(),
            "chain_root_hash": self.last,
            "chain_status": "healthy",
            "delegation_node_count": 0,
            "trajectory_included": false,
            "narrative_included": false,
            "signer_kid": self.kid,
            "signature_algorithm": "ed25519",
            "signing_backend": "behavry-ollama-proxy",
            "event_hash_form": HASH_FORM,
        });
        manifest["signature"] = self.sign(&manifest).into();
        let about = json!({
            "schema": "behavry.apr_verification_metadata.v1",
            "signer_kid": self.kid,
            "algorithm": "ed25519",
            "public_key_hint": self.kid,
            "trust_anchor_url": null,
        });
        let mut zip = Zip::new(into, at);
        let members: [(&str, &[u8]); 4] = [
            ("manifest.json", &canonical(&manifest)),
            ("timeline.json", &self.timeline),
            ("hash_chain.json", &self.chain),
            ("verification_metadata.json", &canonical(&about)),
        ];
        for (name, bytes) in members {
            zip.add(&format!("apr-{id}/{name}"), bytes).map_err(EvidenceError::Unwritable)?;
        }
        zip.finish().map_err(EvidenceError::Unwritable)?;
        Ok(Packed { events: self.events, agents: self.heads.len(), root_hash, losses })
    }

    fn sign(&self, payload: &Value) -> String {
        STANDARD.encode(self.key.sign(&canonical(payload)).to_bytes())
    }
}

/// The log has whole numbers only, and so has what is added here.
fn canonical(value: &Value) -> Vec<u8> {
    chain::canonical(value).unwrap_or_default()
}

/// One more item of a JSON list that has no end yet.
fn item(list: &mut Vec<u8>, value: &Value) {
    list.push(if list.is_empty() { b'[' } else { b',' });
    list.extend_from_slice(&canonical(value));
}

#[cfg(test)]
mod tests;
