//! Which header carries the token. `Authorization: Bearer`, or `x-api-key` (Anthropic's clients); contract, section 2.

use http::{HeaderMap, HeaderName, HeaderValue, header::AUTHORIZATION};

use super::{Rejection, cause};

/// Longest token that is looked at, in bytes: refused before any decoding or cryptography. An agent's token with 8
/// roles and an RSA signature is about 1 KiB.
pub const MAX_TOKEN_BYTES: usize = 8 * 1024;

const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// The one credential of a request. An empty value is no credential: SDKs send `Bearer ` when no key is configured.
pub fn read(headers: &HeaderMap) -> Result<&str, Rejection> {
    let bearer = single(headers, &AUTHORIZATION)?.map(bearer_token).transpose()?;
    let api_key = single(headers, &X_API_KEY)?.map(HeaderValue::as_bytes);
    let token = match (bearer, api_key) {
        (Some(one), Some(other)) if one != other => return Err(Rejection::Invalid(cause::CONFLICTING_CREDENTIALS)),
        (Some(one), _) | (None, Some(one)) => one,
        (None, None) => return Err(Rejection::Missing),
    };
    if token.is_empty() {
        return Err(Rejection::Missing);
    }
    if token.len() > MAX_TOKEN_BYTES {
        return Err(Rejection::Invalid(cause::OVERSIZED));
    }
    std::str::from_utf8(token).map_err(|_| Rejection::Invalid(cause::MALFORMED))
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
fn bearer_token(value: &HeaderValue) -> Result<&[u8], Rejection> {
    let value = value.as_bytes().trim_ascii();
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
        read(&headers).map(str::to_owned)
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
        assert_eq!(read(&headers), Err(Rejection::Invalid(cause::MALFORMED)));
    }
}
