//! What is said of a model beside what its backend says: from the catalogue, and only what is known.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::Value;

use super::gather::Gathered;
use crate::upstream::{Backend, Known, Pool};
use crate::wire::list::Extra;
use crate::wire::{Endpoint, model};

/// What is known at this moment.
pub(super) struct Said {
    /// Backends that are up and in use.
    fleet: Vec<(Arc<Backend>, Arc<Known>)>,
    /// By canonical name: which of them list it. Only for those who may know their names.
    holders: Option<HashMap<String, Vec<String>>>,
}

impl Said {
    /// `names`: what each of the backends that answered lists.
    pub fn new(pool: &Pool, gathered: &[Gathered], names: &[Vec<String>], names_backends: bool) -> Said {
        let fleet = pool.fleet().into_iter().filter(|(backend, _)| backend.is_up() && !backend.is_drained()).collect();
        let holders = names_backends.then(|| {
            let mut holders: HashMap<String, Vec<String>> = HashMap::new();
            for (reply, names) in gathered.iter().zip(names) {
                for model in names.iter().filter_map(|name| model::parse(name).ok()) {
                    let of_model = holders.entry(model.canonical()).or_default();
                    if of_model.last() != Some(&reply.backend.name) {
                        of_model.push(reply.backend.name.clone());
                    }
                }
            }
            holders
        });
        Said { fleet, holders }
    }

    pub fn of(&self, endpoint: Endpoint, canonical: &str) -> Extra {
        let mut extra = Extra::new();
        let held = || self.fleet.iter().filter_map(|(_, known)| Some((known, known.models.get(canonical)?)));
        // What is loaded says so by being there, and with which context.
        if endpoint != Endpoint::Ps {
            let mut models = held().map(|(_, model)| model);
            if let Some(capabilities) = models.find_map(|model| model.capabilities()) {
                extra.push(("capabilities", Value::from(capabilities).to_string()));
            }
            let mut models = held().map(|(_, model)| model);
            if let Some(context_length) = models.find_map(|model| model.context_length()) {
                extra.push(("context_length", context_length.to_string()));
            }
            // Where nobody asks what is loaded, one that was seen to answer says nothing of the others.
            let mut asked = held().filter(|(known, _)| known.loaded_read.is_some()).peekable();
            if asked.peek().is_some() {
                let is_loaded = asked.any(|(known, _)| known.loaded.contains_key(canonical));
                extra.push(("loaded", is_loaded.to_string()));
            }
        }
        if let Some(holders) = self.holders.as_ref().and_then(|holders| holders.get(canonical)) {
            extra.push(("backends", Value::from(holders.as_slice()).to_string()));
        }
        extra
    }
}
