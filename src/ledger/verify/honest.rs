//! Logs as an honest writer leaves them, of any length and with any accidents, made from a seed. They are built from the format's own
//! functions and from real records, in memory, so that thousands can be made, mutated and checked.

use std::collections::BTreeMap;
use std::path::Path;

use base64::Engine;
use ed25519_dalek::pkcs8::EncodePublicKey;
use ed25519_dalek::{Signer, SigningKey};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use crate::ledger::chain::mark::{ChainHead, CloseReason, TombstoneReason};
use crate::ledger::chain::{self, Head, Mark, SegmentName, WriterName};
use crate::ledger::record::{Id, Moment};
use crate::ledger::{Entry, Outcome, Phase, Record};

/// A folder of an audit, and what was kept of it elsewhere.
pub(in crate::ledger) struct Log {
    pub files: BTreeMap<String, Vec<u8>>,
    /// `audit.checkpoint_file`.
    pub kept: Vec<u8>,
    pub key: SigningKey,
    pub rng: StdRng,
    now: i64,
    /// Lines that are no marks.
    records: usize,
    chains: Vec<Chain>,
    tombstones: Vec<SegmentName>,
}

#[derive(Clone)]
struct Chain {
    name: SegmentName,
    count: u64,
    head: Head,
    open: Vec<Request>,
    dead: bool,
    stopped: bool,
    torn: u64,
    /// (segment, count before it, previous hash of its first line, time of its first)
    begun: Vec<(u32, u64, Head, Moment)>,
    checkpointed: u64,
}

/// A request: what it is called, which a caller may have chosen, and what the ids of its records have in common.
#[derive(Clone)]
struct Request {
    name: String,
    exchange: u64,
}

/// What a log is like.
pub(in crate::ledger) struct Shape {
    pub records: usize,
    pub writers: usize,
    /// Of a hundred ends of writers.
    pub crashes: u32,
    /// Of a hundred steps.
    pub rotations: u32,
    /// Likewise, beside those that every rotation has.
    pub checkpoints: u32,
    pub retention: bool,
    /// The last writer ends in order.
    pub closed: bool,
}

impl Log {
    pub fn of(seed: u64, shape: &Shape) -> Log {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut secret = [0; 32];
        rng.fill(&mut secret);
        let mut log = Log {
            files: BTreeMap::new(),
            kept: Vec::new(),
            key: SigningKey::from_bytes(&secret),
            rng,
            now: 1_795_000_000_000_000,
            records: 0,
            chains: Vec::new(),
            tombstones: Vec::new(),
        };
        for writer in 0..shape.writers {
            log.start();
            while log.records < shape.records * (writer + 1) / shape.writers {
                log.step(shape);
            }
            let last = writer + 1 == shape.writers;
            if (last && shape.closed) || (!last && log.rng.gen_range(0..100) >= shape.crashes) {
                log.stop();
            } else {
                log.crash();
            }
        }
        log
    }

    /// The folder on disk, with the public key beside it.
    pub fn write(&self, folder: &Path) {
        for (name, bytes) in &self.files {
            std::fs::write(folder.join(name), bytes).expect("written");
        }
        std::fs::write(folder.join("kept"), &self.kept).expect("written");
        let public = self.key.verifying_key().to_public_key_pem(Default::default()).expect("PEM");
        std::fs::write(folder.join("audit-key.pub"), public).expect("written");
    }

    fn key_id(&self) -> String {
        chain::key_id(self.key.verifying_key().as_bytes())
    }

    fn id(&mut self) -> (Id, Moment) {
        self.now += self.rng.gen_range(1..400_000);
        let at = Moment::from_microseconds(self.now);
        (Id::new(at, self.rng.r#gen()), at)
    }

    /// Appends an event to the newest chain, and gives its line.
    fn append(&mut self, event: &[u8], at: Moment) -> Vec<u8> {
        let chain = self.chains.last_mut().expect("started");
        if chain.begun.last().is_none_or(|begun| begun.0 != chain.name.number) {
            chain.begun.push((chain.name.number, chain.count, chain.head, at));
        }
        let mut line = Vec::new();
        chain.head = chain::seal(event, chain.head, &mut line);
        chain.count += 1;
        self.files.entry(chain.name.to_string()).or_default().extend_from_slice(&line);
        line
    }

    fn mark(&mut self, mark: Mark) -> Vec<u8> {
        let (id, at) = self.id();
        self.append(&mark.event(id, at), at)
    }

    /// As a mark, with the signature over what it says.
    fn signed(&mut self, mark: Mark) -> Vec<u8> {
        let (id, at) = self.id();
        let mut mark = mark;
        let payload = mark.payload(&at.to_string()).expect("a signed mark");
        let made = base64::engine::general_purpose::STANDARD.encode(self.key.sign(&payload).to_bytes());
        if let Mark::Checkpoint { signature, .. } | Mark::Tombstone { signature, .. } = &mut mark {
            *signature = made;
        }
        self.append(&mark.event(id, at), at)
    }

    fn current(&self) -> &Chain {
        self.chains.last().expect("started")
    }

    fn start(&mut self) {
        self.now += 2_000_000;
        let writer = WriterName::new(self.now / 1_000_000, self.rng.r#gen());
        let mut heads: Vec<_> = (self.chains.iter())
            .filter(|chain| chain.count > 0 && self.files.keys().any(|name| name.contains(chain.name.writer.as_str())))
            .map(|chain| ChainHead {
                writer: chain.name.writer,
                segment: chain.name.number,
                count: chain.count,
                head: chain.head.to_string(),
            })
            .collect();
        heads.sort_by_key(|head| head.writer);
        self.chains.push(Chain {
            name: SegmentName { writer, number: 1 },
            count: 0,
            head: Head::Genesis,
            open: Vec::new(),
            dead: false,
            stopped: false,
            torn: 0,
            begun: Vec::new(),
            checkpointed: 0,
        });
        self.segment_open(heads);
        self.adopt();
    }

    fn segment_open(&mut self, heads: Vec<ChainHead>) {
        let (name, count) = (self.current().name, self.current().count);
        let mark = Mark::segment_open(name.writer, name.number, count, heads, &self.key_id());
        self.mark(mark);
    }

    fn adopt(&mut self) {
        let dead: Vec<_> = self.chains.iter().filter(|chain| chain.dead).cloned().collect();
        for dead in dead {
            self.mark(Mark::Adopted {
                writer: dead.name.writer,
                segment: dead.name.number,
                count: dead.count,
                head: dead.head.to_string(),
                torn_bytes: dead.torn,
                open_requests: dead.open.len() as u64,
            });
            for request in &dead.open {
                self.record(Phase::Final, Some(Outcome::Crashed), request, Some("ollama"));
            }
        }
        self.chains.iter_mut().for_each(|chain| chain.dead = false);
    }

    fn record(&mut self, phase: Phase, outcome: Option<Outcome>, request: &Request, backend: Option<&str>) {
        let at = self.id().1;
        let id = Id::of(at, phase, request.exchange);
        let agents = ["alice", "b\u{f6}b", "\u{6f22}\u{5b57} \"q\" \\ \n\t\u{1f600}", "carol"];
        let agent = agents.choose(&mut self.rng).copied();
        let tokens = self.rng.gen_bool(0.7).then(|| self.rng.gen_range(0..100_000));
        let early = backend.is_none() && phase == Phase::Final;
        let entry = Entry {
            agent_id: agent,
            request_id: Some(&request.name),
            action: Some("POST"),
            target: Some("/api/chat"),
            model: Some(["llama3.2", "mistral", "qwen3:8b"][self.rng.gen_range(0..3)]),
            policy_result: Some(if early { "deny" } else { "allow" }),
            backend: backend.filter(|_| phase != Phase::Request),
            latency_ms: Some(self.rng.gen_range(0..10_000)),
            input_tokens: tokens,
            output_tokens: tokens,
            response_code: Some(if early { 403 } else { 200 }),
            ..Entry::default()
        };
        let mut event = Vec::new();
        Record::new(id, at, phase, outcome, &entry).write_event(&mut event);
        self.append(&event, at);
        self.records += 1;
    }

    /// Something happens.
    fn step(&mut self, shape: &Shape) {
        if self.rng.gen_range(0..100) < shape.rotations {
            return self.rotate(shape.retention);
        }
        if self.rng.gen_range(0..100) < shape.checkpoints {
            return self.checkpoint();
        }
        match self.rng.gen_range(1..10) {
            1 => {
                let request = self.request();
                self.record(Phase::Final, Some(Outcome::Refused), &request, None);
            }
            2..=4 => {
                let request = self.request();
                self.record(Phase::Request, None, &request, None);
                self.chains.last_mut().expect("started").open.push(request);
            }
            5 => {
                if let Some(request) = self.current().open.clone().choose(&mut self.rng) {
                    self.record(Phase::StreamStart, None, request, Some("ollama"));
                }
            }
            _ => self.finish_one(),
        }
    }

    /// Mostly of a name of its own; sometimes a caller chooses the same again.
    fn request(&mut self) -> Request {
        let name = match self.rng.gen_bool(0.05) {
            true => "chosen-by-the-caller".to_owned(),
            false => format!("r-{:016x}", self.rng.r#gen::<u64>()),
        };
        Request { name, exchange: self.rng.r#gen() }
    }

    fn finish_one(&mut self) {
        let open = self.current().open.len();
        if open > 0 {
            let at = self.rng.gen_range(0..open);
            let request = self.chains.last_mut().expect("started").open.swap_remove(at);
            self.record(Phase::Final, Some(Outcome::Complete), &request, Some("ollama"));
        }
    }

    fn checkpoint(&mut self) {
        let (name, count, head) = (self.current().name, self.current().count, self.current().head.to_string());
        let key_id = self.key_id();
        let mark = Mark::Checkpoint {
            writer: name.writer,
            segment: name.number,
            count,
            head,
            key_id,
            signature: String::new(),
        };
        let line = self.signed(mark);
        self.kept.extend_from_slice(&line);
        self.chains.last_mut().expect("started").checkpointed = count + 1;
    }

    fn close(&mut self, reason: CloseReason) {
        self.checkpoint();
        let (name, count, head) = (self.current().name, self.current().count, self.current().head.to_string());
        self.mark(Mark::SegmentClose { writer: name.writer, segment: name.number, count, head, reason });
    }

    fn rotate(&mut self, retention: bool) {
        self.close(CloseReason::Rotated);
        let chain = self.chains.last_mut().expect("started");
        chain.name = chain.name.next().expect("few");
        self.segment_open(Vec::new());
        if retention && self.files.len() > 3 {
            self.bury();
        }
    }

    /// Deletes the oldest segment that is not the current one.
    fn bury(&mut self) {
        let name: SegmentName = self.files.keys().next().expect("some").parse().expect("a segment");
        let Some(chain) = self.chains.iter().find(|chain| chain.name.writer == name.writer) else { return };
        if name == self.current().name || chain.dead {
            return;
        }
        let at = chain.begun.iter().position(|begun| begun.0 == name.number).expect("begun");
        let (_, count_before, first_previous, from) = chain.begun[at];
        let (through, head, to) = match chain.begun.get(at + 1) {
            Some((_, count, head, at)) => (*count, *head, *at),
            None => (chain.count, chain.head, from),
        };
        let key_id = self.key_id();
        let mark = Mark::Tombstone {
            writer: name.writer,
            segment: name.number,
            first_previous_hash: first_previous.to_string(),
            head: head.to_string(),
            count_before,
            count: through - count_before,
            from: from.to_string(),
            to: to.to_string(),
            reason: TombstoneReason::Size,
            key_id,
            signature: String::new(),
        };
        self.signed(mark);
        self.files.remove(&name.to_string());
        self.tombstones.push(name);
    }

    fn stop(&mut self) {
        while !self.current().open.is_empty() {
            self.finish_one();
        }
        self.close(CloseReason::Stopped);
        self.chains.last_mut().expect("started").stopped = true;
    }

    fn crash(&mut self) {
        let torn = match self.rng.gen_bool(0.5) {
            true => self.rng.gen_range(1..200),
            false => 0,
        };
        let chain = self.chains.last_mut().expect("started");
        (chain.dead, chain.torn) = (true, torn);
        let name = chain.name.to_string();
        self.files.entry(name).or_default().extend(std::iter::repeat_n(b'{', torn as usize));
    }

    /// For each chain that has files: up to which line somebody else, or somewhere else, knows it.
    pub fn covered(&self) -> Vec<(WriterName, u64)> {
        let last = self.chains.len() - 1;
        let known = |(place, chain): (usize, &Chain)| match place == last {
            // Every later writer lists its head.
            false => (chain.name.writer, u64::MAX),
            true => (chain.name.writer, chain.checkpointed),
        };
        self.chains.iter().enumerate().map(known).collect()
    }
}
