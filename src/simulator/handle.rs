//! What is to be said to a request that came whole: the handlers behind the routes.

use std::time::{Duration, Instant};

use super::ask::Ask;
use super::catalogue;
use super::embed::Embedding;
use super::exchange::{Answer, Body, Exchange};
use super::fault::Fault;
use super::fetch::Fetch;
use super::generate::{self, Job, elapsed_ns};
use super::link::Gone;
use super::loose::Fields;
use super::manage::{self, Blobs};
use super::refusal::{QUEUE_FULL, RUNNER_STOPPED, Raised, Refusal};
use super::reply::{JSON_UTF8, Reply};
use super::route::{Dialect, Met, Route};

impl Exchange<'_> {
    /// Finds what is to be said. The flag beside a refusal is whether a stream was asked for.
    pub async fn answer(
        &mut self,
        met: &Met,
        body: &Body,
        started: Instant,
    ) -> Result<Result<Answer, (Refusal, bool)>, Gone> {
        let (route, shared) = (met.route, self.shared);
        let (models, wire) = (&shared.models, shared.options.wire);
        let reply = match route {
            Route::Root => Reply::new(200, "text/plain; charset=utf-8", "Ollama is running"),
            Route::Version => Reply::new(200, JSON_UTF8, format!("{{\"version\":\"{}\"}}", shared.options.version())),
            Route::Status => Reply::new(200, JSON_UTF8, "{\"cloud\":{\"disabled\":true,\"source\":\"env\"}}"),
            Route::Tags => catalogue::tags(models, wire),
            Route::Ps => catalogue::ps(models, wire),
            Route::OpenAiModels => catalogue::openai_models(models),
            Route::OpenAiModel => {
                let found = shared.find(&met.segment).map_err(|why| {
                    let absent = Refusal::handler(404, format!("model '{}' not found", tagged(&met.segment)));
                    (Refusal::no_model(why, Refusal::handler(400, "model is required"), absent), false)
                });
                match found {
                    Ok(model) => catalogue::openai_one(&met.segment, &model),
                    Err(refused) => return Ok(Err(refused)),
                }
            }
            Route::Blob => return Ok(self.blob(&met.segment, body).map_err(|refusal| (refusal, false))),
            _ => return self.answer_json(route, body, started).await,
        };
        Ok(Ok(Answer::Reply(reply)))
    }

    fn blob(&self, digest: &str, body: &Body) -> Result<Answer, Refusal> {
        if !Blobs::is_digest(digest) {
            return Err(Refusal::handler(400, "invalid digest format"));
        }
        let blobs = &self.shared.blobs;
        Ok(Answer::Reply(match body.sha256 {
            _ if self.head.method == "HEAD" => blobs.head(digest),
            _ if blobs.has(digest) => Reply::empty(200),
            Some(sha256) => blobs.store(digest, &sha256)?,
            None => return Err(Refusal::handler(500, "the blob was not hashed")),
        }))
    }

    /// The routes that take a JSON body.
    async fn answer_json(
        &mut self,
        route: Route,
        body: &Body,
        started: Instant,
    ) -> Result<Result<Answer, (Refusal, bool)>, Gone> {
        let fields = match Fields::read(&body.bytes, Ask::go_type(route)) {
            Ok(fields) => fields,
            Err(words) => {
                let empty = words == "EOF" && route.dialect() == Dialect::Native;
                let words = if empty { "missing request body".to_owned() } else { words };
                return Ok(Err((Refusal::binding(words), false)));
            }
        };
        let model = fields.plain("model").or_else(|| fields.plain("name")).and_then(|model| model.as_str());
        self.testimony.add(|seen| seen.model = model.map(str::to_owned));
        if route.infers()
            && let Some(fault) = model.and_then(Fault::of_model)
        {
            self.fault = Some(fault);
        }
        if let Some(refused) = self.fault_refusal(model.unwrap_or_default()) {
            let streamed = fields.last("stream").and_then(|stream| stream.as_bool());
            return Ok(Err((refused, streamed.unwrap_or(matches!(route, Route::Chat | Route::Generate)))));
        }
        let shared = self.shared;
        let models = &shared.models;
        let plain = |refusal| (refusal, false);
        Ok(match route {
            Route::Show => manage::named(&fields, "ShowRequest")
                .and_then(|raw| {
                    shared.find(raw).map_err(|why| {
                        let absent = Refusal::handler(404, format!("model '{}' not found", tagged(raw)));
                        Refusal::no_model(why, Refusal::handler(400, "model is required"), absent)
                    })
                })
                .map(|model| Answer::Reply(catalogue::show(&model)))
                .map_err(plain),
            Route::Pull => match Fetch::of(&fields).map_err(plain) {
                Ok(Some(fetch)) => Ok(Answer::Fetch(fetch)),
                Ok(None) => manage::pull(models, &fields).map(Answer::Lines).map_err(plain),
                Err(refused) => Err(refused),
            },
            Route::Push => manage::push(models, &fields).map(Answer::Lines).map_err(plain),
            Route::Create => manage::create(models, &fields)
                .map(|progress| manage::create_refused(&progress).map_or(Answer::Lines(progress), Answer::Reply))
                .map_err(plain),
            Route::Copy => manage::copy(models, &fields).map(Answer::Reply).map_err(plain),
            Route::Delete => manage::delete(models, &fields).map(Answer::Reply).map_err(plain),
            Route::Embed | Route::Embeddings | Route::OpenAiEmbeddings => {
                self.embed(route, &fields, started).await?.map(Answer::Reply).map_err(plain)
            }
            _ => Ask::read(route, &fields).map_err(plain).and_then(|mut ask| {
                if matches!(self.fault, Some(Fault::WrongContentLength { .. })) {
                    ask.stream = false;
                }
                let streamed = ask.stream;
                let job = Job::new(route, ask, shared, started);
                job.map(|job| Answer::Job(Box::new(job))).map_err(|refusal| (refusal, streamed))
            }),
        })
    }

    async fn embed(&mut self, route: Route, fields: &Fields, started: Instant) -> Result<Result<Reply, Refusal>, Gone> {
        let embedding = match Embedding::read(route, fields) {
            Ok(embedding) => embedding,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let raw = &embedding.model;
        let empty = match route {
            Route::Embeddings => Refusal::handler(400, "model is required"),
            _ => Refusal::handler(404, format!("model '{raw}' not found")),
        };
        let absent = Refusal::handler(404, format!("model \"{raw}\" not found, try pulling it first"));
        let model = match self.shared.find(raw) {
            Ok(model) => model,
            Err(why) => return Ok(Err(Refusal::no_model(why, empty, absent))),
        };
        if let Err(refusal) = generate::load(&model, self.shared, self.link).await? {
            return Ok(Err(refusal));
        }
        let load_ns = elapsed_ns(started);
        if self.shared.options.first_token_ms > 0 {
            self.link.wait(Duration::from_millis(self.shared.options.first_token_ms)).await?;
        }
        Ok(embedding.answer(route, elapsed_ns(started), load_ns))
    }

    /// The faults that are errors of Ollama's own.
    fn fault_refusal(&self, model: &str) -> Option<Refusal> {
        match self.fault {
            Some(Fault::QueueFull) => Some(Refusal::handler(503, QUEUE_FULL)),
            Some(Fault::ModelMissing) => Some(Refusal::handler(404, format!("model '{model}' not found"))),
            Some(Fault::RunnerStopped) => {
                Some(Refusal { status: 500, message: RUNNER_STOPPED.to_owned(), raised: Raised::Runner })
            }
            _ => None,
        }
    }
}

/// A name with its tag.
fn tagged(raw: &str) -> String {
    super::models::display_name(raw).unwrap_or_else(|_| raw.to_owned())
}
