//! One answer with text: the model is loaded, the prompt is thought about, tokens come at their pace, and somewhere a
//! fault may strike.

use std::time::{Duration, Instant};

use super::Shared;
use super::ask::{Ask, Think};
use super::fault::Fault;
use super::link::{Gone, Link};
use super::loose::member_text;
use super::models::{Model, Voice};
use super::options::WireForm;
use super::refusal::{RUNNER_DIED, Refusal};
use super::reply::{Form, Opening, Records, Reply};
use super::route::Route;
use super::script::{Kind, Reason, Recital, Step};
use super::speak::{CALL_NAME, Call, Delta, Said, Setting, Speaker, Totals};
use super::witness::Testimony;
use super::{native, openai};

/// A request for text whose model was found.
pub(super) struct Job {
    pub route: Route,
    pub ask: Ask,
    pub model: Model,
    /// When the request was whole.
    pub started: Instant,
}

/// What comes of a job: a whole reply still to be delivered, or a stream that was sent.
pub(super) enum Answered {
    Whole(Reply),
    /// The stream's end was sent.
    Streamed,
    /// The fault wants the connection closed here.
    Cut,
    /// The fault wants it reset here.
    Reset,
}

/// The two models without a pace of their own yield after so many tokens, so that the reactor can report a client's FIN.
const TOKENS_BETWEEN_YIELDS: u64 = 32;

impl Job {
    /// Finds the model and asks whether it can do this. The order of the checks is Ollama's.
    pub fn new(route: Route, ask: Ask, shared: &Shared, started: Instant) -> Result<Job, Refusal> {
        let raw = &ask.model;
        let absent = || Refusal::handler(404, format!("model '{raw}' not found"));
        let empty = match route {
            Route::Generate | Route::Completions => absent(),
            _ => Refusal::handler(400, "model is required"),
        };
        let model = shared.find(raw).map_err(|why| Refusal::no_model(why, empty, absent()))?;
        let full = format!("registry.ollama.ai/library/{}", model.name);
        if !model.voice.can("completion") {
            let what = if matches!(route, Route::Generate | Route::Completions) { "generate" } else { "chat" };
            return Err(Refusal::handler(400, format!("\"{raw}\" does not support {what}")));
        }
        if ask.think == Think::On && !model.voice.can("thinking") {
            return Err(Refusal::handler(400, format!("\"{raw}\" does not support thinking")));
        }
        if !ask.tools.is_empty() && !model.voice.can("tools") {
            return Err(Refusal::handler(400, format!("{full} does not support tools")));
        }
        if ask.suffix && !model.voice.can("insert") {
            return Err(Refusal::handler(400, format!("{full} does not support insert")));
        }
        Ok(Job { route, ask, model, started })
    }

    /// Loads the model if it is not loaded. A client that leaves aborts the load, as with Ollama.
    pub async fn load(&self, shared: &Shared, link: &mut Link) -> Result<Result<(), Refusal>, Gone> {
        load(&self.model, shared, link).await
    }

    /// Answers. `fault` is one that strikes in the middle, or none.
    pub async fn run(
        &self,
        shared: &Shared,
        link: &mut Link,
        form: Form,
        fault: Option<&Fault>,
        testimony: &Testimony,
    ) -> Result<Answered, Gone> {
        let ask = &self.ask;
        match self.load(shared, link).await? {
            Ok(()) => {}
            Err(refusal) => return Ok(self.refuse(shared, &refusal)),
        }
        let load_ns = elapsed_ns(self.started);
        if ask.loads_only && !ask.debug_render {
            if ask.unloads {
                shared.models.unload(&self.model.name);
            }
            if let Some(reply) = self.loaded(shared) {
                return Ok(Answered::Whole(reply));
            }
        }
        let prompt = ask.render(matches!(self.model.voice, Voice::Tools | Voice::Jinja));
        if ask.debug_render {
            return Ok(Answered::Whole(match self.route {
                Route::Generate => native::Generate::rendered(&ask.model, &prompt),
                _ => native::Chat::rendered(&ask.model, &prompt),
            }));
        }
        if let Some(refusal) = &ask.bad_option {
            return Ok(self.refuse(shared, refusal));
        }
        let setting = Setting {
            ask,
            wire: shared.options.wire,
            prompt: &prompt,
            call_comes_last: self.model.voice == Voice::Jinja,
            id: shared.id(),
        };
        let mut telling = Telling {
            job: self,
            shared,
            link,
            testimony,
            form,
            fault,
            strikes_after: fault.and_then(Fault::strikes_after),
            deltas: 0,
            opened: false,
            records: Records::new(form.http_1_0),
            said: Said::default(),
            speaker: Speaker::new(self.route, &setting),
        };
        // Two tokens begin every prompt, and its bytes are the others.
        let prompt_tokens = if ask.loads_only { 0 } else { prompt.len() as u64 + 2 };
        let answered = telling.tell(prompt_tokens, load_ns).await;
        if ask.unloads {
            shared.models.unload(&self.model.name);
        }
        answered
    }

    /// The reply to a request that has no prompt; the Responses API answers it with an empty message instead.
    fn loaded(&self, shared: &Shared) -> Option<Reply> {
        let reason = if self.ask.unloads { "unload" } else { "load" };
        match self.route {
            Route::Chat => Some(native::Chat::loaded(&self.ask.model, reason)),
            Route::Generate => Some(native::Generate::loaded(&self.ask.model, reason)),
            Route::Completions => Some(openai::Completions::loaded(&Setting {
                ask: &self.ask,
                wire: shared.options.wire,
                prompt: "",
                call_comes_last: false,
                id: shared.id(),
            })),
            _ => None,
        }
    }

    fn refuse(&self, shared: &Shared, refusal: &Refusal) -> Answered {
        let reply = refusal.reply(self.route.dialect(), shared.options.wire, shared.id(), self.ask.stream);
        Answered::Whole(with_stream_headers(reply, self.route, self.ask.stream))
    }
}

/// Loads a model, for the routes that answer with text and those that embed.
pub(super) async fn load(model: &Model, shared: &Shared, link: &mut Link) -> Result<Result<(), Refusal>, Gone> {
    if !shared.models.is_loaded(&model.name) {
        if shared.options.load_ms > 0 {
            link.wait(Duration::from_millis(shared.options.load_ms)).await?;
        }
        if model.voice == Voice::Broken {
            let words = "tensor \"token_embd.weight\" offset+size (102912) exceeds file size (20000)";
            return Ok(Err(Refusal::handler(500, words)));
        }
    }
    shared.models.touch(&model.name);
    Ok(Ok(()))
}

/// Ollama sets these before it knows whether the stream will be one.
pub(super) fn with_stream_headers(reply: Reply, route: Route, streamed: bool) -> Reply {
    let early = reply.headers.iter().any(|(_, value)| value.contains("charset"));
    if streamed && !early && matches!(route, Route::Responses | Route::Messages) {
        return reply.with("Cache-Control", "no-cache").with("Connection", "keep-alive");
    }
    reply
}

pub(super) fn elapsed_ns(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX).max(1)
}

/// The state of an answer that is being told.
struct Telling<'a> {
    job: &'a Job,
    shared: &'a Shared,
    link: &'a mut Link,
    testimony: &'a Testimony,
    form: Form,
    fault: Option<&'a Fault>,
    strikes_after: Option<u32>,
    deltas: u32,
    opened: bool,
    records: Records,
    said: Said,
    speaker: Speaker,
}

impl Telling<'_> {
    async fn tell(&mut self, prompt_tokens: u64, load_ns: u64) -> Result<Answered, Gone> {
        let (ask, voice) = (&self.job.ask, self.job.model.voice);
        let pace = Pace::new(self.shared, voice);
        let raw_thoughts = ask.think == Think::Off;
        let mut recital = Recital::new(voice, ask.limit, raw_thoughts, &ask.stops, self.shared.options.tokens);
        // Text that may be a tool call is held until it is whole.
        let holds = matches!(voice, Voice::Tools | Voice::Jinja) && !ask.tools.is_empty();
        let mut held = String::new();
        let mut prompt_ns = 0;
        let mut last_yield = 0;
        loop {
            let step = if ask.loads_only { Step::End(Reason::Stop) } else { recital.next() };
            pace.keep(self.link, recital.tokens).await?;
            if prompt_ns == 0 {
                prompt_ns = elapsed_ns(self.job.started).saturating_sub(load_ns).max(1);
            }
            if recital.tokens - last_yield >= TOKENS_BETWEEN_YIELDS && pace.is_unbound() {
                last_yield = recital.tokens;
                tokio::task::yield_now().await;
            }
            self.link.look()?;
            let reason = match step {
                Step::Piece(piece) if holds => {
                    held.push_str(piece.text);
                    continue;
                }
                Step::Piece(piece) => {
                    let delta = match piece.kind {
                        Kind::Text => Delta::Text(piece.text),
                        Kind::Thought => Delta::Thought(piece.text),
                        Kind::Tag => Delta::Tag(piece.text),
                    };
                    match self.add(delta).await? {
                        Some(answered) => return Ok(answered),
                        None => continue,
                    }
                }
                Step::End(reason) => Some(reason),
                Step::GivenUp => None,
            };
            if holds && reason == Some(Reason::Stop) {
                let known = ask.tools.iter().any(|tool| member_text(&tool["function"], "name") == CALL_NAME);
                let call = Call { id: format!("call_{:08x}", self.shared.id() as u32) };
                let delta = if known { Delta::Call(&call) } else { Delta::Text(&held) };
                if let Some(answered) = self.add(delta).await? {
                    return Ok(answered);
                }
            }
            let total_ns = elapsed_ns(self.job.started);
            let totals = reason.map(|reason| Totals {
                reason,
                prompt_tokens,
                output_tokens: if ask.loads_only { 0 } else { recital.tokens },
                total_ns,
                load_ns,
                prompt_ns,
                eval_ns: total_ns.saturating_sub(load_ns + prompt_ns).max(1),
            });
            return self.finish(totals).await;
        }
    }

    /// Adds a delta, unless the fault strikes instead.
    async fn add(&mut self, delta: Delta<'_>) -> Result<Option<Answered>, Gone> {
        if self.strikes_after == Some(self.deltas) && (self.job.ask.stream || self.strikes_whole()) {
            return self.strike().await.map(Some);
        }
        self.deltas += 1;
        if self.job.ask.stream {
            self.open();
            self.speaker.delta(delta, &mut self.records);
            self.flush().await?;
        } else {
            self.said.add(delta);
        }
        Ok(None)
    }

    async fn finish(&mut self, totals: Option<Totals>) -> Result<Answered, Gone> {
        if self.strikes_after.is_some() && (self.job.ask.stream || self.strikes_whole()) {
            return self.strike().await;
        }
        if !self.job.ask.stream {
            return Ok(Answered::Whole(self.speaker.whole(&self.said, totals.as_ref())));
        }
        self.open();
        if let Some(totals) = &totals {
            self.speaker.end(totals, &mut self.records);
        }
        self.records.finish();
        self.flush().await?;
        Ok(Answered::Streamed)
    }

    /// The fault changes what a whole reply says, and not only how it is delivered.
    fn strikes_whole(&self) -> bool {
        matches!(self.fault, Some(Fault::ErrorInStream { .. } | Fault::NoTerminal { .. }))
    }

    async fn strike(&mut self) -> Result<Answered, Gone> {
        if !self.job.ask.stream {
            if matches!(self.fault, Some(Fault::ErrorInStream { .. })) {
                return Ok(self.job.refuse(self.shared, &Refusal::handler(500, RUNNER_DIED)));
            }
            // The other faults are seen to where the reply is delivered.
            return Ok(Answered::Whole(self.speaker.whole(&self.said, None)));
        }
        self.open();
        if matches!(self.fault, Some(Fault::ErrorInStream { .. })) {
            self.speaker.fail(RUNNER_DIED, &mut self.records);
        }
        let clean = self.strikes_whole();
        if clean {
            self.records.finish();
        }
        self.flush().await?;
        match self.fault {
            _ if clean => Ok(Answered::Streamed),
            Some(Fault::ResetsMidStream { .. }) => Ok(Answered::Reset),
            Some(Fault::ClosesMidStream { .. }) => Ok(Answered::Cut),
            _ => Err(self.link.left().await),
        }
    }

    /// Writes the head in front of the first record: with Ollama both leave together.
    fn open(&mut self) {
        if std::mem::replace(&mut self.opened, true) {
            return;
        }
        let mut opening = Opening::new(&mut self.records.out, 200, self.form, self.link.date());
        if self.speaker.says_no_cache() {
            opening.header("Cache-Control", "no-cache");
            if !self.form.says_close {
                opening.header("Connection", "keep-alive");
            }
        }
        if matches!(self.fault, Some(Fault::Compressed)) {
            opening.header("Content-Encoding", "gzip");
        }
        opening.header("Content-Type", self.speaker.stream_type());
        opening.date();
        opening.length(None);
        opening.end();
    }

    async fn flush(&mut self) -> Result<(), Gone> {
        if !self.records.out.is_empty() {
            let sent = self.link.send(&self.records.out).await;
            self.records.out.clear();
            sent?;
            self.testimony.first_byte();
        }
        Ok(())
    }
}

/// When tokens are due.
struct Pace {
    first: tokio::time::Instant,
    waits_first: bool,
    each: Option<Duration>,
}

impl Pace {
    fn new(shared: &Shared, voice: Voice) -> Pace {
        let options = &shared.options;
        let mut per_second = options.tokens_per_second;
        if voice == Voice::Slow && !(per_second > 0.0 && per_second <= 40.0) {
            // A pace that a person could follow, whatever the others do.
            per_second = 40.0;
        }
        let each = (per_second > 0.0 && per_second.is_finite())
            .then(|| Duration::from_secs_f64((1.0 / per_second).min(3600.0)));
        Pace {
            first: tokio::time::Instant::now() + Duration::from_millis(options.first_token_ms),
            waits_first: options.first_token_ms > 0,
            each,
        }
    }

    fn is_unbound(&self) -> bool {
        self.each.is_none()
    }

    /// Waits until so many tokens may have been said.
    async fn keep(&self, link: &mut Link, tokens: u64) -> Result<(), Gone> {
        let due = match self.each {
            None if !self.waits_first || tokens > 1 => return Ok(()),
            None => self.first,
            Some(each) => self.first + each.saturating_mul(u32::try_from(tokens).unwrap_or(u32::MAX).saturating_sub(1)),
        };
        if due > tokio::time::Instant::now() {
            link.wait_until(due).await?;
        }
        Ok(())
    }
}

/// 0.17.4 knew nothing of the cloud by name.
pub(super) fn knows_cloud(wire: WireForm) -> bool {
    wire == WireForm::Current
}
