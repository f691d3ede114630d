//! The strict look at a token, before and after its signature is checked.
//!
//! `jsonwebtoken` (11.1) enforces neither `crit`, `typ` nor `b64`, keeps the last of duplicate members, does not
//! require the claims it can check, ignores `nbf` by default and asks the system's clock, which panics before 1970. So
//! it is used for signatures only, and what a token must look like is written down here (RFC 7515, RFC 7519, RFC 8725).

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Map, Value};

use super::strict_json::{self, JsonFault};
use super::{Caller, cause, jwks};

/// Most roles of a token: the policy is evaluated once for each (contract, section 2).
pub const MAX_ROLES: usize = 8;
/// Most permissions of a token.
pub const MAX_PERMISSIONS: usize = 64;
/// Longest `sub` and `jti`, in characters: both go into every audit record.
pub const MAX_ID_CHARS: usize = 256;
/// Longest role, permission, name and risk tier, in characters.
pub const MAX_WORD_CHARS: usize = 128;

/// Header members that would choose another key or another meaning for the token, and those of encrypted and nested ones (`cty`: RFC 7519
/// section 5.2).
const UNSUPPORTED_MEMBERS: &[&str] = &["crit", "b64", "jwk", "jku", "x5u", "x5c", "enc", "zip", "cty"];

/// A token taken apart, its signature not checked: nothing in here may be believed.
pub struct Unverified<'a> {
    pub header: Map<String, Value>,
    /// What is signed: header and claims as they are written.
    pub message: &'a [u8],
    pub signature: Vec<u8>,
    claims: &'a str,
}

/// What claims must say beside what every token must.
#[derive(Clone, Debug)]
pub struct Expected {
    pub issuer: String,
    pub audience: Option<String>,
}

/// A caller together with the times between which its token holds.
#[derive(Clone, Debug, PartialEq)]
pub struct Claimed {
    pub caller: Caller,
    /// `nbf`, seconds since 1970.
    pub not_before: Option<i64>,
}

impl<'a> Unverified<'a> {
    /// Takes a token apart: three segments of canonical base64url (no padding, no bits left over), a JSON object
    /// without duplicates in front, nothing in it that we would have to honour and do not.
    pub fn read(token: &'a str) -> Result<Unverified<'a>, &'static str> {
        let mut segments = token.split('.');
        let (Some(header), Some(claims), Some(signature), None) =
            (segments.next(), segments.next(), segments.next(), segments.next())
        else {
            return Err(cause::MALFORMED);
        };
        let header = object(header)?;
        if UNSUPPORTED_MEMBERS.iter().any(|member| header.contains_key(*member)) {
            return Err(cause::UNSUPPORTED_HEADER);
        }
        if let Some(kind) = header.get("typ") {
            let known = ["JWT", "at+jwt"];
            if !kind.as_str().is_some_and(|kind| known.iter().any(|word| word.eq_ignore_ascii_case(kind))) {
                return Err(cause::UNSUPPORTED_HEADER);
            }
        }
        let message = &token.as_bytes()[..token.len() - signature.len() - 1];
        let signature = URL_SAFE_NO_PAD.decode(signature).map_err(|_| cause::MALFORMED)?;
        Ok(Unverified { header, message, signature, claims })
    }

    /// `alg`. Only ever compared with that of a key.
    pub fn algorithm(&self) -> Result<&str, &'static str> {
        self.header.get("alg").and_then(Value::as_str).ok_or(cause::WRONG_ALGORITHM)
    }

    /// `kid`: only ever compared with those of our keys.
    pub fn kid(&self) -> Result<Option<&str>, &'static str> {
        match self.header.get("kid") {
            None => Ok(None),
            Some(Value::String(kid)) if kid.len() <= jwks::MAX_KID_BYTES => Ok(Some(kid)),
            Some(_) => Err(cause::UNKNOWN_KEY),
        }
    }

    /// The claims as they are.
    pub fn claims(&self) -> Result<Map<String, Value>, &'static str> {
        object(self.claims)
    }
}

/// Claims as a caller. The times are read but not compared: that is [`holds_at`], which the cache asks again.
pub fn caller(mut claims: Map<String, Value>, expected: &Expected) -> Result<Claimed, &'static str> {
    let expires_at = seconds(claims.get("exp").ok_or(cause::MISSING_CLAIM)?)?;
    let not_before = claims.get("nbf").map(seconds).transpose()?;
    let issued_at = claims.get("iat").map(whole_seconds).transpose()?;
    match claims.get("iss") {
        None => return Err(cause::MISSING_CLAIM),
        Some(Value::String(issuer)) if *issuer == expected.issuer => {}
        Some(_) => return Err(cause::WRONG_ISSUER),
    }
    check_audience(claims.get("aud"), expected.audience.as_deref())?;
    for required in ["sub", "jti"] {
        if claims.get(required).is_none_or(|claim| claim.is_null() || *claim == "") {
            return Err(cause::NOT_AN_AGENT);
        }
    }
    if !claims.contains_key("roles") && !claims.contains_key("permissions") {
        return Err(cause::NOT_AN_AGENT);
    }
    let agent_id = text(claims.remove("sub"), MAX_ID_CHARS)?.ok_or(cause::NOT_AN_AGENT)?;
    let session_id = text(claims.remove("jti"), MAX_ID_CHARS)?.ok_or(cause::NOT_AN_AGENT)?;
    let roles = words(claims.remove("roles"))?;
    if roles.len() > MAX_ROLES {
        return Err(cause::TOO_MANY_ROLES);
    }
    let permissions = words(claims.remove("permissions"))?;
    if permissions.len() > MAX_PERMISSIONS {
        return Err(cause::BAD_CLAIM);
    }
    let agent_name = text(optional(claims.remove("name")), MAX_WORD_CHARS)?;
    let risk_tier = text(optional(claims.remove("risk_tier")), MAX_WORD_CHARS)?;
    let caller = Caller { agent_id, agent_name, session_id, roles, permissions, risk_tier, expires_at, issued_at };
    Ok(Claimed { caller, not_before })
}

/// Whether the token holds at a time, with some seconds granted for clocks that differ.
pub fn holds_at(expires_at: i64, not_before: Option<i64>, now_s: i64, leeway_s: i64) -> Result<(), &'static str> {
    if now_s >= expires_at.saturating_add(leeway_s) {
        return Err(cause::EXPIRED);
    }
    if not_before.is_some_and(|not_before| now_s < not_before.saturating_sub(leeway_s)) {
        return Err(cause::NOT_YET_VALID);
    }
    Ok(())
}

/// Whether a text may stand in a claim: not empty, not too long, no control characters (it is shown in terminals and
/// pages).
pub fn is_plain(text: &str, max_chars: usize) -> bool {
    !text.is_empty() && text.chars().count() <= max_chars && !text.chars().any(char::is_control)
}

fn object(segment: &str) -> Result<Map<String, Value>, &'static str> {
    let bytes = URL_SAFE_NO_PAD.decode(segment).map_err(|_| cause::MALFORMED)?;
    strict_json::object(&bytes).map_err(|fault| match fault {
        JsonFault::DuplicateMember => cause::DUPLICATE_MEMBER,
        JsonFault::NotAnObject => cause::MALFORMED,
    })
}

/// A time: a whole number. A fraction or a string is refused, since others may round or read it differently.
fn seconds(claim: &Value) -> Result<i64, &'static str> {
    claim.as_i64().ok_or(cause::BAD_CLAIM)
}

/// A time that may have a fraction (RFC 7519, section 2): `iat`. The fraction is cut off, so a token looks older and never younger.
fn whole_seconds(claim: &Value) -> Result<i64, &'static str> {
    // From a float to an integer Rust saturates: no value is out of range.
    claim.as_i64().or_else(|| claim.as_f64().map(|seconds| seconds.floor() as i64)).ok_or(cause::BAD_CLAIM)
}

/// RFC 7519 section 4.1.3: a token made for somebody else is refused, also by a proxy that has no audience of its own.
fn check_audience(claim: Option<&Value>, expected: Option<&str>) -> Result<(), &'static str> {
    match (claim, expected) {
        (None, None) => Ok(()),
        (Some(Value::String(audience)), Some(expected)) if audience == expected => Ok(()),
        (Some(Value::Array(audiences)), Some(expected))
            if audiences.iter().all(Value::is_string) && audiences.iter().any(|audience| audience == expected) =>
        {
            Ok(())
        }
        _ => Err(cause::WRONG_AUDIENCE),
    }
}

fn optional(claim: Option<Value>) -> Option<Value> {
    claim.filter(|claim| !claim.is_null())
}

fn text(claim: Option<Value>, max_chars: usize) -> Result<Option<String>, &'static str> {
    match claim {
        None => Ok(None),
        Some(Value::String(text)) if is_plain(&text, max_chars) => Ok(Some(text)),
        Some(_) => Err(cause::BAD_CLAIM),
    }
}

fn words(claim: Option<Value>) -> Result<Vec<String>, &'static str> {
    match claim {
        None => Ok(Vec::new()),
        Some(Value::Array(items)) => {
            items.into_iter().map(|item| text(Some(item), MAX_WORD_CHARS)?.ok_or(cause::BAD_CLAIM)).collect()
        }
        Some(_) => Err(cause::BAD_CLAIM),
    }
}
