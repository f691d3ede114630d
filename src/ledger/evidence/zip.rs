//! A ZIP archive of a few members that are stored as they are (APPNOTE.TXT 6.3, sections 4.3.7, 4.3.12, 4.3.16).
//!
//! Not a crate, since this is all of the format that is needed: no compression (the verifier bounds a package to what a disk does not notice), no
//! member of 4 GiB, no ZIP64.

use std::io::{self, Write};

use crate::ledger::record::Moment;

/// Version 2.0 of the format, names in UTF-8, stored, and a time.
const COMMON: [u8; 6] = [20, 0, 0, 8, 0, 0];

pub(super) struct Zip<W> {
    into: W,
    written: u32,
    /// MS-DOS time and date.
    time: [u8; 4],
    directory: Vec<u8>,
    members: u16,
}

impl<W: Write> Zip<W> {
    pub(super) fn new(into: W, at: Moment) -> Zip<W> {
        Zip { into, written: 0, time: dos_time(&at.to_string()), directory: Vec::new(), members: 0 }
    }

    pub(super) fn add(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let too_large = |_| io::Error::other("a member of 4 GiB");
        let length = u32::try_from(bytes.len()).map_err(too_large)?;
        let name_length = u16::try_from(name.len()).map_err(too_large)?.to_le_bytes();
        // What the local header and the directory have in common.
        let mut about = COMMON.to_vec();
        about.extend_from_slice(&self.time);
        about.extend_from_slice(&crc32(bytes).to_le_bytes());
        about.extend_from_slice(&length.to_le_bytes());
        about.extend_from_slice(&length.to_le_bytes());
        about.extend_from_slice(&name_length);
        about.extend_from_slice(&[0, 0]);

        self.directory.extend_from_slice(b"PK\x01\x02");
        self.directory.extend_from_slice(&[20, 3]); // made on Unix
        self.directory.extend_from_slice(&about);
        self.directory.extend_from_slice(&[0; 6]); // no comment, first disk, no inner attributes
        self.directory.extend_from_slice(&(0o100_644_u32 << 16).to_le_bytes());
        self.directory.extend_from_slice(&self.written.to_le_bytes());
        self.directory.extend_from_slice(name.as_bytes());
        self.members += 1;
        self.put(b"PK\x03\x04")?;
        self.put(&about)?;
        self.put(name.as_bytes())?;
        self.put(bytes)
    }

    pub(super) fn finish(mut self) -> io::Result<()> {
        let (start, directory) = (self.written, std::mem::take(&mut self.directory));
        self.put(&directory)?;
        self.put(b"PK\x05\x06\0\0\0\0")?;
        self.put(&self.members.to_le_bytes())?;
        self.put(&self.members.to_le_bytes())?;
        self.put(&(self.written - start - 12).to_le_bytes())?;
        self.put(&start.to_le_bytes())?;
        self.put(&[0, 0])?;
        self.into.flush()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.into.write_all(bytes)?;
        let more = u32::try_from(bytes.len()).ok().and_then(|more| self.written.checked_add(more));
        self.written = more.ok_or_else(|| io::Error::other("an archive of 4 GiB"))?;
        Ok(())
    }
}

/// Of `2026-11-22T18:35:16..`, in steps of two seconds since 1980.
fn dos_time(at: &str) -> [u8; 4] {
    let number = |from: usize, to: usize| at.get(from..to).and_then(|digits| digits.parse::<u16>().ok()).unwrap_or(0);
    let time = (number(11, 13) << 11) | (number(14, 16) << 5) | (number(17, 19) / 2);
    let date = (number(0, 4).saturating_sub(1980).min(127) << 9) | (number(5, 7) << 5) | number(8, 10);
    let ([a, b], [c, d]) = (time.to_le_bytes(), date.to_le_bytes());
    [a, b, c, d]
}

/// CRC-32 of ISO 3309, as ZIP has it.
fn crc32(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut index = 0;
        while index < 256 {
            let mut value = index as u32;
            let mut bit = 0;
            while bit < 8 {
                value = if value & 1 == 1 { (value >> 1) ^ 0xedb8_8320 } else { value >> 1 };
                bit += 1;
            }
            table[index] = value;
            index += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |crc, byte| (crc >> 8) ^ TABLE[(crc as u8 ^ byte) as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_the_standard() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }
}
