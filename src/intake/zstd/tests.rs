use ruzstd::encoding::{CompressionLevel, compress_to_vec};

use super::*;

const LIMIT: usize = 1 << 20;

fn decode(compressed: impl Into<Vec<u8>>, limit_bytes: usize) -> Result<Vec<u8>, Undecodable> {
    let mut decoder = Decoder::new(Bytes::from(compressed.into()), limit_bytes);
    while decoder.step()? {
        assert!(decoder.decoded_bytes() <= limit_bytes);
    }
    Ok(decoder.finish().to_vec())
}

fn compress(plain: &[u8]) -> Vec<u8> {
    compress_to_vec(plain, CompressionLevel::Fastest)
}

/// A frame without a checksum whose window is `2^(10 + exponent)` bytes.
fn frame(exponent: u8, blocks: &[u8]) -> Vec<u8> {
    [&[0x28, 0xb5, 0x2f, 0xfd, 0x00, exponent << 3], blocks].concat()
}

/// A block that says `byte` so many times.
fn run(byte: u8, times: u32, is_last: bool) -> [u8; 4] {
    let head = (times << 3 | 1 << 1 | u32::from(is_last)).to_le_bytes();
    [head[0], head[1], head[2], byte]
}

/// `zstd -3 --check` of the reference implementation 1.5.
const REFERENCE: &str = "28b52ffd246f35020062440f1790b52d0614168a60693c90cdfacaf27fbeb4cc69fe73098b58078978c9f69edb93c665741ad83e4cb41a6c3da4503d7339a15c15d201ec36de91661501008240250ac99a8424";

fn reference() -> Vec<u8> {
    (0..REFERENCE.len()).step_by(2).map(|at| u8::from_str_radix(&REFERENCE[at..at + 2], 16).unwrap()).collect()
}

#[test]
fn what_the_reference_implementation_compressed_is_decoded() {
    let plain = br#"{"model":"tiny-story","messages":[{"role":"user","content":"hello hello hello hello hello hello hello hello"}]}"#;
    assert_eq!(decode(reference(), LIMIT).unwrap(), plain);
}

#[test]
fn frames_follow_each_other_and_some_are_passed_over() {
    let skipped = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
    let all = [compress(b"one, "), skipped.clone(), compress(b"two"), skipped].concat();
    assert_eq!(decode(all, LIMIT).unwrap(), b"one, two");
    assert_eq!(decode([], LIMIT).unwrap(), b"");
}

#[test]
fn a_body_of_many_blocks_survives() {
    let plain: Vec<u8> = (0..300_000u32).flat_map(|n| (n.wrapping_mul(2_654_435_761)).to_le_bytes()).collect();
    assert_eq!(decode(compress(&plain), plain.len()).unwrap(), plain);
    assert_eq!(decode(compress(&plain), plain.len() - 1), Err(Undecodable::TooLarge));
}

#[test]
fn a_bomb_goes_off_within_the_limit() {
    // 32 GB in a megabyte.
    let blocks: Vec<u8> = (0..250_000).flat_map(|_| run(b' ', 128 * 1024, false)).collect();
    assert_eq!(decode(frame(10, &blocks), LIMIT), Err(Undecodable::TooLarge));
    // Bombs side by side.
    let one = frame(10, &run(b' ', 128 * 1024, true));
    assert_eq!(decode(one.repeat(100), LIMIT), Err(Undecodable::TooLarge));
    assert_eq!(decode(one.repeat(8), LIMIT).unwrap().len(), LIMIT);
}

#[test]
fn a_window_beyond_eight_mebibytes_is_refused_before_it_is_made() {
    let blocks = run(b'x', 3, true);
    assert_eq!(decode(frame(13, &blocks), LIMIT).unwrap(), b"xxx");
    for exponent in [14, 20, 31] {
        let wants = Undecodable::Malformed("it wants a window of more than 8 MiB");
        assert_eq!(decode(frame(exponent, &blocks), LIMIT), Err(wants), "{exponent}");
    }
}

#[test]
fn frames_with_nothing_in_them_are_counted() {
    let empty = frame(13, &[1, 0, 0]);
    assert_eq!(decode(empty.repeat(1024), LIMIT).unwrap(), b"");
    assert_eq!(decode(empty.repeat(1025), LIMIT), Err(Undecodable::Malformed("it has more than 1024 frames")));
}

#[test]
fn what_is_cut_altered_or_something_else_is_an_error_and_never_a_panic() {
    let whole = reference();
    for end in 1..whole.len() {
        assert!(decode(&whole[..end], LIMIT).is_err(), "cut at {end}");
    }
    for at in 0..whole.len() {
        for bit in 0..8 {
            let mut altered = whole.clone();
            altered[at] ^= 1 << bit;
            // A bit of the head may say the same in another way; the checksum sees to the rest.
            if let Ok(plain) = decode(altered, LIMIT) {
                assert_eq!(plain, decode(whole.clone(), LIMIT).unwrap(), "byte {at}, bit {bit}");
            }
        }
    }
    for other in
        [&b"{}"[..], b"\x1f\x8b\x08\x00", b"(", b"\x28\xb5\x2f\xfd", &[0x50, 0x2a, 0x4d, 0x18, 255, 255, 255, 255]]
    {
        assert!(decode(other, LIMIT).is_err(), "{other:?}");
    }
    assert!(decode([whole, b"{}".to_vec()].concat(), LIMIT).is_err(), "something behind the last frame");
    // A dictionary that nobody has: flag 1, id 7.
    let needs = [0x28, 0xb5, 0x2f, 0xfd, 0x01, 0x50, 7, 1, 0, 0];
    assert_eq!(decode(needs, LIMIT), Err(Undecodable::Malformed("it needs a dictionary")));
}
