//! A body in Zstandard, as Codex sends it: decoded frame by frame and block by block, so that what it becomes is bounded while it
//! becomes it and not afterwards.
//!
//! A block is 128 KiB at most, and a window that a frame wants is refused before it is made. So a bomb costs what its decoded
//! bytes may take (`limits.body_bytes`), the window, and one block.

use std::io::Read;

use bytes::Bytes;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

/// The largest window that a frame may want: what RFC 9659 allows in HTTP, and asks every decoder for.
const WINDOW_MAX_BYTES: u64 = 8 << 20;

/// How many frames a body may have. Honest ones have one, or one for each few MiB; each costs a window, however little is in it.
const FRAMES_MAX: u32 = 1024;

/// Why a body cannot be decoded. The words are ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Undecodable {
    /// It would be longer than it may.
    TooLarge,
    Malformed(&'static str),
}

/// A body on its way from compressed to plain.
pub(super) struct Decoder {
    frames: FrameDecoder,
    /// What is not decoded yet.
    source: Bytes,
    in_frame: bool,
    frames_seen: u32,
    limit_bytes: usize,
    plain: Vec<u8>,
}

impl Decoder {
    pub fn new(compressed: Bytes, limit_bytes: usize) -> Decoder {
        let mut frames = FrameDecoder::new();
        frames.set_max_window_size(WINDOW_MAX_BYTES);
        Decoder { frames, source: compressed, in_frame: false, frames_seen: 0, limit_bytes, plain: Vec::new() }
    }

    /// How many bytes are decoded so far.
    pub fn decoded_bytes(&self) -> usize {
        self.plain.len()
    }

    /// Decodes the next block. False once all is decoded.
    pub fn step(&mut self) -> Result<bool, Undecodable> {
        if !self.in_frame {
            if self.source.is_empty() {
                return Ok(false);
            }
            return self.open_frame().map(|()| true);
        }
        let mut source = &self.source[..];
        let decoded = self.frames.decode_blocks(&mut source, BlockDecodingStrategy::UptoBlocks(1));
        let ended = decoded.map_err(|e| in_words(&e))?;
        self.advance(source.len());
        self.collect()?;
        if ended {
            self.check()?;
            self.in_frame = false;
        }
        Ok(true)
    }

    /// The decoded body; complete once [`Decoder::step`] has said so.
    pub fn finish(self) -> Bytes {
        self.plain.into()
    }

    fn open_frame(&mut self) -> Result<(), Undecodable> {
        self.frames_seen += 1;
        if self.frames_seen > FRAMES_MAX {
            return Err(Undecodable::Malformed("it has more than 1024 frames"));
        }
        let mut source = &self.source[..];
        match self.frames.reset(&mut source) {
            Ok(()) => {
                self.advance(source.len());
                self.in_frame = true;
                Ok(())
            }
            // Eight bytes of head, and what somebody keeps in it.
            Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame { length, .. })) => {
                let behind = 8_usize.checked_add(length as usize).filter(|&behind| behind <= self.source.len());
                let behind = behind.ok_or(Undecodable::Malformed("it ends in the middle"))?;
                self.source = self.source.slice(behind..);
                Ok(())
            }
            Err(e) => Err(in_words(&e)),
        }
    }

    /// `left` bytes of the source are left.
    fn advance(&mut self, left: usize) {
        self.source = self.source.slice(self.source.len() - left..);
    }

    /// Takes what the window does not need any more.
    fn collect(&mut self) -> Result<(), Undecodable> {
        let more = self.frames.can_collect();
        if more > self.limit_bytes - self.plain.len() {
            return Err(Undecodable::TooLarge);
        }
        let start = self.plain.len();
        self.plain.resize(start + more, 0);
        self.frames.read_exact(&mut self.plain[start..]).map_err(|_| Undecodable::Malformed("it cannot be decoded"))
    }

    /// Of a whole frame that carries a checksum.
    fn check(&self) -> Result<(), Undecodable> {
        match self.frames.get_checksum_from_data() {
            Some(sum) if self.frames.get_calculated_checksum() != Some(sum) => {
                Err(Undecodable::Malformed("its checksum is another"))
            }
            _ => Ok(()),
        }
    }
}

/// The library's errors quote numbers of the body, so they are not passed on.
fn in_words(e: &FrameDecoderError) -> Undecodable {
    Undecodable::Malformed(match e {
        FrameDecoderError::WindowSizeTooBig { .. } => "it wants a window of more than 8 MiB",
        FrameDecoderError::DictNotProvided { .. } => "it needs a dictionary",
        _ => "it is no Zstandard, or ends in the middle",
    })
}

#[cfg(test)]
mod tests;
