//! The words of `POST /api/v1/auth/token`: the body in, the reply's body out. No socket, no clock.
//!
//! Contract, section 2: JSON or form, `client_credentials` only; errors carry RFC 6749's `error` and Behavry's
//! `detail`. Every reply goes out with `Content-Type: application/json` and `Cache-Control: no-store`.

use serde_json::{Value, json};

use super::agents::{Agent, AuthFailure};
use super::issuer::Minted;
use super::secret::Secret;
use super::strict_json::{self, JsonFault};

const JSON: &str = "application/json";
const FORM: &str = "application/x-www-form-urlencoded";

/// Longest `client_id`, in bytes.
pub const MAX_CLIENT_ID_BYTES: usize = 1024;
/// Longest `client_secret`, in bytes: argon2 reads all of it.
pub const MAX_CLIENT_SECRET_BYTES: usize = 1024;

/// What a client asks for. No `Debug`: it holds a secret. The grant is `client_credentials`, the only one there is.
pub struct TokenAsk {
    pub client_id: String,
    pub client_secret: Secret,
}

/// Why there is no token. The words never repeat what the client sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenError {
    /// The body cannot be read, or something is missing from it; the words say what.
    InvalidRequest(&'static str),
    UnsupportedGrantType,
    /// Wrong id or wrong secret: one answer.
    InvalidClient,
    Suspended,
}

impl From<AuthFailure> for TokenError {
    fn from(failure: AuthFailure) -> Self {
        match failure {
            AuthFailure::WrongIdOrSecret => TokenError::InvalidClient,
            AuthFailure::Suspended => TokenError::Suspended,
        }
    }
}

impl TokenError {
    pub fn status(self) -> u16 {
        match self {
            TokenError::InvalidRequest(_) | TokenError::UnsupportedGrantType => 400,
            TokenError::InvalidClient => 401,
            TokenError::Suspended => 403,
        }
    }

    /// RFC 6749 section 5.2.
    pub fn code(self) -> &'static str {
        match self {
            TokenError::InvalidRequest(_) => "invalid_request",
            TokenError::UnsupportedGrantType => "unsupported_grant_type",
            TokenError::InvalidClient => "invalid_client",
            TokenError::Suspended => "unauthorized_client",
        }
    }

    /// The text for people.
    pub fn detail(self) -> &'static str {
        match self {
            TokenError::InvalidRequest(what) => what,
            TokenError::UnsupportedGrantType => "grant_type must be client_credentials",
            TokenError::InvalidClient => "Invalid client_id or client_secret",
            TokenError::Suspended => "This agent is suspended; ask its operator",
        }
    }

    /// The reply's body.
    pub fn body(self) -> Vec<u8> {
        error_body(self.code(), self.detail())
    }
}

/// An error in this endpoint's shape.
pub fn error_body(code: &str, detail: &str) -> Vec<u8> {
    json!({"error": code, "detail": detail}).to_string().into_bytes()
}

/// A refusal that was made elsewhere (too large, too slow, too many), in this endpoint's shape: `error` is one of RFC 6749's words,
/// `code` is ours.
pub fn refusal_body(detail: &str, code: &str, status: u16) -> Vec<u8> {
    // RFC 6749 knows "not now" at the authorization endpoint only (section 4.1.2.1); it fits here better than a fault of the request's.
    let error = if status < 500 && status != 429 { "invalid_request" } else { "temporarily_unavailable" };
    json!({"error": error, "detail": detail, "code": code}).to_string().into_bytes()
}

/// The reply to a good request.
pub fn granted_body(token: &str, minted: &Minted, agent: &Agent) -> Vec<u8> {
    json!({
        "access_token": token,
        "token_type": "Bearer",
        "expires_in": minted.expires_in_s,
        "agent_id": agent.id,
        "risk_tier": agent.risk_tier,
    })
    .to_string()
    .into_bytes()
}

/// Which of the two types of body it is, as it is written without parameters.
pub fn media_type(content_type: Option<&str>) -> Result<&'static str, TokenError> {
    let found = content_type.unwrap_or("").split(';').next().unwrap_or("").trim();
    [JSON, FORM]
        .into_iter()
        .find(|known| found.eq_ignore_ascii_case(known))
        .ok_or(TokenError::InvalidRequest("Content-Type must be application/json or application/x-www-form-urlencoded"))
}

/// Reads a body, whose size the caller has bounded, by its content type. Members that we do not know are passed over
/// (RFC 6749 section 3.2: `scope` is one); one that is there twice is refused.
pub fn read(content_type: Option<&str>, body: &[u8]) -> Result<TokenAsk, TokenError> {
    let fields = if media_type(content_type)? == JSON { json_fields(body)? } else { form_fields(body)? };
    let [client_id, client_secret, grant_type] = fields;
    match grant_type.as_deref() {
        None | Some("") => return Err(TokenError::InvalidRequest("grant_type is missing")),
        Some("client_credentials") => {}
        Some(_) => return Err(TokenError::UnsupportedGrantType),
    }
    let given =
        |field: Option<String>, words| field.filter(|text| !text.is_empty()).ok_or(TokenError::InvalidRequest(words));
    let client_id = given(client_id, "client_id is missing")?;
    let client_secret = given(client_secret, "client_secret is missing")?;
    if client_id.len() > MAX_CLIENT_ID_BYTES || client_secret.len() > MAX_CLIENT_SECRET_BYTES {
        return Err(TokenError::InvalidRequest("client_id or client_secret is too long"));
    }
    Ok(TokenAsk { client_id, client_secret: Secret::new(client_secret) })
}

const FIELDS: [&str; 3] = ["client_id", "client_secret", "grant_type"];

type Fields = [Option<String>; 3];

const TWICE: TokenError = TokenError::InvalidRequest("a member of the body is there twice");

fn json_fields(body: &[u8]) -> Result<Fields, TokenError> {
    let mut members = strict_json::object(body).map_err(|fault| match fault {
        JsonFault::NotAnObject => TokenError::InvalidRequest("the body is not a JSON object"),
        JsonFault::DuplicateMember => TWICE,
    })?;
    let mut fields = Fields::default();
    for (field, name) in fields.iter_mut().zip(FIELDS) {
        *field = match members.remove(name) {
            None | Some(Value::Null) => None,
            Some(Value::String(text)) => Some(text),
            Some(_) => {
                return Err(TokenError::InvalidRequest("client_id, client_secret and grant_type must be strings"));
            }
        };
    }
    Ok(fields)
}

/// `application/x-www-form-urlencoded` (WHATWG URL, section 5.1), but bad escapes and bytes that are no UTF-8 are
/// refused.
fn form_fields(body: &[u8]) -> Result<Fields, TokenError> {
    const BAD: TokenError = TokenError::InvalidRequest("the body is not a well-formed form");
    let mut fields = Fields::default();
    for pair in body.split(|byte| *byte == b'&').filter(|pair| !pair.is_empty()) {
        let mut parts = pair.splitn(2, |byte| *byte == b'=');
        let name = form_text(parts.next().unwrap_or_default()).ok_or(BAD)?;
        let value = form_text(parts.next().unwrap_or_default()).ok_or(BAD)?;
        let Some(index) = FIELDS.iter().position(|known| *known == name) else { continue };
        if fields[index].replace(value).is_some() {
            return Err(TWICE);
        }
    }
    Ok(fields)
}

fn form_text(encoded: &[u8]) -> Option<String> {
    let mut bytes = Vec::with_capacity(encoded.len());
    let mut rest = encoded.iter();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let digit = |byte: &u8| char::from(*byte).to_digit(16);
                let (high, low) = (digit(rest.next()?)?, digit(rest.next()?)?);
                u8::try_from(high * 16 + low).ok()?
            }
            byte => *byte,
        });
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::agents::State;

    const JSON: Option<&str> = Some("Application/JSON");
    const FORM: Option<&str> = Some("application/x-www-form-urlencoded; charset=utf-8");

    fn refused(content_type: Option<&str>, body: &str) -> TokenError {
        read(content_type, body.as_bytes()).err().expect("the body is refused")
    }

    #[test]
    fn json_and_form_say_the_same() {
        let json = r#"{"client_id":"a b","client_secret":"s+%","grant_type":"client_credentials","scope":"x"}"#;
        let form = "grant_type=client_credentials&client_id=a+b&client_secret=s%2B%25&scope=x&";
        for (content_type, body) in [(JSON, json), (FORM, form)] {
            let ask = read(content_type, body.as_bytes()).unwrap_or_else(|error| panic!("refused: {error:?}"));
            assert_eq!(ask.client_id, "a b");
            assert!(ask.client_secret.expose() == "s+%");
        }
    }

    #[test]
    fn another_grant_has_its_own_code() {
        let body = r#"{"client_id":"a","client_secret":"s","grant_type":"password"}"#;
        assert_eq!(refused(JSON, body), TokenError::UnsupportedGrantType);
        assert_eq!(refused(FORM, "grant_type=refresh_token"), TokenError::UnsupportedGrantType);
    }

    #[test]
    fn what_is_missing_twice_or_odd_is_an_invalid_request() {
        for (content_type, body, words) in [
            (JSON, "", "not a JSON object"),
            (JSON, "[]", "not a JSON object"),
            (JSON, r#"{"client_id":"a","client_id":"b"}"#, "twice"),
            (JSON, r#"{"client_id":"a","client_secret":"s"}"#, "grant_type is missing"),
            (JSON, r#"{"client_secret":"s","grant_type":"client_credentials"}"#, "client_id is missing"),
            (
                JSON,
                r#"{"client_id":"a","client_secret":"","grant_type":"client_credentials"}"#,
                "client_secret is missing",
            ),
            (JSON, r#"{"client_id":1,"client_secret":"s","grant_type":"client_credentials"}"#, "strings"),
            (FORM, "client_id=a&client_id=b", "twice"),
            (FORM, "client_id=%zz", "well-formed"),
            (FORM, "client_id=%f", "well-formed"),
            (FORM, "client_id=%ff", "well-formed"),
            (FORM, "", "grant_type is missing"),
            (None, "{}", "Content-Type"),
            (Some("text/plain"), "{}", "Content-Type"),
        ] {
            let error = refused(content_type, body);
            assert_eq!(error.code(), "invalid_request", "{body}");
            assert!(error.detail().contains(words), "{body}: {}", error.detail());
        }
        let long = format!("client_id={}&client_secret=s&grant_type=client_credentials", "a".repeat(1025));
        assert!(refused(FORM, &long).detail().contains("too long"));
    }

    #[test]
    fn a_wrong_id_and_a_wrong_secret_get_the_same_answer() {
        let error = TokenError::from(AuthFailure::WrongIdOrSecret);
        assert_eq!((error.status(), error.code()), (401, "invalid_client"));
        let body: Value = serde_json::from_slice(&error.body()).unwrap();
        assert_eq!(body, json!({"error": "invalid_client", "detail": "Invalid client_id or client_secret"}));
        assert_eq!(TokenError::from(AuthFailure::Suspended).status(), 403);
        assert_eq!(TokenError::UnsupportedGrantType.status(), 400);
    }

    #[test]
    fn a_good_request_is_answered_in_the_contract_s_shape() {
        let agent = Agent {
            id: "a".into(),
            name: None,
            roles: vec![],
            permissions: vec![],
            risk_tier: Some("medium".into()),
            state: State::Active,
        };
        let minted = Minted { session_id: "s".into(), expires_in_s: 3600 };
        let body: Value = serde_json::from_slice(&granted_body("t", &minted, &agent)).unwrap();
        let expected = json!({"access_token": "t", "token_type": "Bearer", "expires_in": 3600, "agent_id": "a", "risk_tier": "medium"});
        assert_eq!(body, expected);
    }
}
