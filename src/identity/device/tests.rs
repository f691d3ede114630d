use ed25519_dalek::{Signer, SigningKey};

use super::*;

/// Made by `ssh-keygen -t ed25519`, which printed the fingerprint.
const LINE: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBwHRSNviAJ/Gf9o9Iq7i4SwiFXNWG8ELj5+xDRdKidG somebody@here";
const FINGERPRINT: &str = "SHA256:rz2L0IwXB9NDnzf6Q5IAEMIS92rk/5mYNNhLMtR1ylU";

const NOW_S: i64 = 1_800_000_000;

fn device() -> (SigningKey, DeviceKey) {
    let signing = SigningKey::from_bytes(&[7; 32]);
    (signing.clone(), DeviceKey(signing.verifying_key().to_bytes()))
}

/// The value that Ollama's client would send.
fn value(signing: &SigningKey, key: &DeviceKey, message: &str) -> String {
    format!("{}:{}", STANDARD.encode(key.blob()), STANDARD.encode(signing.sign(message.as_bytes()).to_bytes()))
}

fn judge(value: &str, method: &str, path: &str, query: Option<&str>, now_s: i64) -> Result<(), &'static str> {
    let signed = Signed::read(value.as_bytes()).expect("the form of a device's signature");
    signed.holds(&signed.key()?, method, path, query, now_s)
}

#[test]
fn a_public_key_is_read_as_ssh_keygen_writes_it() {
    let key = DeviceKey::parse(LINE).unwrap();
    assert_eq!(key.fingerprint(), FINGERPRINT);
    assert_eq!(format!("{} somebody@here", key.to_line()), LINE);
    for same in [key.to_line(), format!("{LINE}\n"), LINE.replacen(' ', "  ", 1), format!("{LINE} and more")] {
        assert_eq!(DeviceKey::parse(&same), Ok(key), "{same}");
    }
    assert_eq!(format!("{key:?}"), format!("DeviceKey({FINGERPRINT})"));
}

#[test]
fn what_is_no_ed25519_key_is_refused_with_what_to_do() {
    let blob = LINE.split(' ').nth(1).unwrap();
    for (text, why) in [
        ("", DeviceKeyError::NotAKey),
        ("ssh-ed25519", DeviceKeyError::NotAKey),
        (blob, DeviceKeyError::NotAKey),
        (&format!("command=\"ls\" {LINE}"), DeviceKeyError::NotAKey),
        (&format!("ssh-ed25519 {}", &blob[..blob.len() - 4]), DeviceKeyError::NotAKey),
        (&format!("ssh-ed25519 {blob}AAAA"), DeviceKeyError::NotAKey),
        (&format!("ssh-ed25519 {blob}{}", "x".repeat(2000)), DeviceKeyError::NotAKey),
        (&LINE.replace("ssh-ed25519", "ssh-rsa"), DeviceKeyError::NotEd25519),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", DeviceKeyError::NotEd25519),
    ] {
        let refused = DeviceKey::parse(text).unwrap_err();
        assert_eq!(refused, why, "{text}");
        assert!(!refused.to_string().contains(&blob[30..]), "a key is never quoted");
    }
}

#[test]
fn keys_of_small_order_and_points_off_the_curve_are_refused() {
    let mut off_the_curve = [0_u8; 32];
    off_the_curve[0] = 2;
    let mut order_one = [0_u8; 32];
    order_one[0] = 1;
    for bytes in [[0_u8; 32], order_one, off_the_curve] {
        let line = format!("ssh-ed25519 {}", STANDARD.encode([BLOB_HEAD, &bytes].concat()));
        assert_eq!(DeviceKey::parse(&line), Err(DeviceKeyError::Weak));
    }
}

#[test]
fn what_ollamas_client_signs_holds() {
    let (signing, key) = device();
    let value = value(&signing, &key, "POST,/api/chat?ts=1800000000");
    assert_eq!(judge(&value, "POST", "/api/chat", Some("ts=1800000000"), NOW_S), Ok(()));
    let among_others = Some("a=%20&ts=1800000000&b");
    assert_eq!(judge(&value, "POST", "/api/chat", among_others, NOW_S), Ok(()));
}

#[test]
fn another_method_path_time_or_key_does_not_hold() {
    let (signing, key) = device();
    let good = value(&signing, &key, "POST,/api/chat?ts=1800000000");
    for (method, path, query) in [
        ("GET", "/api/chat", "ts=1800000000"),
        ("POST", "/api/generate", "ts=1800000000"),
        ("POST", "/api/v1/ollama/api/chat", "ts=1800000000"),
        ("POST", "/api/chat", "ts=1800000001"),
        ("POST", "/api/chat", "ts=01800000000"),
    ] {
        let refused = judge(&good, method, path, Some(query), NOW_S);
        assert_eq!(refused, Err(cause::BAD_SIGNATURE), "{method} {path} {query}");
    }
    let other = SigningKey::from_bytes(&[8; 32]);
    let forged = value(&other, &key, "POST,/api/chat?ts=1800000000");
    assert_eq!(judge(&forged, "POST", "/api/chat", Some("ts=1800000000"), NOW_S), Err(cause::BAD_SIGNATURE));
}

#[test]
fn a_time_holds_for_thirty_seconds_either_way() {
    let (signing, key) = device();
    let value = value(&signing, &key, "GET,/api/tags?ts=1800000000");
    for (now_s, verdict) in [
        (NOW_S - 31, Err(cause::STALE_TIMESTAMP)),
        (NOW_S - 30, Ok(())),
        (NOW_S + 30, Ok(())),
        (NOW_S + 31, Err(cause::STALE_TIMESTAMP)),
        (i64::MIN, Err(cause::STALE_TIMESTAMP)),
        (i64::MAX, Err(cause::STALE_TIMESTAMP)),
    ] {
        assert_eq!(judge(&value, "GET", "/api/tags", Some("ts=1800000000"), now_s), verdict, "{now_s}");
    }
}

#[test]
fn a_time_is_there_once_and_made_of_digits() {
    let (signing, key) = device();
    for query in [
        None,
        Some(""),
        Some("ts"),
        Some("ts="),
        Some("ts=-1"),
        Some("ts=+1800000000"),
        Some("ts=1800000000.0"),
        Some("ts=%31800000000"),
        Some("ts=1800000000=1"),
        Some("ts=1800000000&ts=1800000000"),
        Some("ts=1800000000&ts"),
        Some("%74s=1800000000"),
        Some("TS=1800000000"),
        Some("ts=1800000000000000000000000"),
    ] {
        let message = format!("GET,/api/tags?{}", query.unwrap_or_default());
        let value = value(&signing, &key, &message);
        assert_eq!(judge(&value, "GET", "/api/tags", query, NOW_S), Err(cause::BAD_TIMESTAMP), "{query:?}");
    }
}

#[test]
fn a_signature_of_another_length_or_spelling_is_malformed() {
    let (signing, key) = device();
    let good = value(&signing, &key, "GET,/api/tags?ts=1800000000");
    let (head, signature) = good.split_once(':').unwrap();
    for bad in ["", "AAAA", &signature[..84], &format!("{signature}AAAA"), &signature.replace("==", ""), "not base64"] {
        let value = format!("{head}:{bad}");
        assert_eq!(judge(&value, "GET", "/api/tags", Some("ts=1800000000"), NOW_S), Err(cause::MALFORMED), "{bad}");
    }
    let short_key = format!("{}:{signature}", &head[..64]);
    assert_eq!(judge(&short_key, "GET", "/api/tags", Some("ts=1800000000"), NOW_S), Err(cause::MALFORMED));
}

#[test]
fn the_malleable_twin_of_a_signature_is_refused() {
    // s + L, with L the order of the base point (RFC 8032, section 5.1): the same equation holds, the bytes differ.
    const ORDER: [u8; 32] = [
        0xed, 0xd3, 0xf5, 0x5c, 0x1a, 0x63, 0x12, 0x58, 0xd6, 0x9c, 0xf7, 0xa2, 0xde, 0xf9, 0xde, 0x14, 0, 0, 0, 0, 0,
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10,
    ];
    let (signing, key) = device();
    let mut signature = signing.sign(b"GET,/api/tags?ts=1800000000").to_bytes();
    let mut carry = 0_u16;
    for (byte, order) in signature[32..].iter_mut().zip(ORDER) {
        let sum = u16::from(*byte) + u16::from(order) + carry;
        *byte = sum.to_le_bytes()[0];
        carry = sum >> 8;
    }
    let value = format!("{}:{}", STANDARD.encode(key.blob()), STANDARD.encode(signature));
    assert_eq!(judge(&value, "GET", "/api/tags", Some("ts=1800000000"), NOW_S), Err(cause::BAD_SIGNATURE));
}

#[test]
fn only_the_time_is_taken_out_of_a_query() {
    for (query, rest) in [
        ("ts=1", None),
        ("a=1&ts=1", Some("a=1")),
        ("ts=1&a=%2F+%41&b", Some("a=%2F+%41&b")),
        ("a=1&ts=1&a=2&&c=", Some("a=1&a=2&&c=")),
        ("%74s=1&ts=1&ats=2&ts2=3", Some("%74s=1&ats=2&ts2=3")),
    ] {
        assert_eq!(without_time(query).as_deref(), rest, "{query}");
    }
}

#[test]
fn no_bytes_panic_the_reader() {
    for value in [
        &b"AAAAC3NzaC1lZDI1NTE5"[..],
        b"AAAAC3NzaC1lZDI1NTE5:",
        b"AAAAC3NzaC1lZDI1NTE5\xff:",
        b":",
        b"",
        b"AAAAC3NzaC1lZDI1NTE5:::",
    ] {
        if let Some(signed) = Signed::read(value) {
            assert_eq!(signed.key(), Err(cause::MALFORMED));
        }
    }
}
