//! Which header carries the credential, and of which form it is: the one place that tells tokens, API keys and devices apart.
//!
//! Tokens and API keys come in `Authorization: Bearer` or in `x-api-key` (Anthropic's clients); a device's signature is the whole
//! value of `Authorization` (contract, section 2).

use http::{HeaderMap, HeaderName, HeaderValue, header::AUTHORIZATION};

use super::{Rejection, api_key, cause, device};

/// Longest token that is looked at, in bytes: refused before any decoding or cryptography. An agent's token with 8
/// roles and an RSA signature is about 1 KiB.
pub const MAX_TOKEN_BYTES: usize = 8 * 1024;

const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// The one credential of a request, by its form. Nothing of it is believed yet.
#[derive(Clone, Copy)]
pub enum Credential<'a> {
    /// A JWT, or what should have been one.
    Token(&'a str),
    /// It has the prefix of API keys, so it is never tried as a token.
    ApiKey(&'a str),
    /// What Ollama's own client sends.
    Device(device::Signed<'a>),
}

/// The one credential of a request. An empty value is no credential: SDKs send `Bearer ` when no key is configured.
pub fn read(headers: &HeaderMap) -> Result<Credential<'_>, Rejection> {
    let authorization = single(headers, &AUTHORIZATION)?.map(|value| value.as_bytes().trim_ascii());
    let api_key = single(headers, &X_API_KEY)?.map(HeaderValue::as_bytes);
    if let Some(signed) = authorization.and_then(device::Signed::read) {
        return match api_key {
            None => Ok(Credential::Device(signed)),
            Some(_) => Err(Rejection::Invalid(cause::CONFLICTING_CREDENTIALS)),
        };
    }
    let bearer = authorization.map(bearer_token).transpose()?;
    let secret = match (bearer, api_key) {
        (Some(one), Some(other)) if one != other => return Err(Rejection::Invalid(cause::CONFLICTING_CREDENTIALS)),
        (Some(one), _) | (None, Some(one)) => one,
        (None, None) => return Err(Rejection::Missing),
    };
    if secret.is_empty() {
        return Err(Rejection::Missing);
    }
    if secret.len() > MAX_TOKEN_BYTES {
        return Err(Rejection::Invalid(cause::OVERSIZED));
    }
    let secret = std::str::from_utf8(secret).map_err(|_| Rejection::Invalid(cause::MALFORMED))?;
    Ok(if secret.starts_with(api_key::PREFIX) { Credential::ApiKey(secret) } else { Credential::Token(secret) })
}

/// The header's only value. Two of the same name are refused even when equal: whoever sent them does not know which
/// counts.
fn single<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a HeaderValue>, Rejection> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (value, None) => Ok(value),
        _ => Err(Rejection::Invalid(cause::REPEATED_CREDENTIAL)),
    }
}

/// `Bearer <token>`: the scheme without regard to case (RFC 9110 section 11.1), then one space or more.
fn bearer_token(value: &[u8]) -> Result<&[u8], Rejection> {
    let end = value.iter().position(|byte| *byte == b' ').unwrap_or(value.len());
    let (scheme, rest) = value.split_at(end);
    if value.is_empty() {
        return Ok(value);
    }
    if !scheme.eq_ignore_ascii_case(b"bearer") {
        return Err(Rejection::Invalid(cause::NOT_BEARER));
    }
    Ok(rest.trim_ascii_start())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_of(pairs: &[(&'static str, &str)]) -> Result<String, Rejection> {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_bytes(value.as_bytes()).expect("test values are legal"));
        }
        read(&headers).map(|credential| match credential {
            Credential::Token(token) => token.to_owned(),
            Credential::ApiKey(key) => format!("API key {key}"),
            Credential::Device(_) => "a device".to_owned(),
        })
    }

    #[test]
    fn the_scheme_is_read_without_regard_to_case() {
        for value in ["Bearer a.b.c", "bearer a.b.c", "BEARER   a.b.c", "Bearer a.b.c "] {
            assert_eq!(read_of(&[("authorization", value)]).as_deref(), Ok("a.b.c"), "{value}");
        }
    }

    #[test]
    fn an_api_key_header_stands_for_a_bearer_token() {
        assert_eq!(read_of(&[("x-api-key", "a.b.c")]).as_deref(), Ok("a.b.c"));
    }

    #[test]
    fn both_headers_are_fine_while_they_agree() {
        assert_eq!(read_of(&[("authorization", "Bearer t"), ("x-api-key", "t")]).as_deref(), Ok("t"));
        for other in ["u", "", "t2"] {
            assert_eq!(
                read_of(&[("authorization", "Bearer t"), ("x-api-key", other)]),
                Err(Rejection::Invalid(cause::CONFLICTING_CREDENTIALS))
            );
        }
    }

    #[test]
    fn a_repeated_header_is_refused_even_when_equal() {
        for name in ["authorization", "x-api-key"] {
            let refused = read_of(&[(name, "Bearer t"), (name, "Bearer t")]);
            assert_eq!(refused, Err(Rejection::Invalid(cause::REPEATED_CREDENTIAL)));
        }
    }

    #[test]
    fn nothing_or_an_empty_value_is_a_missing_credential() {
        assert_eq!(read_of(&[]), Err(Rejection::Missing));
        assert_eq!(read_of(&[("authorization", "")]), Err(Rejection::Missing));
        assert_eq!(read_of(&[("authorization", "Bearer ")]), Err(Rejection::Missing));
        assert_eq!(read_of(&[("authorization", "Bearer")]), Err(Rejection::Missing));
        assert_eq!(read_of(&[("x-api-key", "")]), Err(Rejection::Missing));
    }

    #[test]
    fn another_scheme_is_refused() {
        for value in ["Basic YTpi", "Bearerx t", "a.b.c", "Bearer\tt"] {
            assert_eq!(read_of(&[("authorization", value)]), Err(Rejection::Invalid(cause::NOT_BEARER)), "{value}");
        }
    }

    #[test]
    fn an_oversized_token_is_refused_unread() {
        let longest = "a".repeat(MAX_TOKEN_BYTES);
        assert!(read_of(&[("x-api-key", &longest)]).is_ok());
        assert_eq!(read_of(&[("x-api-key", &(longest + "a"))]), Err(Rejection::Invalid(cause::OVERSIZED)));
    }

    #[test]
    fn bytes_that_are_no_text_are_malformed() {
        let mut headers = HeaderMap::new();
        headers.append("x-api-key", HeaderValue::from_bytes(b"a\xff").expect("obs-text is legal in a value"));
        assert_eq!(read(&headers).err(), Some(Rejection::Invalid(cause::MALFORMED)));
    }

    #[test]
    fn the_prefix_makes_an_api_key_in_either_header() {
        assert_eq!(read_of(&[("x-api-key", "bop_k")]).as_deref(), Ok("API key bop_k"));
        assert_eq!(read_of(&[("authorization", "Bearer bop_a.b.c")]).as_deref(), Ok("API key bop_a.b.c"));
        assert_eq!(read_of(&[("authorization", "Bearer BOP_a.b.c")]).as_deref(), Ok("BOP_a.b.c"));
        assert_eq!(read_of(&[("authorization", "bop_k")]), Err(Rejection::Invalid(cause::NOT_BEARER)));
    }

    #[test]
    fn a_signature_of_ollamas_client_has_a_form_of_its_own() {
        let signed = "AAAAC3NzaC1lZDI1NTE5AAAAIBwHRSNviAJ/Gf9o9Iq7i4SwiFXNWG8ELj5+xDRdKidG:c2ln";
        assert_eq!(read_of(&[("authorization", signed)]).as_deref(), Ok("a device"));
        // No header but `Authorization`, and no scheme in front, makes it one.
        assert_eq!(read_of(&[("x-api-key", signed)]).as_deref(), Ok(signed));
        assert_eq!(read_of(&[("authorization", &format!("Bearer {signed}"))]).as_deref(), Ok(signed));
        for other in [signed.replace(':', ""), signed.replacen("AAAA", "BBBB", 1)] {
            assert_eq!(read_of(&[("authorization", &other)]), Err(Rejection::Invalid(cause::NOT_BEARER)));
        }
        for beside in ["t", "", signed] {
            let both = read_of(&[("authorization", signed), ("x-api-key", beside)]);
            assert_eq!(both, Err(Rejection::Invalid(cause::CONFLICTING_CREDENTIALS)));
        }
    }
}
