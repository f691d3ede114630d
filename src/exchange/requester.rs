//! Whom an agent says that it acts for: `X-Requester-Id`, as Behavry's SDK sends it, and `X-Requester-Channel`, the kind of thing
//! that the person used. Nobody verified either (`docs/adr/0037-requester.md`).

use http::HeaderMap;

use crate::refusal::Refusal;

pub const ID: &str = "x-requester-id";
pub const CHANNEL: &str = "x-requester-channel";

/// Longest of either, in characters of visible ASCII. An address of e-mail has at most 254.
const MAX_CHARS: usize = 256;

/// What the two headers say, word for word. They go to policies and into the audit, never to a backend.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Requester {
    /// `user@company.com`
    pub id: Option<String>,
    /// `slack`, `claude-code`
    pub channel: Option<String>,
}

impl Requester {
    /// An empty value is none. One that is repeated, too long or no plain text is refused rather than passed over: a policy might
    /// decide by it, and the agent would not learn that nobody heard.
    pub fn read(headers: &HeaderMap) -> Result<Requester, Refusal> {
        let id = one(
            headers,
            ID,
            "X-Requester-Id is there twice",
            "X-Requester-Id is not 256 visible ASCII characters at most",
        )?;
        let channel = one(
            headers,
            CHANNEL,
            "X-Requester-Channel is there twice",
            "X-Requester-Channel is not 256 visible ASCII characters at most",
        )?;
        Ok(Requester { id, channel })
    }
}

fn one(headers: &HeaderMap, name: &str, twice: &'static str, unfit: &'static str) -> Result<Option<String>, Refusal> {
    let mut values = headers.get_all(name).iter();
    let (value, None) = (values.next(), values.next()) else {
        return Err(Refusal::bad_framing(twice));
    };
    let Some(value) = value.filter(|value| !value.is_empty()) else { return Ok(None) };
    let fits = value.len() <= MAX_CHARS && value.as_bytes().iter().all(u8::is_ascii_graphic);
    match value.to_str() {
        Ok(text) if fits => Ok(Some(text.to_owned())),
        _ => Err(Refusal::bad_framing(unfit)),
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn read_of(pairs: &[(&'static str, &[u8])]) -> Result<Requester, &'static str> {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_bytes(value).expect("test values are legal"));
        }
        Requester::read(&headers).map_err(|refusal| refusal.code.as_str())
    }

    #[test]
    fn id_and_channel_are_read_word_for_word() {
        let both = read_of(&[(ID, b"User@company.com"), (CHANNEL, b"claude-code")]).unwrap();
        assert_eq!((both.id.as_deref(), both.channel.as_deref()), (Some("User@company.com"), Some("claude-code")));
        let id = read_of(&[(ID, b"slack:U123")]).unwrap();
        assert_eq!((id.id.as_deref(), id.channel), (Some("slack:U123"), None));
        assert_eq!(read_of(&[(ID, b""), (CHANNEL, b"")]), Ok(Requester::default()));
        assert_eq!(read_of(&[]), Ok(Requester::default()));
    }

    #[test]
    fn what_is_no_single_short_plain_text_is_refused() {
        let (longest, long) = ([b'i'; 256], [b'i'; 257]);
        for name in [ID, CHANNEL] {
            assert!(read_of(&[(name, &longest)]).is_ok());
            for bad in [&long[..], b"a b", b"a\tb", "\u{e4}".as_bytes(), b"\xff"] {
                assert_eq!(read_of(&[(name, bad)]), Err("bad_framing"), "{bad:?}");
            }
            assert_eq!(read_of(&[(name, b"a"), (name, b"a")]), Err("bad_framing"));
        }
    }
}
