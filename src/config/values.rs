//! Single values: what a text or a number must be, and words for what it is not.
//!
//! An error here has the form `what was found; what to do`. Values that may hold a secret (keys, URLs) are never
//! quoted.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serializer};

/// A text that must not be seen. It has no `Debug`, `Display` or `Serialize`; [`expose`](Secret::expose) is the one way
/// out.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: impl Into<String>) -> Secret {
        Secret(text.into())
    }

    /// The `Authorization` value with this bearer, which must be one that a header can carry.
    pub fn bearer(bearer: &str) -> Result<Secret, String> {
        parse_bearer(bearer).map(|bearer| Secret::new(format!("Bearer {}", bearer.0)))
    }

    pub fn expose(&self) -> &str {
        &self.0
    }
}

/// A key in PEM: a file's, or the text of a variable.
#[derive(Clone)]
pub enum Pem {
    File(PathBuf),
    Text(Secret),
}

/// How a token is signed (RFC 7518, RFC 8037).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    Rs256,
    Es256,
    EdDsa,
    Hs256,
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Algorithm::Rs256 => "RS256",
            Algorithm::Es256 => "ES256",
            Algorithm::EdDsa => "EdDSA",
            Algorithm::Hs256 => "HS256",
        })
    }
}

/// Where an Ollama is. Its `Display` is the URL without user and password.
#[derive(Clone)]
pub struct BackendUrl {
    tls: bool,
    /// Lower case; an IPv6 address without brackets.
    host: String,
    port: u16,
    /// `user:password`, decoded.
    userinfo: Option<Secret>,
}

impl BackendUrl {
    /// `http://` or `https://`, an optional user, a host, an optional port (default 80 and 443), at most one `/`
    /// behind.
    pub fn parse(url: &str) -> Result<BackendUrl, String> {
        let bad = |what: &str| Err(format!("the URL {what}; write it as http://host:11434"));
        let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
        let tls = match scheme.to_ascii_lowercase().as_str() {
            "http" => false,
            "https" => true,
            _ => return bad("does not begin with http:// or https://"),
        };
        if rest.contains(['?', '#']) {
            return bad("has a query or a fragment");
        }
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        if rest.contains('/') {
            return bad("has a path, and Ollama's paths begin at /");
        }
        let (userinfo, authority) = match rest.rsplit_once('@') {
            Some((user, authority)) => (Some(user), authority),
            None => (None, rest),
        };
        let (host, port) = match authority.strip_prefix('[') {
            Some(v6) => match v6.split_once(']') {
                Some((v6, port)) if v6.parse::<Ipv6Addr>().is_ok() => (v6, port),
                _ => return bad("has no valid IPv6 address in its brackets"),
            },
            None => {
                let (host, port) = authority.split_at(authority.find(':').unwrap_or(authority.len()));
                // With an empty name and rustls, Pingora 0.9.1 would not verify the certificate
                // (connectors/tls/rustls).
                if host.is_empty() {
                    return bad("has no host");
                }
                let is_name = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
                if host.len() > 253 || !host.bytes().all(is_name) || host.starts_with(['.', '-']) {
                    return bad("has a host that is neither a name nor an address");
                }
                (host, port)
            }
        };
        let port = match port.strip_prefix(':') {
            None if port.is_empty() => Some(if tls { 443 } else { 80 }),
            Some(digits) if digits.bytes().all(|b| b.is_ascii_digit()) => digits.parse().ok().filter(|port| *port != 0),
            _ => None,
        };
        let Some(port) = port else {
            return bad("has no valid port");
        };
        let userinfo = match userinfo.map(percent_decoded) {
            Some(None) => return bad("has a user or password that is not percent-encoded"),
            Some(Some(decoded)) => Some(Secret(if decoded.contains(':') { decoded } else { decoded + ":" })),
            None => None,
        };
        Ok(BackendUrl { tls, host: host.to_ascii_lowercase(), port, userinfo })
    }

    pub fn is_tls(&self) -> bool {
        self.tls
    }

    /// The name to resolve and to verify; an IPv6 address without brackets. Never empty.
    pub fn host(&self) -> &str {
        &self.host
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// For the `Host` header: host, and port unless it is the scheme's own.
    pub fn authority(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        if self.port == if self.tls { 443 } else { 80 } { host } else { format!("{host}:{}", self.port) }
    }

    /// `user:password`, decoded.
    pub fn userinfo(&self) -> Option<&Secret> {
        self.userinfo.as_ref()
    }

    pub fn has_userinfo(&self) -> bool {
        self.userinfo.is_some()
    }

    pub fn is_loopback(&self) -> bool {
        self.host == "localhost" || self.host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<BackendUrl, D::Error> {
        BackendUrl::parse(&secret_text(d)?).map_err(D::Error::custom)
    }

    pub(super) fn serialize_redacted<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self.userinfo {
            None => s.collect_str(self),
            Some(_) => s.serialize_str(&self.to_string().replacen("://", "://(redacted)@", 1)),
        }
    }
}

impl fmt::Display for BackendUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", if self.tls { "https" } else { "http" }, self.authority())
    }
}

impl fmt::Debug for BackendUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

// ---- texts into values

pub(super) fn parse_address(text: &str) -> Result<SocketAddr, String> {
    text.trim()
        .parse()
        .map_err(|_| format!("{} is no address and port; write one like 127.0.0.1:8000 or [::1]:8000", quoted(text)))
}

pub(super) fn parse_algorithm(text: &str) -> Result<Algorithm, String> {
    match text {
        "RS256" => Ok(Algorithm::Rs256),
        "ES256" => Ok(Algorithm::Es256),
        "EdDSA" => Ok(Algorithm::EdDsa),
        "HS256" => Ok(Algorithm::Hs256),
        _ => Err(format!("{} is no algorithm; write RS256, ES256, EdDSA or HS256", quoted(text))),
    }
}

/// A bearer as a header can carry it: visible ASCII.
pub(super) fn parse_bearer(text: &str) -> Result<Secret, String> {
    let text = text.trim();
    if text.is_empty() || text.len() > 8192 || !text.bytes().all(|b| b.is_ascii_graphic()) {
        return Err("the key has characters that no header can carry; write it as it was given to you".to_owned());
    }
    Ok(Secret::new(text))
}

/// PEM text out of a variable, where line ends are often written as `\n`. `file_key` is the key for those who meant a
/// path.
pub(super) fn parse_pem(text: &str, file_key: &str) -> Result<Pem, String> {
    let text = if text.contains('\n') { text.to_owned() } else { text.replace("\\n", "\n") };
    if !text.trim_start().starts_with("-----BEGIN ") {
        return Err(format!("this is no PEM text; give the key itself here, or its path as identity.{file_key}"));
    }
    Ok(Pem::Text(Secret(text)))
}

/// A name that stands in claims: not empty, visible.
pub(super) fn parse_name(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > 255 || text.chars().any(char::is_control) {
        return Err(format!("{} is no name; write 1 to 255 visible characters", quoted(text)));
    }
    Ok(text.to_owned())
}

// ---- for serde's `deserialize_with`

pub(super) fn address<'de, D: Deserializer<'de>>(d: D) -> Result<SocketAddr, D::Error> {
    parse_address(&plain_text(d)?).map_err(D::Error::custom)
}

pub(super) fn name<'de, D: Deserializer<'de>>(d: D) -> Result<String, D::Error> {
    parse_name(&plain_text(d)?).map_err(D::Error::custom)
}

pub(super) fn optional_address<'de, D: Deserializer<'de>>(d: D) -> Result<Option<SocketAddr>, D::Error> {
    let text = plain_text(d)?;
    if text.is_empty() { Ok(None) } else { parse_address(&text).map(Some).map_err(D::Error::custom) }
}

pub(super) fn optional_name<'de, D: Deserializer<'de>>(d: D) -> Result<Option<String>, D::Error> {
    let text = plain_text(d)?;
    if text.is_empty() { Ok(None) } else { parse_name(&text).map(Some).map_err(D::Error::custom) }
}

/// Names of hosts as a `Host` header has them, without a port.
pub(super) fn hosts<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<String>, D::Error> {
    let names = Vec::<String>::deserialize(d)?;
    for name in &names {
        let fits = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        if name.is_empty() || name.len() > 253 || !name.bytes().all(fits) {
            let e = format!("{} is no name of a host; write one like gateway.internal, without a port", quoted(name));
            return Err(D::Error::custom(e));
        }
    }
    Ok(names)
}

/// Hosts as they stand in the names of models, in lower case, perhaps with a port.
pub(super) fn registries<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<String>, D::Error> {
    let hosts = Vec::<String>::deserialize(d)?;
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"_.:-".contains(&b);
    match hosts.iter().find(|host| host.is_empty() || host.len() > 350 || !host.bytes().all(fits)) {
        Some(bad) => Err(D::Error::custom(format!("{} is no registry; write its host as in hf.co", quoted(bad)))),
        None => Ok(hosts.iter().map(|host| host.to_ascii_lowercase()).collect()),
    }
}

/// Where backends reach the mirror. They name it in names of models, which have no scheme but http's and no room for more.
pub(super) fn mirror_url<'de, D: Deserializer<'de>>(d: D) -> Result<String, D::Error> {
    let text = plain_text(d)?;
    if text.is_empty() {
        return Ok(text);
    }
    let authority = text.strip_prefix("http://").unwrap_or_default();
    let fits = authority.split_once(':').is_some_and(|(host, port)| {
        let start = host.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        start
            && host.len() <= 253
            && host.bytes().all(|b| b.is_ascii_alphanumeric() || b".-".contains(&b))
            && port.bytes().all(|b| b.is_ascii_digit())
            && port.parse::<u16>().is_ok_and(|port| port > 0)
    });
    if !fits {
        let e = format!(
            "{} cannot stand in a model's name; write http://host:port with a name or an IPv4 address, and no path",
            quoted(&text)
        );
        return Err(D::Error::custom(e));
    }
    Ok(text.to_ascii_lowercase())
}

/// A name for headers and metric labels.
pub(super) fn label<'de, D: Deserializer<'de>>(d: D) -> Result<String, D::Error> {
    let text = plain_text(d)?;
    if text.len() > 64 || !text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) {
        let e = format!("{} cannot stand in a header; write up to 64 letters, digits and ._-", quoted(&text));
        return Err(D::Error::custom(e));
    }
    Ok(text)
}

pub(super) fn algorithm<'de, D: Deserializer<'de>>(d: D) -> Result<Option<Algorithm>, D::Error> {
    let text = plain_text(d)?;
    if text.is_empty() { Ok(None) } else { parse_algorithm(&text).map(Some).map_err(D::Error::custom) }
}

pub(super) fn bearer<'de, D: Deserializer<'de>>(d: D) -> Result<Option<Secret>, D::Error> {
    let text = secret_text(d)?;
    if text.is_empty() { Ok(None) } else { parse_bearer(&text).map(Some).map_err(D::Error::custom) }
}

pub(super) fn pem_file<'de, D: Deserializer<'de>>(d: D) -> Result<Option<Pem>, D::Error> {
    let text = secret_text(d)?;
    if text.starts_with("-----BEGIN ") {
        return Err(D::Error::custom("this is a key, not a path; keep the key in a file of its own and name it here"));
    }
    Ok((!text.is_empty()).then(|| Pem::File(text.into())))
}

/// Names of models, each perhaps with a `*` at its end. What they mean is read where models are known.
pub(super) fn model_patterns<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<String>, D::Error> {
    let patterns = Vec::<String>::deserialize(d)?;
    match patterns
        .iter()
        .find(|pattern| !is_model_like(pattern.strip_suffix('*').unwrap_or(pattern), pattern.len() == 1))
    {
        Some(bad) => {
            Err(D::Error::custom(format!("{} is no model's name; write one like llama3.2:3b or qwen3*", quoted(bad))))
        }
        None => Ok(patterns),
    }
}

/// Slots by the names of models.
pub(super) fn model_slots<'de, D: Deserializer<'de>>(d: D) -> Result<BTreeMap<String, u32>, D::Error> {
    let slots = BTreeMap::<String, u32>::deserialize(d)?;
    for (model, slots) in &slots {
        if !is_model_like(model, false) || !(1..=100_000).contains(slots) {
            let e = format!("{} = {slots}; write a model's name and a whole number from 1 to 100000", quoted(model));
            return Err(D::Error::custom(e));
        }
    }
    Ok(slots)
}

/// The characters of Ollama's names; `*` alone stands before nothing.
fn is_model_like(text: &str, may_be_empty: bool) -> bool {
    (may_be_empty || !text.is_empty())
        && text.len() <= 600
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.:/".contains(&b))
}

/// A whole number within bounds, as any unsigned type.
pub(super) fn whole<'de, D, T, const MIN: u64, const MAX: u64>(d: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: TryFrom<u64>,
{
    let value = toml::Value::deserialize(d)?;
    value
        .as_integer()
        .and_then(|n| u64::try_from(n).ok())
        .filter(|n| (MIN..=MAX).contains(n))
        .and_then(|n| T::try_from(n).ok())
        .ok_or_else(|| {
            D::Error::custom(format!("found {}; write a whole number from {MIN} to {MAX}", described(&value)))
        })
}

pub(super) fn millis<'de, D: Deserializer<'de>, const MIN: u64, const MAX: u64>(d: D) -> Result<Duration, D::Error> {
    whole::<D, u64, MIN, MAX>(d).map(Duration::from_millis)
}

pub(super) fn seconds<'de, D: Deserializer<'de>, const MIN: u64, const MAX: u64>(d: D) -> Result<Duration, D::Error> {
    whole::<D, u64, MIN, MAX>(d).map(Duration::from_secs)
}

// ---- for serde's `serialize_with`

pub(super) fn as_millis<S: Serializer>(value: &Duration, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_u64(u64::try_from(value.as_millis()).unwrap_or(u64::MAX))
}

pub(super) fn as_seconds<S: Serializer>(value: &Duration, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_u64(value.as_secs())
}

pub(super) fn or_empty<T: fmt::Display, S: Serializer>(value: &Option<T>, s: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => s.collect_str(value),
        None => s.serialize_str(""),
    }
}

pub(super) fn redacted<S: Serializer>(value: &Option<Secret>, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(if value.is_some() { "(redacted)" } else { "" })
}

pub(super) fn as_pem_file<S: Serializer>(value: &Option<Pem>, s: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(Pem::File(path)) => s.collect_str(&path.display()),
        Some(Pem::Text(_)) => s.serialize_str("(from the environment)"),
        None => s.serialize_str(""),
    }
}

// ---- words

pub(super) fn plain_text<'de, D: Deserializer<'de>>(d: D) -> Result<String, D::Error> {
    match toml::Value::deserialize(d)? {
        toml::Value::String(text) => Ok(text),
        other => Err(D::Error::custom(format!("found {}; write a text in quotes", described(&other)))),
    }
}

/// A text that is never quoted, whatever its type is.
pub(super) fn secret_text<'de, D: Deserializer<'de>>(d: D) -> Result<String, D::Error> {
    match toml::Value::deserialize(d)? {
        toml::Value::String(text) => Ok(text),
        other => Err(D::Error::custom(format!("found a value of type {}; write a text in quotes", other.type_str()))),
    }
}

pub(super) fn described(value: &toml::Value) -> String {
    match value {
        toml::Value::Integer(n) => n.to_string(),
        toml::Value::String(text) => quoted(text),
        toml::Value::Boolean(b) => b.to_string(),
        toml::Value::Float(x) => x.to_string(),
        other => format!("a value of type {}", other.type_str()),
    }
}

/// A text that was found, made safe for a terminal and short.
fn quoted(text: &str) -> String {
    let short: String = text.chars().take(60).collect();
    format!("{short:?}{}", if short.len() < text.len() { ".." } else { "" })
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(b) = bytes.next() {
        decoded.push(match b {
            b'%' => {
                let digit = |d: Option<u8>| d.and_then(|d| char::from(d).to_digit(16));
                let (high, low) = (digit(bytes.next())?, digit(bytes.next())?);
                u8::try_from(high * 16 + low).ok()?
            }
            b if b.is_ascii_graphic() => b,
            _ => return None,
        });
    }
    String::from_utf8(decoded).ok()
}
