//! The framing of a chunked request body, judged byte by byte before Pingora's parser sees it.
//!
//! Pingora 0.9.1 reads chunk lines with httparse 1.10, which takes a line without a size for the last chunk, passes bare LF in
//! extensions and spaces around sizes, and does not look at trailers (traps, Pingora 10). Whatever stands in front of this proxy may
//! read such lines otherwise and see other requests in the same bytes. So the stream of a chunked request is wrapped in [`Judged`],
//! which ends it with an error at the first byte that is not RFC 9112's.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Buf, BytesMut};
use pingora::protocols::raw_connect::ProxyDigest;
use pingora::protocols::{
    GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, Stream, TimingDigest,
    UniqueID, UniqueIDType,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Digits of a size, leading zeros included: 2^60 is more than any limit.
const SIZE_DIGITS: u8 = 15;

/// The bytes are not those of a chunked body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadChunk;

/// Where in the body the next byte stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In a size, after so many digits.
    Size {
        digits: u8,
        value: u64,
    },
    /// Behind the `;` of a size.
    Extension {
        value: u64,
    },
    /// Between CR and LF of a size's line.
    SizeEnd {
        value: u64,
    },
    /// So many bytes of data left, one at least.
    Data(u64),
    DataCr,
    DataLf,
    /// At the start of a line behind the last chunk.
    Trailer,
    TrailerName,
    TrailerValue,
    TrailerEnd,
    /// Between the last CR and LF.
    LastLf,
    /// Behind the body: what follows is the next request's.
    Done,
    Bad,
}

/// The judge: fed with every byte behind the head.
#[derive(Debug)]
pub struct Chunks(Place);

impl Chunks {
    pub fn new() -> Chunks {
        Chunks(Place::Size { digits: 0, value: 0 })
    }

    pub fn feed(&mut self, mut bytes: &[u8]) -> Result<(), BadChunk> {
        while let Some((byte, rest)) = bytes.split_first() {
            (self.0, bytes) = match self.0 {
                Place::Done => return Ok(()),
                Place::Data(left) => {
                    let taken = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    let left = left - taken as u64;
                    (if left == 0 { Place::DataCr } else { Place::Data(left) }, &bytes[taken..])
                }
                place => (after(place, *byte), rest),
            };
            if self.0 == Place::Bad {
                return Err(BadChunk);
            }
        }
        Ok(())
    }
}

/// The place behind `byte`, which stands at `place`.
fn after(place: Place, byte: u8) -> Place {
    let text = byte == b'\t' || (byte >= b' ' && byte != 0x7f);
    match (place, byte) {
        (Place::Size { digits, value }, _) if byte.is_ascii_hexdigit() && digits < SIZE_DIGITS => {
            let digit = char::from(byte).to_digit(16).unwrap_or(0);
            Place::Size { digits: digits + 1, value: value << 4 | u64::from(digit) }
        }
        (Place::Size { digits: 1.., value }, b';') => Place::Extension { value },
        (Place::Size { digits: 1.., value }, b'\r') | (Place::Extension { value }, b'\r') => Place::SizeEnd { value },
        (Place::Extension { value }, _) if text => Place::Extension { value },
        (Place::SizeEnd { value: 0 }, b'\n') => Place::Trailer,
        (Place::SizeEnd { value }, b'\n') => Place::Data(value),
        (Place::DataCr, b'\r') => Place::DataLf,
        (Place::DataLf, b'\n') => Place::Size { digits: 0, value: 0 },
        (Place::Trailer, b'\r') => Place::LastLf,
        (Place::TrailerName, b':') => Place::TrailerValue,
        (Place::Trailer | Place::TrailerName, _) if super::head::is_token(byte) => Place::TrailerName,
        (Place::TrailerValue, b'\r') => Place::TrailerEnd,
        (Place::TrailerValue, _) if text => Place::TrailerValue,
        (Place::TrailerEnd, b'\n') => Place::Trailer,
        (Place::LastLf, b'\n') => Place::Done,
        _ => Place::Bad,
    }
}

/// A stream whose next bytes are a chunked body, and whose reads fail where that is none.
#[derive(Debug)]
pub struct Judged {
    inner: Stream,
    /// Read from the stream together with the head.
    unread: BytesMut,
    chunks: Chunks,
}

impl Judged {
    pub fn wrap(inner: Stream, unread: BytesMut) -> Stream {
        Box::new(Judged { inner, unread, chunks: Chunks::new() })
    }

    /// The stream itself, if it is a wrapped one, and what was not read from it yet.
    pub fn unwrap(stream: Stream) -> (Stream, BytesMut) {
        if !(*stream).as_any().is::<Judged>() {
            return (stream, BytesMut::new());
        }
        match stream.into_any().downcast::<Judged>() {
            Ok(judged) => (judged.inner, judged.unread),
            Err(_) => unreachable!("its type was asked a line ago"),
        }
    }
}

impl AsyncRead for Judged {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        if self.unread.is_empty() {
            ready!(Pin::new(&mut self.inner).poll_read(cx, buffer))?;
        } else {
            let taken = self.unread.len().min(buffer.remaining());
            buffer.put_slice(&self.unread[..taken]);
            self.unread.advance(taken);
        }
        let judged = self.chunks.feed(&buffer.filled()[before..]);
        Poll::Ready(judged.map_err(|BadChunk| io::Error::new(io::ErrorKind::InvalidData, "not a chunked body")))
    }
}

impl AsyncWrite for Judged {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bytes)
    }
    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[async_trait]
impl Shutdown for Judged {
    async fn shutdown(&mut self) {
        Shutdown::shutdown(&mut *self.inner).await
    }
}

impl UniqueID for Judged {
    fn id(&self) -> UniqueIDType {
        self.inner.id()
    }
}

impl Ssl for Judged {
    fn get_ssl_digest(&self) -> Option<Arc<pingora::protocols::tls::SslDigest>> {
        self.inner.get_ssl_digest()
    }
}

impl Peek for Judged {}

impl GetTimingDigest for Judged {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        self.inner.get_timing_digest()
    }
    fn get_read_pending_time(&self) -> Duration {
        self.inner.get_read_pending_time()
    }
    fn get_write_pending_time(&self) -> Duration {
        self.inner.get_write_pending_time()
    }
}

impl GetProxyDigest for Judged {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        self.inner.get_proxy_digest()
    }
}

impl GetSocketDigest for Judged {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        self.inner.get_socket_digest()
    }
}

#[cfg(test)]
mod tests {
    use super::{BadChunk, Chunks, Place};

    fn judge(pieces: &[&[u8]]) -> Result<Place, BadChunk> {
        let mut chunks = Chunks::new();
        for piece in pieces {
            chunks.feed(piece)?;
        }
        Ok(chunks.0)
    }

    #[test]
    fn a_chunked_body_is_known_in_every_split_and_what_follows_is_not_judged() {
        let body = b"5;a=\"b c\"\r\nhello\r\n00A\r\n0123456789\r\n0;x\r\nX-Sum: 1\r\nempty:\r\n\r\n\n\0 anything";
        for at in 0..body.len() {
            assert_eq!(judge(&[&body[..at], &body[at..]]), Ok(Place::Done), "split at {at}");
        }
        let bytes: Vec<&[u8]> = body.chunks(1).collect();
        assert_eq!(judge(&bytes), Ok(Place::Done));
    }

    #[test]
    fn whatever_two_parsers_could_read_differently_is_refused_at_its_byte() {
        for bad in [
            "\r",
            "\n",
            " ",
            ";",
            "g",
            "0x",
            "+",
            "-",
            "1 ",
            "1\n",
            "1\t",
            "1\r1",
            "1;a\n",
            "1;\0",
            "1;a\rb",
            "1\r\nab",
            "1\r\na\n",
            "1\r\na\r\r",
            "1\r\na\r\n\r",
            "0\n",
            "0\r\n\n",
            "0\r\n ",
            "0\r\na ",
            "0\r\n:",
            "0\r\na:b\n",
            "0\r\na:\0",
            "0\r\na:b\r\n ",
            "0\r\na\r",
            "0\r\n\r\r",
            "0000000000000000",
        ] {
            let (start, last) = bad.as_bytes().split_at(bad.len() - 1);
            assert!(judge(&[start]).is_ok(), "{bad:?} without its last byte");
            assert_eq!(judge(&[bad.as_bytes()]), Err(BadChunk), "{bad:?}");
            assert_eq!(judge(&[start, last]), Err(BadChunk), "{bad:?} in two");
        }
    }
}
