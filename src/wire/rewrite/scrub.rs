//! What a 401 of Ollama's must not tell a client: `signin_url` carries the name of the server's machine and its public key
//! (ollama-wire 3.3).

use bytes::{Bytes, BytesMut};

use super::edit::{Edits, Fate, Siblings};
use crate::wire::json::{Malformed, Reader, Shape};

/// The longest body that is looked into; Ollama's own has some 200 bytes.
const HELD_MAX_BYTES: usize = 64 * 1024;

/// Takes `signin_url` out of a body, at any depth, and puts as many spaces behind it, so that its length stays what its head says.
///
/// What is too long or no JSON is not Ollama's: of that nothing but spaces passes. No `Debug`: it holds a reply.
#[derive(Default)]
pub struct Scrubber {
    held: BytesMut,
    /// It became too long.
    blank: bool,
}

impl Scrubber {
    /// The next bytes in, those that the client may see out: none before the end, if it is one that can be held.
    pub fn pass(&mut self, chunk: &[u8]) -> Bytes {
        if self.blank {
            return spaces(chunk.len());
        }
        self.held.extend_from_slice(chunk);
        if self.held.len() <= HELD_MAX_BYTES {
            return Bytes::new();
        }
        self.blank = true;
        spaces(self.held.split().len())
    }

    pub fn finish(&mut self) -> Bytes {
        let body = self.held.split();
        if body.is_empty() {
            return Bytes::new();
        }
        let mut edits = Edits::default();
        let read = Reader::new(&body).and_then(|mut reader| {
            value(&mut reader, &mut edits)?;
            reader.end()
        });
        if read.is_err() {
            return spaces(body.len());
        }
        let mut scrubbed = edits.apply(&body);
        scrubbed.resize(body.len(), b' ');
        scrubbed.into()
    }
}

/// The reader bounds how deep this goes.
fn value(reader: &mut Reader<'_>, edits: &mut Edits) -> Result<(), Malformed> {
    let shape = reader.shape()?;
    match shape {
        Shape::Object => {
            let mut siblings = Siblings::new(reader.at() + 1);
            reader.object(|reader, key| {
                let goes = key.decode().eq_ignore_ascii_case("signin_url");
                value(reader, edits)?;
                let fate = if goes { Fate::Cut } else { Fate::Keep };
                siblings.tell(key.range().start..reader.at(), fate, edits);
                Ok::<(), Malformed>(())
            })?;
            siblings.close(String::new(), edits);
            Ok(())
        }
        Shape::Array => reader.array(|reader| value(reader, edits)),
        _ => reader.skip(),
    }
}

fn spaces(length: usize) -> Bytes {
    vec![b' '; length].into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scrubbed(body: &str, size: usize) -> String {
        let mut scrubber = Scrubber::default();
        let mut out = vec![];
        for chunk in body.as_bytes().chunks(size) {
            out.extend_from_slice(&scrubber.pass(chunk));
        }
        out.extend_from_slice(&scrubber.finish());
        assert_eq!(out.len(), body.len(), "the head has told its length");
        String::from_utf8(out).unwrap().trim_end_matches(' ').to_owned()
    }

    #[test]
    fn the_url_goes_wherever_it_stands_and_the_length_stays() {
        for (body, wanted) in [
            (r#"{"error":"unauthorized","signin_url":"https://x?name=HOST&key=KEY"}"#, r#"{"error":"unauthorized"}"#),
            (r#"{"signin_url":"u", "error" : "e"}"#, r#"{"error" : "e"}"#),
            (
                r#"{"error":{"message":"m","Signin_URL":["u"]},"a":[{"signin_url":1}]}"#,
                r#"{"error":{"message":"m"},"a":[{}]}"#,
            ),
            (r#"{"error":"unauthorized"}"#, r#"{"error":"unauthorized"}"#),
            (r#"{"error":"signin_url"}"#, r#"{"error":"signin_url"}"#),
            (r#"{"sign\u0069n_url":"u"}"#, "{}"),
        ] {
            for size in [1, 7, 1000] {
                assert_eq!(scrubbed(body, size), wanted, "{body} in pieces of {size}");
            }
        }
    }

    #[test]
    fn what_cannot_be_looked_into_is_not_shown() {
        for body in [
            "",
            "{\"signin_url\":\"KEY\"",
            "<html>KEY</html>",
            "{}{}",
            &format!("{{\"a\":\"{}\"}}", "KEY".repeat(30_000)),
        ] {
            for size in [1000, usize::MAX] {
                assert_eq!(scrubbed(body, size), "");
            }
        }
    }
}
