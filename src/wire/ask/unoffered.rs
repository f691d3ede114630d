//! The one fact that is read of a request for an operation that is not offered.
use crate::wire::json::{Malformed, Reader, Shape};

/// Whether a body in JSON asks for a stream, as OpenAI's API says it: `stream` (images, transcriptions), or `stream_format` of
/// speech. It only decides a word of the refusal, so whatever is not clear means no.
pub fn asks_for_stream(body: &[u8]) -> bool {
    read(body).unwrap_or(false)
}

fn read(body: &[u8]) -> Result<bool, Malformed> {
    let mut reader = Reader::new(body)?;
    let mut asks = false;
    if reader.shape()? != Shape::Object {
        return Ok(false);
    }
    reader.object(|reader, key| {
        match (&*key.decode(), reader.shape()?) {
            ("stream", Shape::Bool(true)) => asks = true,
            ("stream_format", Shape::Text) => {
                asks |= reader.string()?.decode() == "sse";
                return Ok(());
            }
            _ => {}
        }
        reader.skip()
    })?;
    reader.end()?;
    Ok(asks)
}

#[cfg(test)]
mod tests {
    use super::asks_for_stream;

    #[test]
    fn a_stream_is_asked_for_in_either_way() {
        for body in [
            r#"{"stream":true}"#,
            r#"{"model":"m","stream_format":"sse","input":{"stream":false}}"#,
            r#" { "\u0073tream" : true } "#,
        ] {
            assert!(asks_for_stream(body.as_bytes()), "{body}");
        }
    }

    #[test]
    fn what_is_not_clear_asks_for_none() {
        for body in [
            "",
            "{}",
            "[true]",
            r#"{"stream":"true"}"#,
            r#"{"stream":1}"#,
            r#"{"stream":false}"#,
            r#"{"stream_format":"audio"}"#,
            r#"{"input":{"stream":true}}"#,
            r#"{"stream":true"#,
            r#"{"stream":true}}"#,
            "--boundary\r\ncontent-disposition: form-data; name=\"stream\"\r\n\r\ntrue\r\n",
        ] {
            assert!(!asks_for_stream(body.as_bytes()), "{body}");
        }
        assert!(!asks_for_stream(b"{\"stream\":true,\"x\":\"\xff\"}"), "no UTF-8");
    }
}
