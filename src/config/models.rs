//! `[models]` and `[[model]]`: what holds for all models, and what an operator says of single ones.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use toml::Value;

use super::{ConfigError, values};

/// `[models]`: what holds for all of them.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Models {
    /// Hosts that models may be pulled from, pushed to and created from, as they stand in a model's name, with a port if it has one.
    /// Default `registry.ollama.ai` alone: a host in a name is one that Ollama connects to.
    #[serde(deserialize_with = "values::registries")]
    pub registries: Vec<String>,
    /// Address of a listener from which backends take what is pulled for several of them, so that it is fetched once. Default none: each
    /// backend fetches for itself. Off loopback it belongs into the backends' network: it speaks http.
    #[serde(deserialize_with = "values::optional_address", serialize_with = "values::or_empty")]
    pub mirror_listen: Option<SocketAddr>,
    /// That listener as backends reach it, `http://host:port`. Default `mirror_listen` itself, which must then be an address of one
    /// machine.
    #[serde(deserialize_with = "values::mirror_url")]
    pub mirror_url: String,
    /// Folder for what is being fetched; nothing stays in it. Default `mirror` in the state folder. Empty in the file: the default.
    pub mirror_store: PathBuf,
    /// Bytes of the models that may be on their way at once; a larger one is fetched by each backend. Default 128 GiB: larger than the
    /// models people serve.
    #[serde(deserialize_with = "values::whole::<_, _, 1, 0x1000_0000_0000>")]
    pub mirror_bytes: u64,
}

impl Models {
    /// `host:port` of the mirror as it stands in the names that backends pull. `bound`: where the listener came to be.
    pub fn mirror_authority(&self, bound: SocketAddr) -> String {
        match self.mirror_url.strip_prefix("http://") {
            Some(authority) => authority.to_owned(),
            None => bound.to_string(),
        }
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let odd = |problem: String, remedy: &str| {
            Err(ConfigError::new("models.mirror_listen, models.mirror_url", problem, remedy))
        };
        match self.mirror_listen {
            None if !self.mirror_url.is_empty() => odd(
                "there is a URL of a listener that is not there".into(),
                "set models.mirror_listen, or take the URL away",
            ),
            Some(address) if self.mirror_url.is_empty() && (address.ip().is_unspecified() || address.is_ipv6()) => odd(
                format!("{address} is nothing that can stand in a model's name"),
                "set models.mirror_url to the address or name at which the backends reach this machine",
            ),
            _ => Ok(()),
        }
    }
}

impl Default for Models {
    fn default() -> Models {
        Models {
            registries: vec!["registry.ollama.ai".to_owned()],
            mirror_listen: None,
            mirror_url: String::new(),
            mirror_store: PathBuf::new(),
            mirror_bytes: 128 << 30,
        }
    }
}

/// `[[model]]`: one model, or a name that stands for others. What the names mean is read where models are known.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Model {
    /// In any of Ollama's spellings. `*`: the settings of all that have none of their own.
    #[serde(deserialize_with = "values::name")]
    pub name: String,
    /// The model that runs in its place. Default none: the name is a model's own.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub alias: String,
    /// What runs instead where no backend has it or can serve it, best first. Default none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fallback: Vec<String>,
    /// When it is loaded before anybody asks for it, on every backend that has it: `always`, or a span of each day in UTC as in
    /// `07:00-18:00`. Default never.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub warm: String,
    /// `options.num_ctx`. Default none: what the client sends. So it is with the others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_ctx: Option<Setting<i64>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_batch: Option<Setting<i64>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_gpu: Option<Setting<i64>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub main_gpu: Option<Setting<i64>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_thread: Option<Setting<i64>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub use_mmap: Option<Setting<bool>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_alive: Option<Setting<Span>>,
}

impl Model {
    /// Every key of a table, for the check of unknown ones.
    pub(super) const KEYS: [&str; 11] = [
        "name",
        "alias",
        "fallback",
        "warm",
        "num_ctx",
        "num_batch",
        "num_gpu",
        "main_gpu",
        "num_thread",
        "use_mmap",
        "keep_alive",
    ];

    /// Pins or clamps something with which the model is loaded: a request at `/v1`, which cannot say it, then loads the model anew.
    pub(super) fn loads_unlike_v1(&self) -> bool {
        let numbers = [&self.num_ctx, &self.num_batch, &self.num_gpu, &self.main_gpu, &self.num_thread];
        numbers.into_iter().flatten().any(|setting| *setting != Setting::Strip)
            || self.use_mmap.as_ref().is_some_and(|setting| *setting != Setting::Strip)
    }
}

/// What becomes of one member that a client may send.
#[derive(Clone, Debug, PartialEq)]
pub enum Setting<T> {
    /// Always this: `num_ctx = 8192`.
    Pin(T),
    /// Within bounds: `num_ctx = { min = 2048, max = 32768 }`.
    Clamp { min: Option<T>, max: Option<T> },
    /// Never what the client sends: `num_ctx = "strip"`.
    Strip,
}

/// A number of seconds, or a duration in quotes.
#[derive(Clone, Debug, PartialEq)]
pub enum Span {
    Seconds(i64),
    Text(String),
}

/// What a setting's value may be.
pub trait Plain: Sized {
    const WANTED: &'static str;
    fn read(value: &Value) -> Option<Self>;
    fn write(&self) -> Value;
}

impl Plain for i64 {
    const WANTED: &'static str = "a whole number, { min = .., max = .. } or \"strip\"";

    fn read(value: &Value) -> Option<i64> {
        value.as_integer()
    }

    fn write(&self) -> Value {
        Value::Integer(*self)
    }
}

impl Plain for bool {
    const WANTED: &'static str = "true, false or \"strip\"";

    fn read(value: &Value) -> Option<bool> {
        value.as_bool()
    }

    fn write(&self) -> Value {
        Value::Boolean(*self)
    }
}

impl Plain for Span {
    const WANTED: &'static str = "a duration like \"30m\", seconds, -1 for ever, { min = .., max = .. } or \"strip\"";

    fn read(value: &Value) -> Option<Span> {
        match value {
            Value::Integer(seconds) => Some(Span::Seconds(*seconds)),
            Value::String(text) => Some(Span::Text(text.clone())),
            _ => None,
        }
    }

    fn write(&self) -> Value {
        match self {
            Span::Seconds(seconds) => Value::Integer(*seconds),
            Span::Text(text) => Value::String(text.clone()),
        }
    }
}

impl<'de, T: Plain> Deserialize<'de> for Setting<T> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Setting<T>, D::Error> {
        let value = Value::deserialize(d)?;
        let wrong = || D::Error::custom(format!("found {}; write {}", values::described(&value), T::WANTED));
        match &value {
            Value::String(word) if word == "strip" => Ok(Setting::Strip),
            Value::Table(bounds) => {
                let bound = |key| bounds.get(key).map(|value| T::read(value).ok_or_else(wrong)).transpose();
                let (min, max) = (bound("min")?, bound("max")?);
                let known = usize::from(min.is_some()) + usize::from(max.is_some());
                if known == 0 || known != bounds.len() || bounds.values().any(Value::is_bool) {
                    return Err(wrong());
                }
                Ok(Setting::Clamp { min, max })
            }
            plain => T::read(plain).map(Setting::Pin).ok_or_else(wrong),
        }
    }
}

impl<T: Plain> Serialize for Setting<T> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let value = match self {
            Setting::Pin(value) => value.write(),
            Setting::Strip => Value::String("strip".to_owned()),
            Setting::Clamp { min, max } => {
                let bounds = [("min", min), ("max", max)];
                let bounds =
                    bounds.into_iter().filter_map(|(key, bound)| Some((key.to_owned(), bound.as_ref()?.write())));
                Value::Table(bounds.collect())
            }
        };
        value.serialize(s)
    }
}
