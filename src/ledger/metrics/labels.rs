//! Label values that are known only at run time, models and roles: bounded in number, resolved once.

use std::collections::HashMap;
use std::iter::repeat_with;
use std::sync::{Arc, OnceLock};

use parking_lot::RwLock;
use prometheus::{Histogram, IntCounter};

use super::{OTHER, ROLES};

/// Longer names are "other": a label value is repeated in every scrape.
const NAME_BYTES: usize = 128;

/// A model in labels, with its resolved children. The default is "other".
#[derive(Clone, Default)]
pub struct ModelLabel(Option<Arc<Model>>);

struct Model {
    name: String,
    series: ModelSeries,
}

impl ModelLabel {
    pub fn as_str(&self) -> &str {
        self.0.as_ref().map_or(OTHER, |model| &model.name)
    }

    /// `None`: those of "other" apply.
    pub(super) fn series(&self) -> Option<&ModelSeries> {
        self.0.as_ref().map(|model| &model.series)
    }
}

impl Label for ModelLabel {
    fn new(name: &str, _place: usize) -> ModelLabel {
        ModelLabel(Some(Arc::new(Model { name: name.to_owned(), series: ModelSeries::default() })))
    }

    fn other() -> ModelLabel {
        ModelLabel(None)
    }
}

/// A role in labels. The default is "none": a token without roles, or nobody.
#[derive(Clone)]
pub struct RoleLabel {
    name: Arc<str>,
    place: usize,
}

impl RoleLabel {
    pub fn as_str(&self) -> &str {
        &self.name
    }
}

impl Default for RoleLabel {
    fn default() -> RoleLabel {
        static NONE: OnceLock<Arc<str>> = OnceLock::new();
        RoleLabel { name: Arc::clone(NONE.get_or_init(|| Arc::from("none"))), place: 0 }
    }
}

impl Label for RoleLabel {
    fn new(name: &str, place: usize) -> RoleLabel {
        RoleLabel { name: Arc::from(name), place: 2 + place }
    }

    fn other() -> RoleLabel {
        RoleLabel { name: Arc::from(OTHER), place: 1 }
    }
}

/// The resolved children of one model.
pub(super) struct ModelSeries {
    tokens: Box<[OnceLock<[IntCounter; 2]>]>,
    per_second: OnceLock<Histogram>,
}

impl Default for ModelSeries {
    fn default() -> ModelSeries {
        // "none", "other", and each role.
        ModelSeries { tokens: repeat_with(OnceLock::new).take(2 + ROLES).collect(), per_second: OnceLock::new() }
    }
}

impl ModelSeries {
    /// Tokens in and out.
    pub(super) fn tokens(&self, role: &RoleLabel, look_up: impl FnOnce() -> [IntCounter; 2]) -> &[IntCounter; 2] {
        self.tokens[role.place].get_or_init(look_up)
    }

    pub(super) fn per_second(&self, look_up: impl FnOnce() -> Histogram) -> &Histogram {
        self.per_second.get_or_init(look_up)
    }
}

pub(super) trait Label: Clone {
    /// `place` counts the labels made before.
    fn new(name: &str, place: usize) -> Self;

    fn other() -> Self;
}

/// The names that have labels of their own, up to a limit; the rest is "other".
pub(super) struct Names<T> {
    known: RwLock<HashMap<String, T>>,
    limit: usize,
    other: T,
}

impl<T: Label> Names<T> {
    pub(super) fn new(limit: usize) -> Names<T> {
        Names { known: RwLock::default(), limit, other: T::other() }
    }

    pub(super) fn find(&self, name: &str) -> T {
        self.known.read().get(name).unwrap_or(&self.other).clone()
    }

    /// A name with control characters, or one of ours, never gets a label.
    pub(super) fn insert(&self, name: &str) -> T {
        if let Some(label) = self.known.read().get(name) {
            return label.clone();
        }
        let fits = !name.is_empty() && name.len() <= NAME_BYTES && name.bytes().all(|byte| byte.is_ascii_graphic());
        if !fits || [OTHER, "none"].contains(&name) {
            return self.other.clone();
        }
        let mut known = self.known.write();
        let place = known.len();
        if place >= self.limit && !known.contains_key(name) {
            return self.other.clone();
        }
        known.entry(name.to_owned()).or_insert_with(|| T::new(name, place)).clone()
    }
}
