//! A backend pulls from the mirror: under a temporary name, which it then copies to the model's own.
//!
//! Whatever goes wrong, the temporary name is deleted and the backend pulls in the ordinary way; but for bytes that are not those of
//! their digest, which are the registry's fault and would be no better there.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use pingora_proxy::Session;
use serde_json::{Value, json};

use super::super::Gateway;
use super::super::views::gone;
use super::{Told, write};
use crate::door::Ticket;
use crate::mirror::{Fault, Pull};
use crate::site::Site;
use crate::upstream::Backend;
use crate::wire::{ModelRef, Source};

/// An ordinary pull that follows a broken one may find it still being put away, and is asked again so often.
const TRIES: usize = 3;
const PAUSE: Duration = Duration::from_secs(1);
/// Ollama's words for that (0.17.4: a download that was cancelled is another pull's for a moment, `server/download.go`).
const CANCELLED: &str = "context canceled";

/// Whether a pull goes through the mirror.
pub(super) enum Begun {
    /// There is none, or it would be of no use.
    Not,
    Pull(Pull),
    Declined(Fault),
    /// The client.
    Left,
}

/// The temporary names on one backend. Deleted at the latest when this is dropped.
struct Temporary {
    site: Arc<Site>,
    backend: Arc<Backend>,
    names: Vec<String>,
}

impl Temporary {
    async fn delete(mut self) {
        while let Some(name) = self.names.last() {
            // What fails here is left to the catalogue's next look.
            let _ = self.site.client.delete(&self.backend, name).await;
            self.names.pop();
        }
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let names = std::mem::take(&mut self.names);
        // Where the whole process ends there is no runtime, and the catalogue of the next one does it.
        if let Some(runtime) = tokio::runtime::Handle::try_current().ok().filter(|_| !names.is_empty()) {
            let (site, backend) = (Arc::clone(&self.site), Arc::clone(&self.backend));
            runtime.spawn(async move {
                for name in names {
                    let _ = site.client.delete(&backend, &name).await;
                }
            });
        }
    }
}

impl Gateway {
    pub(super) async fn begin_mirror(
        &self,
        model: &ModelRef,
        body: &[u8],
        backends: usize,
        session: &mut Session,
    ) -> Begun {
        let Some(mirror) = self.site.mirror.as_ref().filter(|_| backends > 1 && model.source == Source::Local) else {
            return Begun::Not;
        };
        let plain = serde_json::from_slice::<Value>(body).is_ok_and(|body| body["insecure"] == true);
        tokio::select! { biased;
            begun = mirror.begin(model, plain) => match begun {
                Ok(pull) => Begun::Pull(pull),
                Err(why) => Begun::Declined(why),
            },
            () = gone(session) => Begun::Left,
        }
    }

    #[expect(clippy::too_many_arguments, reason = "as `pull_on`, and what is to be pulled from where")]
    pub(super) async fn pull_mirrored(
        &self,
        pull: &Pull,
        backend: &Arc<Backend>,
        model: &ModelRef,
        body: Bytes,
        streams: bool,
        session: &mut Session,
        exchange: &Ticket,
    ) -> Result<Told, String> {
        if pull.fault().is_none() {
            let names = vec![pull.name(), pull.name_before()];
            let temporary = Temporary { site: Arc::clone(&self.site), backend: Arc::clone(backend), names };
            let asked = json!({ "model": pull.name(), "insecure": true, "stream": true }).to_string();
            let told = self.pull_on(backend, asked.into(), streams, Some(pull), session, exchange).await;
            let done = match told {
                Ok(told) if told.left => Some(told),
                Ok(told) if told.success && self.name_it(pull, backend, model).await => Some(told),
                _ => None,
            };
            temporary.delete().await;
            if let Some(told) = done {
                return Ok(told);
            }
        }
        // Its own words may have the namespace in them, which is the right to read the model.
        let why = match pull.fault() {
            Some(fault @ Fault::WrongBytes) => return Err(fault.to_string()),
            Some(fault) => fault.to_string(),
            None => "it did not take it from the mirror".to_owned(),
        };
        let line = json!({ "status": format!("backend {} fetches for itself: {why}", backend.name) });
        if streams && write(session, &line).await.is_err() {
            return Ok(Told { left: true, ..Told::default() });
        }
        for _ in 1..TRIES {
            let told = self.pull_on(backend, body.clone(), streams, None, session, exchange).await;
            if !told.as_ref().is_ok_and(|told| told.error.as_deref().is_some_and(|error| error.contains(CANCELLED))) {
                return told;
            }
            tokio::time::sleep(PAUSE).await;
        }
        self.pull_on(backend, body, streams, None, session, exchange).await
    }

    /// Gives the model its own name. What that name stood for before gets the other temporary one, so that with it goes what no model
    /// needs any more, as with an ordinary pull.
    async fn name_it(&self, pull: &Pull, backend: &Backend, model: &ModelRef) -> bool {
        let (client, parts) = (&self.site.client, model.spelled());
        let own = format!("{}/{}/{}:{}", model.host, parts.namespace, parts.name, parts.tag);
        let _ = client.copy(backend, &own, &pull.name_before()).await;
        client.copy(backend, &pull.name(), &own).await == Ok(true)
    }
}
