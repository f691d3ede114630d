//! The attack lists on JWTs (RFC 8725 and the known collections), item by item, over the socket: each is a 401 in one wording, to the
//! byte, and none makes the proxy open a connection or a file. Hostile tokens are put together and signed by hand here, never by the
//! code under test. Keys and the rest of identity have their tests in `tests/identity.rs`.

use std::ffi::CString;
use std::io::Read;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use base64::{Engine, engine::general_purpose::STANDARD, engine::general_purpose::URL_SAFE_NO_PAD};
use behavry_ollama_proxy::identity::keys::VerificationKey;
use jsonwebtoken::{Algorithm, EncodingKey};
use serde_json::{Value, json};

use crate::client::Request;
use crate::house::{House, Plan};

macro_rules! key_file {
    ($name:literal) => {
        include_bytes!(concat!("../fixtures/keys/", $name))
    };
}

const RSA_PRIVATE: &[u8] = key_file!("rsa2048.private.pem");
const RSA_PUBLIC: &[u8] = key_file!("rsa2048.public.pem");
const RSA_PUBLIC_PKCS1: &[u8] = key_file!("rsa2048.pkcs1.public.pem");
const P256_PRIVATE: &[u8] = key_file!("p256.private.pem");
const P256_PUBLIC: &[u8] = key_file!("p256.public.pem");
const ED25519_PRIVATE: &[u8] = key_file!("ed25519.private.pem");
const ED25519_PUBLIC: &[u8] = key_file!("ed25519.public.pem");

/// The order of P-256, and of Ed25519's base point (little endian).
const P256_ORDER: &str = "ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551";
const ED25519_ORDER: [u8; 32] = [
    0xed, 0xd3, 0xf5, 0x5c, 0x1a, 0x63, 0x12, 0x58, 0xd6, 0x9c, 0xf7, 0xa2, 0xde, 0xf9, 0xde, 0x14, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10,
];

/// A token that must not pass: its name in the lists, the cause that the audit gives, and itself.
type Attack = (String, &'static str, String);

fn attack(name: impl Into<String>, cause: &'static str, token: impl Into<String>) -> Attack {
    (name.into(), cause, token.into())
}

// ---- tokens by hand

fn b64(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

fn sign(key: &EncodingKey, algorithm: Algorithm, message: &str) -> Vec<u8> {
    let signature = jsonwebtoken::crypto::sign(message.as_bytes(), key, algorithm).expect("signed");
    URL_SAFE_NO_PAD.decode(signature).expect("base64url")
}

fn es256_sign(message: &str) -> Vec<u8> {
    sign(&EncodingKey::from_ec_pem(P256_PRIVATE).expect("a key"), Algorithm::ES256, message)
}

fn rs256_sign(message: &str) -> Vec<u8> {
    sign(&EncodingKey::from_rsa_pem(RSA_PRIVATE).expect("a key"), Algorithm::RS256, message)
}

fn eddsa_sign(message: &str) -> Vec<u8> {
    sign(&EncodingKey::from_ed_pem(ED25519_PRIVATE).expect("a key"), Algorithm::EdDSA, message)
}

fn message(header: impl AsRef<[u8]>, claims: impl AsRef<[u8]>) -> String {
    format!("{}.{}", b64(header), b64(claims))
}

fn with_signature(message: &str, signature: impl AsRef<[u8]>) -> String {
    format!("{message}.{}", b64(signature))
}

/// Signed well, whatever stands in it.
fn es256(header: impl AsRef<[u8]>, claims: impl AsRef<[u8]>) -> String {
    let message = message(header, claims);
    with_signature(&message, es256_sign(&message))
}

const ES256: &str = r#"{"alg":"ES256","typ":"JWT"}"#;

fn now_s() -> i64 {
    std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_secs() as i64
}

fn claims() -> Value {
    json!({ "sub": "agent-1", "jti": "session-1", "iss": "behavry", "iat": now_s(), "exp": now_s() + 3600,
            "roles": ["internal"], "permissions": ["web:read", "web:write"] })
}

/// Good claims but one, which is replaced by a text of JSON, or left out.
fn claims_but(name: &str, value: Option<&str>) -> String {
    let mut claims = claims();
    let members = claims.as_object_mut().expect("an object");
    members.remove(name);
    let rest = claims.to_string();
    match value {
        Some(value) => rest.replacen('{', &format!("{{\"{name}\":{value},"), 1),
        None => rest,
    }
}

fn der_of(pem: &[u8]) -> Vec<u8> {
    let text = std::str::from_utf8(pem).expect("text");
    let body: String = text.lines().filter(|line| !line.starts_with("-----")).collect();
    STANDARD.decode(body).expect("base64")
}

fn hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).expect("hex")).collect()
}

// ---- the house, and what every attack must come to

/// A proxy that trusts an RSA, a P-256 and an Ed25519 key under the names r, e and d.
async fn house() -> House {
    let jwk = |pem: &[u8], kid: &str| {
        VerificationKey::from_pem(pem).expect("a key").with_kid(kid.to_owned()).public_jwk().expect("public")
    };
    let keys = json!({ "keys": [jwk(RSA_PUBLIC, "r"), jwk(P256_PUBLIC, "e"), jwk(ED25519_PUBLIC, "d")] });
    let file = std::env::temp_dir().join(format!(
        "behavry-attacks-{}-{:?}.json",
        std::process::id(),
        std::thread::current().id()
    ));
    std::fs::write(&file, keys.to_string()).expect("written");
    let house = House::with(Plan {
        config: format!("[audit]\nrefusals_per_second = 100000\n[identity]\njwks_file = \"{}\"\n", file.display()),
        no_key: true,
        ..Plan::default()
    })
    .await;
    std::fs::remove_file(file).expect("read by now");
    house
}

fn chat(token: &str) -> Request {
    let ask = json!({ "model": "tiny-story", "stream": false, "messages": [{ "role": "user", "content": "hi" }] });
    Request::post("/api/chat", ask).bearer(token)
}

/// Each is refused in the one wording, only the audit knows why, and a good token passes before and after.
async fn hold(house: &House, attacks: Vec<Attack>) {
    let good = es256(ES256, claims().to_string());
    assert_eq!(house.send(chat(&good)).await.status, 200, "the good one passes");
    let connections = house.simulator.connections();
    let expected = house.send(chat("garbage")).await.without_id_and_date();
    assert!(expected.1.contains("The token is not valid or has expired; fetch a new token"), "{}", expected.1);
    for (n, (name, cause, token)) in attacks.iter().enumerate() {
        let id = format!("attack-{n}");
        let reply = house.send(chat(token).id(&id)).await;
        assert_eq!(reply.status, 401, "{name}");
        assert_eq!(reply.without_id_and_date(), expected, "{name}: one wording, to the byte");
        let last = house.final_of(&id).await;
        assert_eq!(last["error"], *cause, "{name}");
        assert_eq!((&last["agent_id"], &last["session_id"]), (&Value::Null, &Value::Null), "{name}: nobody is named");
    }
    assert_eq!(house.simulator.connections(), connections, "a refused request opens no connection to a backend");
    assert_eq!(house.send(chat(&good)).await.status, 200, "the good one still passes");
}

// ---- the algorithm

#[tokio::test]
async fn no_algorithm_but_the_keys_own() {
    let claims = claims().to_string();
    let mut attacks = Vec::new();
    for alg in ["none", "None", "NONE", "nOnE", "nonE", " none", "none\\u0000"] {
        let unsigned = message(format!(r#"{{"alg":"{alg}","typ":"JWT"}}"#), &claims);
        attacks.push(attack(format!("alg {alg:?}, empty signature"), "wrong_algorithm", format!("{unsigned}.")));
        attacks.push(attack(format!("alg {alg:?}, no third segment"), "malformed", &*unsigned));
        attacks.push(attack(
            format!("alg {alg:?}, a good signature"),
            "wrong_algorithm",
            with_signature(&unsigned, es256_sign(&unsigned)),
        ));
    }
    for header in [
        r#"{"typ":"JWT"}"#,
        r#"{"alg":null}"#,
        r#"{"alg":""}"#,
        r#"{"alg":["ES256"]}"#,
        r#"{"alg":{"alg":"ES256"}}"#,
        r#"{"alg":256}"#,
        r#"{"alg":true}"#,
        r#"{"ALG":"ES256"}"#,
        r#"{"alg":"es256"}"#,
        r#"{"alg":"Es256"}"#,
        r#"{"alg":"ES256 "}"#,
        r#"{"alg":"ES256\u0000"}"#,
        r#"{"alg":"ES256\n"}"#,
        "{\"alg\":\"\u{415}S256\"}",         // a Cyrillic letter that looks like E
        "{\"alg\":\"\u{ff25}\u{ff33}256\"}", // full width
        "{\"alg\":\"ES\u{200b}256\"}",       // a space of no width
        r#"{"alg":"ES384"}"#,
        r#"{"alg":"ES512"}"#,
        r#"{"alg":"ES256K"}"#,
        r#"{"alg":"RS384"}"#,
        r#"{"alg":"PS256"}"#,
        r#"{"alg":"Ed25519"}"#,
        r#"{"alg":"HS384"}"#,
        r#"{"alg":"HS512"}"#,
        r#"{"alg":"RSA-OAEP"}"#,
        r#"{"alg":"dir"}"#,
        r#"{"alg":"PBES2-HS256+A128KW","p2c":2147483647,"p2s":"AAAA"}"#,
    ] {
        attacks.push(attack(header, "wrong_algorithm", es256(header, &claims)));
    }
    attacks.push(attack(
        "RS256 in the header, an ES256 signature",
        "bad_signature",
        es256(r#"{"alg":"RS256"}"#, &claims),
    ));
    attacks.push(attack(
        "ES256 in the header, named as the RSA key",
        "wrong_algorithm",
        es256(r#"{"alg":"ES256","kid":"r"}"#, &claims),
    ));
    hold(&house().await, attacks).await;
}

#[tokio::test]
async fn a_public_key_is_no_shared_secret_in_any_form() {
    let jwk = VerificationKey::from_pem(RSA_PUBLIC).expect("a key").public_jwk().expect("public");
    let modulus = jwk["n"].as_str().expect("text").to_owned();
    let (rsa, p256, ed25519) = (der_of(RSA_PUBLIC), der_of(P256_PUBLIC), der_of(ED25519_PUBLIC));
    let forms: Vec<(&str, Vec<u8>)> = vec![
        ("PEM", RSA_PUBLIC.to_vec()),
        ("PEM without its last newline", RSA_PUBLIC.trim_ascii_end().to_vec()),
        ("PEM with CRLF", String::from_utf8_lossy(RSA_PUBLIC).replace('\n', "\r\n").into_bytes()),
        ("PEM on one line", String::from_utf8_lossy(RSA_PUBLIC).replace('\n', "").into_bytes()),
        ("PEM of PKCS#1", RSA_PUBLIC_PKCS1.to_vec()),
        ("DER", rsa.clone()),
        ("DER in base64", STANDARD.encode(&rsa).into_bytes()),
        ("DER of PKCS#1", der_of(RSA_PUBLIC_PKCS1)),
        ("modulus", URL_SAFE_NO_PAD.decode(&modulus).expect("base64url")),
        ("modulus in base64url", modulus.into_bytes()),
        ("JWK", jwk.to_string().into_bytes()),
        ("PEM of P-256", P256_PUBLIC.to_vec()),
        ("point of P-256", p256[p256.len() - 65..].to_vec()),
        ("PEM of Ed25519", ED25519_PUBLIC.to_vec()),
        ("point of Ed25519", ed25519[ed25519.len() - 32..].to_vec()),
        ("nothing", Vec::new()),
    ];
    let mut attacks = Vec::new();
    for (form, secret) in forms {
        let key = EncodingKey::from_secret(&secret);
        for (header, cause) in [
            (r#"{"alg":"HS256","typ":"JWT"}"#, "wrong_algorithm"),
            (r#"{"alg":"HS256","kid":"r"}"#, "wrong_algorithm"),
            (r#"{"alg":"RS256","kid":"r"}"#, "bad_signature"),
            (r#"{"alg":"EdDSA"}"#, "bad_signature"),
        ] {
            let message = message(header, claims().to_string());
            let signature = sign(&key, Algorithm::HS256, &message);
            attacks.push(attack(format!("{form} as the secret, {header}"), cause, with_signature(&message, signature)));
        }
    }
    hold(&house().await, attacks).await;
}

// ---- which key

#[tokio::test]
async fn nothing_in_a_token_chooses_a_key_or_opens_a_connection_or_a_file() {
    let house = house().await;
    let dir = tempfile::tempdir().expect("a folder");
    let bait = dir.path().join("bait");
    std::fs::write(&bait, P256_PUBLIC).expect("written");
    let watch = Watch::over(dir.path());
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.set_nonblocking(true).expect("a socket");
    let port = listener.local_addr().expect("bound").port();
    let (path, up) = (bait.display().to_string(), "../".repeat(24));
    // Both traps work: what opens the file or the port would be seen.
    drop(std::fs::File::open(&bait).expect("it is there"));
    assert!(watch.saw_anything(), "the watch sees who opens the file");
    drop(std::net::TcpStream::connect(("127.0.0.1", port)).expect("it listens"));
    listener.accept().expect("seen");

    // The attacker's own key, well signed, and everything that could lead there.
    let theirs = p256::ecdsa::SigningKey::from_slice(&[7; 32]).expect("a key");
    let point = theirs.verifying_key().to_encoded_point(false);
    let jwk = json!({ "kty": "EC", "crv": "P-256", "x": b64(point.x().expect("x")), "y": b64(point.y().expect("y")) });
    let forged = |header: &Value| {
        use p256::ecdsa::signature::Signer as _;
        let message = message(header.to_string(), claims().to_string());
        let signature: p256::ecdsa::Signature = theirs.sign(message.as_bytes());
        with_signature(&message, signature.to_bytes())
    };
    let mut attacks = Vec::new();
    let urls = [
        format!("http://127.0.0.1:{port}/jwks.json"),
        format!("http://localhost:{port}/"),
        format!("HTTP://user@127.0.0.1:{port}"),
        format!("file://{path}"),
        path.clone(),
    ];
    for member in ["jku", "x5u"] {
        for url in &urls {
            let header = json!({ "alg": "ES256", member: url });
            attacks.push(attack(format!("{member} {url}"), "unsupported_header", forged(&header)));
            attacks.push(attack(
                format!("{member} {url}, signed by us"),
                "unsupported_header",
                es256(header.to_string(), claims().to_string()),
            ));
        }
    }
    for (member, value) in [
        ("jwk", jwk.clone()),
        ("jwk", json!({ "kty": "oct", "k": "AAAA" })),
        ("jwk", Value::Null),
        ("x5c", json!([STANDARD.encode(der_of(P256_PUBLIC))])),
        ("x5c", json!([])),
    ] {
        attacks.push(attack(
            format!("embedded {member} {value}"),
            "unsupported_header",
            forged(&json!({ "alg": "ES256", member: value })),
        ));
    }
    let paths =
        [path.clone(), format!("{up}{path}"), format!("file://{path}"), format!("{path}\0"), format!("| cat {path}")];
    for kid in urls.iter().chain(&paths) {
        attacks.push(attack(
            format!("kid {kid:?}"),
            "unknown_key",
            es256(json!({ "alg": "ES256", "kid": kid }).to_string(), claims().to_string()),
        ));
    }
    for kid in [
        json!("../../../../../../dev/null"),
        json!("/etc/passwd"),
        json!("/proc/self/environ"),
        json!("e\0"),
        json!("e\0.pem"),
        json!("E"),
        json!(" e"),
        json!("e "),
        json!("\u{435}"),
        json!("x' UNION SELECT 'e"),
        json!("e' OR '1'='1"),
        json!("$(id)"),
        json!("${jndi:ldap://127.0.0.1/e}"),
        json!(""),
        json!("k".repeat(4000)),
        json!(null),
        json!(0),
        json!(["e"]),
        json!({ "kid": "e" }),
        json!(true),
    ] {
        attacks.push(attack(
            format!("kid {kid}"),
            "unknown_key",
            es256(json!({ "alg": "ES256", "kid": kid }).to_string(), claims().to_string()),
        ));
    }
    attacks.push(attack("the attacker's key", "bad_signature", forged(&json!({ "alg": "ES256" }))));
    attacks.push(attack(
        "the attacker's key under our key's name",
        "bad_signature",
        forged(&json!({ "alg": "ES256", "kid": "e" })),
    ));
    hold(&house, attacks).await;
    assert!(!watch.saw_anything(), "a file was opened");
    let nobody = listener.accept().map(drop).map_err(|e| e.kind());
    assert_eq!(nobody, Err(std::io::ErrorKind::WouldBlock), "a connection was opened");
}

/// The kernel's word (inotify) on whether anybody opened something in a folder.
struct Watch {
    events: std::fs::File,
}

impl Watch {
    fn over(folder: &Path) -> Watch {
        let path = CString::new(folder.as_os_str().as_bytes()).expect("no NUL");
        // SAFETY: the calls take no memory of ours but the path, which outlives them; the descriptor is owned once.
        let events = unsafe {
            let fd = libc::inotify_init1(libc::IN_NONBLOCK | libc::IN_CLOEXEC);
            assert!(fd >= 0, "inotify");
            assert!(libc::inotify_add_watch(fd, path.as_ptr(), libc::IN_OPEN | libc::IN_ACCESS) >= 0, "watched");
            OwnedFd::from_raw_fd(fd)
        };
        Watch { events: events.into() }
    }

    /// Since the last time it was asked. Events of earlier calls in this machine are there at once.
    fn saw_anything(&self) -> bool {
        let mut buffer = [0; 4096];
        let mut seen = false;
        while (&self.events).read(&mut buffer).is_ok_and(|bytes| bytes > 0) {
            seen = true;
        }
        seen
    }
}

// ---- the header's other members

#[tokio::test]
async fn no_header_that_gives_a_token_another_meaning() {
    let claims = claims().to_string();
    let mut attacks = Vec::new();
    for header in [
        r#"{"alg":"ES256","crit":["exp"]}"#,
        r#"{"alg":"ES256","crit":["b64"],"b64":false}"#,
        r#"{"alg":"ES256","crit":["http://example.invalid/x"],"http://example.invalid/x":1}"#,
        r#"{"alg":"ES256","crit":[]}"#,
        r#"{"alg":"ES256","crit":null}"#,
        r#"{"alg":"ES256","crit":"exp"}"#,
        r#"{"alg":"ES256","b64":false}"#,
        r#"{"alg":"ES256","b64":true}"#,
        r#"{"alg":"ES256","enc":"A128GCM"}"#,
        r#"{"alg":"ES256","zip":"DEF"}"#,
        r#"{"alg":"ES256","cty":"JWT"}"#,
        r#"{"alg":"ES256","typ":"JOSE"}"#,
        r#"{"alg":"ES256","typ":"dpop+jwt"}"#,
        r#"{"alg":"ES256","typ":"logout+jwt"}"#,
        r#"{"alg":"ES256","typ":""}"#,
        r#"{"alg":"ES256","typ":null}"#,
        r#"{"alg":"ES256","typ":["JWT"]}"#,
    ] {
        attacks.push(attack(header, "unsupported_header", es256(header, &claims)));
    }
    let inner = es256(ES256, &claims);
    attacks.push(attack(
        "a token inside a token",
        "unsupported_header",
        es256(r#"{"alg":"ES256","cty":"JWT"}"#, &inner),
    ));
    attacks.push(attack("a token inside a token that does not say so", "malformed", es256(ES256, &inner)));
    for header in [
        r#"{"alg":"none","alg":"ES256"}"#,
        r#"{"alg":"ES256","alg":"none"}"#,
        r#"{"alg":"ES256","alg":"ES256"}"#,
        r#"{"alg":"none","\u0061lg":"ES256"}"#,
        r#"{"alg":"ES256","kid":"e","kid":"r"}"#,
        r#"{"alg":"ES256","x":{"y":1,"y":2}}"#,
    ] {
        attacks.push(attack(header, "duplicate_member", es256(header, &claims)));
    }
    hold(&house().await, attacks).await;
}

// ---- the encoding

#[tokio::test]
async fn one_spelling_for_each_token() {
    let text = claims().to_string();
    let good = es256(ES256, &text);
    let parts: Vec<&str> = good.split('.').collect();
    let (header, payload, signature) = (parts[0], parts[1], parts[2]);
    // 64 bytes leave four bits of the last character unused.
    let alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let (stem, last) = signature.split_at(signature.len() - 1);
    let place = alphabet.find(last).expect("base64url");
    let twin = &alphabet[place + 1..place + 2];
    let mut attacks = vec![
        attack("a signature's unused bits", "malformed", format!("{header}.{payload}.{stem}{twin}")),
        attack("padding at the end", "malformed", format!("{good}==")),
        attack("half a padding", "malformed", format!("{good}=")),
        attack("the alphabet of base64", "malformed", format!("{header}.{payload}.{}", STANDARD.encode([0xfb_u8; 64]))),
        attack("four segments", "malformed", format!("{good}.")),
        attack("five segments, an encrypted token", "malformed", format!("{header}..AAAA.AAAA.AAAA")),
        attack("two segments", "malformed", format!("{header}.{payload}")),
        attack("one segment", "malformed", header),
        attack("only dots", "malformed", ".."),
        attack("an empty header", "malformed", format!(".{payload}.{signature}")),
        attack("empty claims", "bad_signature", format!("{header}..{signature}")),
        attack("no signature", "bad_signature", format!("{header}.{payload}.")),
        attack("a dot in front", "malformed", format!(".{good}")),
        attack(
            "the JSON serialisation",
            "malformed",
            json!({ "payload": payload, "protected": header, "signature": signature }).to_string(),
        ),
        attack("in quotes", "malformed", format!("\"{good}\"")),
        attack("two tokens", "malformed", format!("{good},{good}")),
        attack("two schemes", "malformed", format!("Bearer {good}")),
    ];
    for odd in [" ", "\t", "%2e", "%20", "\\n", "+", "/", "=", "\u{e9}", "\u{feff}", "\u{200b}"] {
        for (at, token) in [
            ("header", format!("{header}{odd}.{payload}.{signature}")),
            ("claims", format!("{header}.{odd}{payload}.{signature}")),
            ("signature", format!("{header}.{payload}.{}{odd}{}", &signature[..10], &signature[10..])),
        ] {
            attacks.push(attack(
                format!("{odd:?} in the {at}"),
                if at == "claims" { "bad_signature" } else { "malformed" },
                token,
            ));
        }
    }
    for (name, header) in [
        ("a byte order mark", "\u{feff}{\"alg\":\"ES256\"}".as_bytes().to_vec()),
        ("UTF-16", "{\"alg\":\"ES256\"}".encode_utf16().flat_map(u16::to_le_bytes).collect()),
        ("no UTF-8", b"{\"alg\":\"ES256\",\"x\":\"\xff\"}".to_vec()),
        ("an overlong form", b"{\"alg\":\"ES256\",\"x\":\"\xc0\xae\"}".to_vec()),
        ("NUL behind it", b"{\"alg\":\"ES256\"}\0".to_vec()),
        ("two objects", b"{\"alg\":\"ES256\"}{}".to_vec()),
        ("an array", b"[{\"alg\":\"ES256\"}]".to_vec()),
        ("a string", b"\"ES256\"".to_vec()),
        ("null", b"null".to_vec()),
        ("nothing", Vec::new()),
        ("a comma at the end", b"{\"alg\":\"ES256\",}".to_vec()),
        ("a comment", b"{\"alg\":\"ES256\"/**/}".to_vec()),
        ("single quotes", b"{'alg':'ES256'}".to_vec()),
        ("depth", format!("{{\"alg\":\"ES256\",\"x\":{}{}}}", "[".repeat(1500), "]".repeat(1500)).into_bytes()),
    ] {
        attacks.push(attack(format!("{name} in the header"), "malformed", es256(&header, &text)));
        let claims =
            String::from_utf8_lossy(&header).replace("{\"alg\"", &format!("{},\"alg\"", text.trim_end_matches('}')));
        if name == "a byte order mark" || name == "NUL behind it" || name == "two objects" || name == "depth" {
            attacks.push(attack(format!("{name} in the claims"), "malformed", es256(ES256, claims)));
        }
    }
    attacks.push(attack("claims that are no UTF-8", "malformed", es256(ES256, b"{\"sub\":\"\xff\"}")));
    for claims in ["", "null", "[]", "1", "\"\"", "{}{}", "{\"exp\":NaN}", "{\"exp\":Infinity}", "{\"exp\":0x10}"] {
        attacks.push(attack(format!("claims {claims:?}"), "malformed", es256(ES256, claims)));
    }
    let members = |count: u32| {
        let many: String = (0..count).map(|n| format!("\"m{n}\":0,")).collect();
        es256(ES256, text.replacen('{', &format!("{{{many}"), 1))
    };
    attacks.push(attack("1,000 members", "oversized", members(1_000)));
    attacks.push(attack("a byte more than a token may have", "oversized", "a".repeat(8193)));
    attacks.push(attack("as long as a token may be", "malformed", "a".repeat(8192)));
    for end in [1, header.len() - 1, header.len(), header.len() + 1, good.len() - signature.len() - 1] {
        attacks.push(attack(format!("cut after {end} bytes"), "malformed", &good[..end]));
    }
    for cut in [2, 44, 84] {
        attacks.push(attack(format!("{cut} characters short"), "bad_signature", b64_cut(&good, cut)));
    }
    let house = house().await;
    hold(&house, attacks).await;
    let connections = house.simulator.connections();
    let reply = house.send(chat(&members(10_000))).await;
    assert_eq!(
        (reply.status, reply.code()),
        (431, "head_too_large".to_owned()),
        "10,000 members do not fit into a head"
    );
    assert_eq!(house.simulator.connections(), connections);
}

/// A token whose signature has lost some bytes, in canonical base64url.
fn b64_cut(token: &str, characters: usize) -> String {
    let (message, signature) = token.rsplit_once('.').expect("three segments");
    let bytes = URL_SAFE_NO_PAD.decode(signature).expect("base64url");
    with_signature(message, &bytes[..bytes.len() - characters * 3 / 4])
}

// ---- the signature

#[tokio::test]
async fn no_signature_but_the_keys_own() {
    let text = claims().to_string();
    let message_es = message(ES256, &text);
    let signature_es = es256_sign(&message_es);
    let order = hex(P256_ORDER);
    let one: Vec<u8> = [vec![0; 31], vec![1]].concat();
    let zero = vec![0_u8; 32];
    let mut attacks = Vec::new();
    for (name, signature) in [
        ("r = s = 0, the psychic signature", [&zero[..], &zero].concat()),
        ("r = 0", [&zero[..], &one].concat()),
        ("s = 0", [&one[..], &zero].concat()),
        ("r = s = 1", [&one[..], &one].concat()),
        ("r = s = n", [&order[..], &order].concat()),
        ("r = n", [&order[..], &signature_es[32..]].concat()),
        ("s = n", [&signature_es[..32], &order].concat()),
        ("all ones", vec![0xff; 64]),
        ("r and s exchanged", [&signature_es[32..], &signature_es[..32]].concat()),
        ("DER", p256::ecdsa::Signature::from_slice(&signature_es).expect("good").to_der().as_bytes().to_vec()),
        ("a zero in front", [&[0][..], &signature_es].concat()),
        ("a zero behind", [&signature_es[..], &[0]].concat()),
        ("twice", [&signature_es[..], &signature_es].concat()),
        ("half", signature_es[..32].to_vec()),
        ("of the claims alone", es256_sign(&b64(&text))),
        ("of another token", es256_sign(&message(ES256, "{}"))),
        ("empty", Vec::new()),
    ] {
        attacks.push(attack(format!("ES256: {name}"), "bad_signature", with_signature(&message_es, signature)));
    }
    let message_rs = message(r#"{"alg":"RS256"}"#, &text);
    let signature_rs = rs256_sign(&message_rs);
    for (name, signature) in [
        ("zeros", vec![0; 256]),
        ("one", [vec![0; 255], vec![1]].concat()),
        ("all ones, more than the modulus", vec![0xff; 256]),
        ("a zero in front", [&[0][..], &signature_rs].concat()),
        ("many zeros in front", [&[0; 256][..], &signature_rs].concat()),
        ("a zero behind", [&signature_rs[..], &[0]].concat()),
        ("a byte short", signature_rs[..255].to_vec()),
        ("without its first byte", signature_rs[1..].to_vec()),
        ("twice", [&signature_rs[..], &signature_rs].concat()),
        ("of another token", rs256_sign(&message_es)),
        ("the padded hash itself, as for e = 1", [&[0, 1][..], &[0xff; 202], &[0; 52]].concat()),
        ("empty", Vec::new()),
    ] {
        attacks.push(attack(format!("RS256: {name}"), "bad_signature", with_signature(&message_rs, signature)));
    }
    let message_ed = message(r#"{"alg":"EdDSA"}"#, &text);
    let signature_ed = eddsa_sign(&message_ed);
    let mut carry = 0_u16;
    let beyond: Vec<u8> = signature_ed[32..]
        .iter()
        .zip(ED25519_ORDER)
        .map(|(a, b)| {
            let sum = u16::from(*a) + u16::from(b) + carry;
            carry = sum >> 8;
            sum as u8 // the low byte; the high one is carried
        })
        .collect();
    let identity = [&[1][..], &[0; 31]].concat();
    for (name, signature) in [
        ("S beyond the order, the other spelling", [&signature_ed[..32], &beyond].concat()),
        ("R of small order, S = 0", [&identity[..], &zero].concat()),
        ("zeros", vec![0; 64]),
        ("all ones", vec![0xff; 64]),
        ("a byte behind", [&signature_ed[..], &[0]].concat()),
        ("a byte short", signature_ed[..63].to_vec()),
        ("of another token", eddsa_sign(&message_es)),
        ("empty", Vec::new()),
    ] {
        attacks.push(attack(format!("EdDSA: {name}"), "bad_signature", with_signature(&message_ed, signature)));
    }
    let promoted = claims_but("permissions", Some(r#"["web:read","web:write","ollama:admin"]"#));
    attacks.push(attack("claims changed", "bad_signature", with_signature(&message(ES256, promoted), &signature_es)));
    attacks.push(attack(
        "header changed",
        "bad_signature",
        with_signature(&message(r#"{"alg":"ES256"}"#, &text), &signature_es),
    ));
    let house = house().await;
    hold(&house, attacks).await;
    for good in [with_signature(&message_rs, &signature_rs), with_signature(&message_ed, &signature_ed)] {
        assert_eq!(house.send(chat(&good)).await.status, 200, "what was bent was good before");
    }
}

/// (r, s) and (r, n - s) are both signatures of the same token. OpenSSL, Go and PyJWT make either by chance, so refusing one would refuse
/// half of all honest tokens; nothing here goes by a signature's bytes but the cache, which is bounded.
#[tokio::test]
async fn both_ecdsa_signatures_of_a_token_pass() {
    let house = house().await;
    let message = message(ES256, claims().to_string());
    let one = p256::ecdsa::Signature::from_slice(&es256_sign(&message)).expect("good");
    let s = one.s();
    let other = p256::ecdsa::Signature::from_scalars(one.r().to_bytes(), (-*s).to_bytes()).expect("good");
    assert_ne!(one, other);
    for signature in [one, other] {
        assert_eq!(house.send(chat(&with_signature(&message, signature.to_bytes()))).await.status, 200);
    }
}

// ---- the claims

#[tokio::test]
async fn no_claim_that_is_missing_odd_or_anothers() {
    let mut attacks = Vec::new();
    let odd = |attacks: &mut Vec<Attack>, name: &str, cause: &'static str, values: &[&str]| {
        for value in values {
            attacks.push(attack(format!("{name}: {value}"), cause, es256(ES256, claims_but(name, Some(value)))));
        }
    };
    for name in ["exp", "iss"] {
        attacks.push(attack(format!("no {name}"), "missing_claim", es256(ES256, claims_but(name, None))));
    }
    for name in ["sub", "jti"] {
        attacks.push(attack(
            format!("no {name}, an administrator's token"),
            "not_an_agent",
            es256(ES256, claims_but(name, None)),
        ));
        odd(&mut attacks, name, "not_an_agent", &["\"\"", "null"]);
        odd(
            &mut attacks,
            name,
            "bad_claim",
            &["1", "1.5", "true", "[\"agent-1\"]", "{}", "\"a\\u0000\"", "\"a\\nb\"", "\"\\u001b[2J\""],
        );
        let long = format!("\"{}\"", "a".repeat(257));
        odd(&mut attacks, name, "bad_claim", &[&long]);
    }
    let (soon, past) = ((now_s() + 60).to_string(), (now_s() - 40).to_string());
    odd(
        &mut attacks,
        "exp",
        "bad_claim",
        &[
            "null",
            "true",
            "\"\"",
            &format!("\"{soon}\""),
            "\"never\"",
            &format!("[{soon}]"),
            "{}",
            &format!("{soon}.5"),
            "1.9e9",
            "1e18",
            "18446744073709551615",
            "99999999999999999999999999",
            "-99999999999999999999999999",
        ],
    );
    odd(&mut attacks, "exp", "expired", &["0", "-1", "-9223372036854775808", &past, "1"]);
    odd(
        &mut attacks,
        "exp",
        "malformed",
        &["1e400", "-1e400", "01900000000", "+1900000000", "0x7fffffff", "1_900_000_000"],
    );
    let later = (now_s() + 3000).to_string();
    odd(&mut attacks, "nbf", "not_yet_valid", &[&later, "9223372036854775807"]);
    odd(&mut attacks, "nbf", "bad_claim", &["null", "\"0\"", "0.5", "[]", "{}", "true", "1e3"]);
    odd(&mut attacks, "iat", "bad_claim", &["null", "\"0\"", "[]", "{}", "true"]);
    odd(
        &mut attacks,
        "iss",
        "wrong_issuer",
        &[
            "\"\"",
            "null",
            "1",
            "[\"behavry\"]",
            "{\"behavry\":1}",
            "\"Behavry\"",
            "\"behavry \"",
            "\"behavry\\u0000\"",
            "\"behavry/\"",
            "\"beh\\u0430vry\"",
            "\"behavry\\u200b\"",
            "\"\\ufeffbehavry\"",
            "\"https://behavry\"",
            "true",
        ],
    );
    // This proxy has no audience, so that a token for somebody else is not for it.
    odd(
        &mut attacks,
        "aud",
        "wrong_audience",
        &["\"other\"", "[\"other\"]", "[]", "null", "\"\"", "1", "{}", "[null]", "true"],
    );
    odd(
        &mut attacks,
        "roles",
        "bad_claim",
        &["\"internal\"", "null", "[1]", "[null]", "[\"\"]", "[[\"internal\"]]", "{\"internal\":true}", "1"],
    );
    odd(&mut attacks, "roles", "too_many_roles", &[&json!(vec!["r"; 9]).to_string()]);
    odd(
        &mut attacks,
        "permissions",
        "bad_claim",
        &["\"web:read\"", "\"web:read web:write\"", "null", "[1]", "{}", &json!(vec!["p"; 65]).to_string()],
    );
    let nobody = claims_but("roles", None).replace("\"permissions\"", "\"scope\"");
    attacks.push(attack("neither roles nor permissions", "not_an_agent", es256(ES256, nobody)));
    for (name, first) in
        [("sub", "\"root\""), ("exp", "9999999999"), ("iss", "\"behavry\""), ("permissions", "[\"ollama:admin\"]")]
    {
        let text = claims().to_string();
        let twice = text.replacen('{', &format!("{{\"{name}\":{first},"), 1);
        attacks.push(attack(format!("{name} twice"), "duplicate_member", es256(ES256, twice)));
        let behind = format!("{},\"{name}\":{first}}}", text.trim_end_matches('}'));
        attacks.push(attack(format!("{name} twice, the other behind"), "duplicate_member", es256(ES256, behind)));
        let escaped = text.replacen('{', &format!("{{\"\\u{:04x}{}\":{first},", name.as_bytes()[0], &name[1..]), 1);
        attacks.push(attack(format!("{name} twice, once escaped"), "duplicate_member", es256(ES256, escaped)));
    }
    attacks.push(attack(
        "a member twice further down",
        "duplicate_member",
        es256(ES256, claims_but("x", Some("{\"a\":1,\"a\":2}"))),
    ));
    attacks.push(attack(
        "good claims one level down",
        "missing_claim",
        es256(ES256, json!({ "claims": claims() }).to_string()),
    ));
    hold(&house().await, attacks).await;
}

#[tokio::test]
async fn an_audience_that_is_configured_is_required_in_one_of_its_two_forms() {
    let house = House::with(Plan {
        config: "[audit]\nrefusals_per_second = 100000\n[identity]\naudience = \"ollama\"\n".to_owned(),
        no_key: true,
        env: vec![("BEHAVRY_JWT_PUBLIC_KEY".to_owned(), String::from_utf8_lossy(P256_PUBLIC).into_owned())],
        ..Plan::default()
    })
    .await;
    let bad = [
        "null",
        "\"\"",
        "\"Ollama\"",
        "\"ollama \"",
        "[]",
        "[\"other\"]",
        "[\"ollama\",1]",
        "[[\"ollama\"]]",
        "{\"ollama\":1}",
        "1",
        "\"ollama other\"",
    ];
    let bad = bad.iter().map(|value| (format!("aud {value}"), es256(ES256, claims_but("aud", Some(value)))));
    let missing = ("no aud".to_owned(), es256(ES256, claims().to_string()));
    for (n, (name, token)) in bad.chain([missing]).enumerate() {
        let id = format!("aud-{n}");
        assert_eq!(house.send(chat(&token).id(&id)).await.status, 401, "{name}");
        assert_eq!(house.final_of(&id).await["error"], "wrong_audience", "{name}");
    }
    for good in ["\"ollama\"", "[\"ollama\"]", "[\"other\",\"ollama\"]"] {
        assert_eq!(house.send(chat(&es256(ES256, claims_but("aud", Some(good))))).await.status, 200, "aud {good}");
    }
}
