//! Who is asking, tried from outside: keys as OpenSSL writes them, and the list of attacks on JWTs, one test for each.
//!
//! Hostile tokens are put together and signed by hand here, never by the code under test. What a client sees has one
//! wording for every cause; that is `refusal`'s, these tests look at the cause.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::{Arc, OnceLock};

use base64::{Engine, engine::general_purpose::STANDARD, engine::general_purpose::URL_SAFE_NO_PAD};
use behavry_ollama_proxy::identity::issuer::{Claims, DEFAULT_TTL_S, Issuer};
use behavry_ollama_proxy::identity::keyring::Keyring;
use behavry_ollama_proxy::identity::keys::{KeyError, VerificationKey};
use behavry_ollama_proxy::identity::{
    Algorithm, Asked, CAUSES, Caller, KeySet, Rejection, SigningKey, Verifier, VerifierSettings, identify,
};
use http::{HeaderMap, HeaderValue};
use jsonwebtoken::EncodingKey;
use serde_json::{Value, json};

macro_rules! key_file {
    ($name:literal) => {
        include_bytes!(concat!("fixtures/keys/", $name))
    };
}

const RSA_PRIVATE: &[u8] = key_file!("rsa2048.private.pem");
const RSA_PUBLIC: &[u8] = key_file!("rsa2048.public.pem");
const P256_PRIVATE: &[u8] = key_file!("p256.private.pem");
const P256_PUBLIC: &[u8] = key_file!("p256.public.pem");
const ED25519_PRIVATE: &[u8] = key_file!("ed25519.private.pem");
const ED25519_PUBLIC: &[u8] = key_file!("ed25519.public.pem");
const SECRET: &[u8] = b"a test secret of more than thirty-two bytes";

const NOW_S: i64 = 1_800_000_000;

/// Who signs in a test, independent of the code under test.
#[derive(Clone, Copy)]
enum Signer {
    Rs256,
    Es256,
    EdDsa,
    Hs256(&'static [u8]),
}

impl Signer {
    fn sign(self, message: &str) -> Vec<u8> {
        use jsonwebtoken::Algorithm;
        let (key, algorithm) = match self {
            Signer::Rs256 => (EncodingKey::from_rsa_pem(RSA_PRIVATE).unwrap(), Algorithm::RS256),
            Signer::Es256 => (EncodingKey::from_ec_pem(P256_PRIVATE).unwrap(), Algorithm::ES256),
            Signer::EdDsa => (EncodingKey::from_ed_pem(ED25519_PRIVATE).unwrap(), Algorithm::EdDSA),
            Signer::Hs256(secret) => (EncodingKey::from_secret(secret), Algorithm::HS256),
        };
        let signature = jsonwebtoken::crypto::sign(message.as_bytes(), &key, algorithm).unwrap();
        URL_SAFE_NO_PAD.decode(signature).unwrap()
    }

    fn token(self, header: &str, claims: &str) -> String {
        let message = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(self.sign(&message)))
    }
}

const ES256_HEADER: &str = r#"{"alg":"ES256","typ":"JWT"}"#;

fn good_claims() -> Value {
    json!({"sub": "agent-1", "jti": "session-1", "iss": "behavry", "iat": NOW_S, "exp": NOW_S + 3600,
           "roles": ["internal"], "permissions": ["web:read", "web:write"], "risk_tier": "medium"})
}

fn settings() -> VerifierSettings {
    VerifierSettings { issuer: "behavry".into(), audience: None, leeway_s: 5 }
}

fn verifier(keys: KeySet) -> Verifier {
    Verifier::new(keys, settings())
}

/// ES256, because it is quick to sign and to verify in a debug build.
fn es256() -> &'static Verifier {
    static VERIFIER: OnceLock<Verifier> = OnceLock::new();
    VERIFIER.get_or_init(|| verifier(KeySet::from_pem(P256_PUBLIC).unwrap()))
}

fn rs256() -> &'static Verifier {
    static VERIFIER: OnceLock<Verifier> = OnceLock::new();
    VERIFIER.get_or_init(|| verifier(KeySet::from_pem(RSA_PUBLIC).unwrap()))
}

fn ask(verifier: &Verifier, token: &str) -> Result<Arc<Caller>, Rejection> {
    let mut headers = HeaderMap::new();
    headers
        .insert("authorization", HeaderValue::from_str(&format!("Bearer {token}")).expect("a token is visible ASCII"));
    identify_at(verifier, &headers, NOW_S)
}

/// By a proxy whose agents file is empty.
fn identify_at(verifier: &Verifier, headers: &HeaderMap, now_s: i64) -> Result<Arc<Caller>, Rejection> {
    let asked = Asked { headers, method: "POST", path: "/api/chat", query: None };
    identify(verifier, &Keyring::default(), &asked, now_s).map(|identified| identified.caller)
}

/// The cause for which a token is refused; it must be one that the metric knows.
#[track_caller]
fn cause(verifier: &Verifier, token: &str) -> &'static str {
    match ask(verifier, token) {
        Err(Rejection::Invalid(cause)) => {
            assert!(CAUSES.contains(&cause), "{cause} is not in the closed set");
            cause
        }
        Err(Rejection::Missing) => panic!("the token was not even seen"),
        Ok(_) => panic!("the token was accepted"),
    }
}

#[track_caller]
fn cause_of_header(header: &str) -> &'static str {
    cause(es256(), &Signer::Es256.token(header, &good_claims().to_string()))
}

#[track_caller]
fn cause_of_claims_text(claims: &str) -> &'static str {
    cause(es256(), &Signer::Es256.token(ES256_HEADER, claims))
}

/// The cause for good claims but one, which is replaced, or cut where the value is `Null`-marked by `None`.
#[track_caller]
fn cause_of_claim(name: &str, value: Option<Value>) -> &'static str {
    let mut claims = good_claims();
    let members = claims.as_object_mut().unwrap();
    match value {
        Some(value) => members.insert(name.into(), value),
        None => members.remove(name),
    };
    cause_of_claims_text(&claims.to_string())
}

fn accepts_claim(name: &str, value: Value) -> bool {
    let mut claims = good_claims();
    claims[name] = value;
    ask(es256(), &Signer::Es256.token(ES256_HEADER, &claims.to_string())).is_ok()
}

// --- Good tokens.

#[test]
fn a_good_token_of_each_algorithm_gives_its_caller() {
    for (signer, header, keys) in [
        (Signer::Rs256, r#"{"alg":"RS256","typ":"JWT"}"#, KeySet::from_pem(RSA_PUBLIC)),
        (Signer::Es256, ES256_HEADER, KeySet::from_pem(P256_PUBLIC)),
        (Signer::EdDsa, r#"{"typ":"jwt","alg":"EdDSA"}"#, KeySet::from_pem(ED25519_PUBLIC)),
        (Signer::Hs256(SECRET), r#"{"alg":"HS256"}"#, KeySet::from_secret(SECRET)),
    ] {
        let caller = ask(&verifier(keys.unwrap()), &signer.token(header, &good_claims().to_string())).unwrap();
        assert_eq!(caller.agent_id, "agent-1");
        assert_eq!(caller.session_id, "session-1");
        assert_eq!(caller.agent_name, None);
        assert_eq!(caller.roles, ["internal"]);
        assert_eq!(caller.permissions, ["web:read", "web:write"]);
        assert_eq!(caller.risk_tier.as_deref(), Some("medium"));
        assert_eq!(caller.expires_at, NOW_S + 3600);
    }
}

#[test]
fn a_clock_before_1970_does_not_panic() {
    let mut headers = HeaderMap::new();
    let token = Signer::Es256.token(ES256_HEADER, &good_claims().to_string());
    headers.insert("x-api-key", HeaderValue::from_str(&token).unwrap());
    for now_s in [-1, i64::MIN, 0] {
        assert!(identify_at(es256(), &headers, now_s).is_ok());
    }
    assert_eq!(identify_at(es256(), &headers, i64::MAX), Err(Rejection::Invalid("expired")));
}

#[test]
fn a_request_without_a_token_is_missing_one() {
    assert_eq!(identify_at(es256(), &HeaderMap::new(), NOW_S), Err(Rejection::Missing));
}

// --- The algorithm.

#[test]
fn a_token_signed_with_none_is_refused() {
    for algorithm in ["none", "None", "NONE", "nOnE", ""] {
        let header = URL_SAFE_NO_PAD.encode(json!({"alg": algorithm, "typ": "JWT"}).to_string());
        let claims = URL_SAFE_NO_PAD.encode(good_claims().to_string());
        assert_eq!(cause(rs256(), &format!("{header}.{claims}.")), "wrong_algorithm");
        let signature = URL_SAFE_NO_PAD.encode(Signer::Rs256.sign(&format!("{header}.{claims}")));
        assert_eq!(cause(rs256(), &format!("{header}.{claims}.{signature}")), "wrong_algorithm");
    }
}

#[test]
fn a_token_without_an_algorithm_is_refused() {
    for header in [r#"{"typ":"JWT"}"#, r#"{"alg":null}"#, r#"{"alg":["ES256"]}"#, r#"{"alg":1}"#] {
        assert_eq!(cause_of_header(header), "wrong_algorithm", "{header}");
    }
}

#[test]
fn a_public_key_used_as_a_shared_secret_is_refused() {
    let header = r#"{"alg":"HS256","typ":"JWT"}"#;
    let trimmed = RSA_PUBLIC.trim_ascii_end();
    for secret in [RSA_PUBLIC, trimmed] {
        let token = Signer::Hs256(secret).token(header, &good_claims().to_string());
        assert_eq!(cause(rs256(), &token), "wrong_algorithm");
        let relabelled = Signer::Hs256(secret).token(r#"{"alg":"RS256"}"#, &good_claims().to_string());
        assert_eq!(cause(rs256(), &relabelled), "bad_signature");
    }
}

#[test]
fn an_rsa_key_takes_rs256_only() {
    for algorithm in ["RS384", "RS512", "PS256", "rs256", "RS256 "] {
        let token = Signer::Rs256.token(&json!({"alg": algorithm}).to_string(), &good_claims().to_string());
        assert_eq!(cause(rs256(), &token), "wrong_algorithm", "{algorithm}");
    }
}

#[test]
fn a_shared_secret_does_not_open_the_door_of_a_public_key_beside_it() {
    let keys = KeySet::new(vec![
        VerificationKey::from_pem(RSA_PUBLIC).unwrap().with_kid("rsa".into()),
        VerificationKey::from_secret(SECRET).unwrap().with_kid("shared".into()),
    ]);
    let verifier = verifier(keys.unwrap());
    let claims = good_claims().to_string();
    assert!(ask(&verifier, &Signer::Hs256(SECRET).token(r#"{"alg":"HS256","kid":"shared"}"#, &claims)).is_ok());
    let crossed = Signer::Hs256(SECRET).token(r#"{"alg":"HS256","kid":"rsa"}"#, &claims);
    assert_eq!(cause(&verifier, &crossed), "wrong_algorithm");
    let forged = Signer::Hs256(RSA_PUBLIC).token(r#"{"alg":"HS256"}"#, &claims);
    assert_eq!(cause(&verifier, &forged), "bad_signature");
}

// --- The signature.

#[test]
fn a_token_whose_claims_were_changed_is_refused() {
    let token = Signer::Es256.token(ES256_HEADER, &good_claims().to_string());
    let mut claims = good_claims();
    claims["permissions"] = json!(["web:read", "web:write", "ollama:admin"]);
    let parts: Vec<&str> = token.split('.').collect();
    let forged = format!("{}.{}.{}", parts[0], URL_SAFE_NO_PAD.encode(claims.to_string()), parts[2]);
    assert_eq!(cause(es256(), &forged), "bad_signature");
}

#[test]
fn a_token_of_another_key_is_refused() {
    let other = SigningKey::generate(Algorithm::Es256).unwrap();
    let (token, _) =
        Issuer::new(other, "behavry", 60).mint(&Claims { sub: "a".into(), ..Claims::default() }, NOW_S).unwrap();
    assert_eq!(cause(es256(), &token), "bad_signature");
}

#[test]
fn a_truncated_token_is_refused_wherever_it_ends() {
    let token = Signer::Es256.token(ES256_HEADER, &good_claims().to_string());
    for end in 1..token.len() {
        cause(es256(), &token[..end]);
    }
}

#[test]
fn a_der_encoded_ecdsa_signature_is_refused() {
    let message =
        format!("{}.{}", URL_SAFE_NO_PAD.encode(ES256_HEADER), URL_SAFE_NO_PAD.encode(good_claims().to_string()));
    let raw = p256::ecdsa::Signature::from_slice(&Signer::Es256.sign(&message)).unwrap();
    let der = URL_SAFE_NO_PAD.encode(raw.to_der().as_bytes());
    assert_eq!(cause(es256(), &format!("{message}.{der}")), "bad_signature");
}

#[test]
fn a_signature_of_zeros_is_refused() {
    for (verifier, algorithm, length) in [
        (es256(), "ES256", 64),
        (rs256(), "RS256", 256),
        (&verifier(KeySet::from_pem(ED25519_PUBLIC).unwrap()), "EdDSA", 64),
    ] {
        let header = URL_SAFE_NO_PAD.encode(json!({"alg": algorithm}).to_string());
        let claims = URL_SAFE_NO_PAD.encode(good_claims().to_string());
        for length in [0, 1, length - 1, length, length + 1] {
            let signature = URL_SAFE_NO_PAD.encode(vec![0_u8; length]);
            assert_eq!(cause(verifier, &format!("{header}.{claims}.{signature}")), "bad_signature");
        }
    }
}

// --- Header members.

#[test]
fn an_embedded_or_linked_key_is_refused() {
    let jwk = VerificationKey::from_pem(P256_PUBLIC).unwrap().public_jwk().unwrap();
    for (member, value) in [
        ("jwk", jwk),
        ("jku", json!("https://attacker.example/jwks.json")),
        ("x5u", json!("file:///etc/passwd")),
        ("x5c", json!(["MIIB"])),
    ] {
        let mut header = json!({"alg": "ES256"});
        header[member] = value;
        assert_eq!(cause_of_header(&header.to_string()), "unsupported_header", "{member}");
    }
}

#[test]
fn critical_extensions_and_unencoded_payloads_are_refused() {
    for header in [
        r#"{"alg":"ES256","crit":["exp"]}"#,
        r#"{"alg":"ES256","crit":[]}"#,
        r#"{"alg":"ES256","b64":false}"#,
        r#"{"alg":"ES256","b64":true}"#,
        r#"{"alg":"ES256","enc":"A256GCM"}"#,
        r#"{"alg":"ES256","zip":"DEF"}"#,
        r#"{"alg":"ES256","cty":"JWT"}"#,
    ] {
        assert_eq!(cause_of_header(header), "unsupported_header", "{header}");
    }
}

#[test]
fn a_token_of_another_type_is_refused() {
    for kind in ["\"JWE\"", "\"dpop+jwt\"", "\"\"", "1", "null", "[\"JWT\"]"] {
        assert_eq!(cause_of_header(&format!(r#"{{"alg":"ES256","typ":{kind}}}"#)), "unsupported_header", "{kind}");
    }
    for kind in ["JWT", "jwt", "at+jwt", "AT+JWT"] {
        let header = json!({"alg": "ES256", "typ": kind}).to_string();
        assert!(ask(es256(), &Signer::Es256.token(&header, &good_claims().to_string())).is_ok(), "{kind}");
    }
}

#[test]
fn a_duplicate_header_member_is_refused() {
    for header in [
        r#"{"alg":"ES256","alg":"none"}"#,
        r#"{"alg":"ES256","alg":"ES256"}"#,
        r#"{"alg":"none","\u0061lg":"ES256"}"#,
        r#"{"alg":"ES256","x":1,"x":1}"#,
    ] {
        assert_eq!(cause_of_header(header), "duplicate_member", "{header}");
    }
}

#[test]
fn a_kid_only_ever_selects_among_our_keys() {
    let key = VerificationKey::from_pem(P256_PUBLIC).unwrap().with_kid("ours".into());
    let verifier = verifier(KeySet::new(vec![key]).unwrap());
    let with = |header: &str| Signer::Es256.token(header, &good_claims().to_string());
    assert!(ask(&verifier, &with(r#"{"alg":"ES256","kid":"ours"}"#)).is_ok());
    assert!(ask(&verifier, &with(r#"{"alg":"ES256"}"#)).is_ok(), "without a name the keys of the algorithm are tried");
    for kid in [
        "\"theirs\"",
        "\"\"",
        "\"../../../../dev/null\"",
        "\"/etc/passwd\"",
        "\"ours' OR '1'='1\"",
        "\"ours\\u0000\"",
        "\"OURS\"",
        "\"http://attacker.example/key\"",
        "1",
        "null",
        "[\"ours\"]",
    ] {
        let token = with(&format!(r#"{{"alg":"ES256","kid":{kid}}}"#));
        assert_eq!(cause(&verifier, &token), "unknown_key", "{kid}");
    }
    let long = with(&json!({"alg": "ES256", "kid": "k".repeat(300)}).to_string());
    assert_eq!(cause(&verifier, &long), "unknown_key");
}

#[test]
fn a_key_that_was_configured_without_a_name_takes_the_name_the_issuer_gives_it() {
    let token = Signer::Es256.token(r#"{"alg":"ES256","kid":"behavry-2026"}"#, &good_claims().to_string());
    assert!(ask(es256(), &token).is_ok());
}

// --- The encoding.

#[test]
fn anything_but_three_segments_is_refused() {
    let token = Signer::Es256.token(ES256_HEADER, &good_claims().to_string());
    for text in ["a", "a.b", "..", "...", ".", &format!("{token}."), &format!(".{token}"), &format!("{token}.a")] {
        assert_eq!(cause(es256(), text), "malformed", "{} bytes", text.len());
    }
    assert_eq!(cause(es256(), r#"{"payload":"e30","signatures":[]}"#), "malformed", "the JSON serialisation");
}

#[test]
fn base64_that_is_not_canonical_is_refused() {
    let token = Signer::Es256.token(ES256_HEADER, &good_claims().to_string());
    let (message, signature) = token.rsplit_once('.').unwrap();
    // 64 bytes leave four unused bits in the last character: another one with the same bytes must not pass.
    let alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let (stem, last) = signature.split_at(signature.len() - 1);
    let place = alphabet.find(last).unwrap();
    let twin = &alphabet[place + 1..place + 2];
    assert_eq!(cause(es256(), &format!("{message}.{stem}{twin}")), "malformed");
    assert_eq!(cause(es256(), &format!("{token}==")), "malformed", "padding");
    for odd in [" ", "+", "/", "=", "%2d", "\t"] {
        assert_eq!(cause(es256(), &format!("{message}.{odd}{signature}")), "malformed", "{odd:?}");
    }
    let padded = base64::engine::general_purpose::URL_SAFE.encode(ES256_HEADER.to_owned() + " ");
    assert!(padded.ends_with('='));
    let message = format!("{padded}.{}", URL_SAFE_NO_PAD.encode(good_claims().to_string()));
    let signature = URL_SAFE_NO_PAD.encode(Signer::Es256.sign(&message));
    assert_eq!(cause(es256(), &format!("{message}.{signature}")), "malformed", "a padded header");
}

#[test]
fn segments_that_are_no_json_objects_are_refused() {
    for header in ["", "null", "[]", "\"ES256\"", "{\"alg\":\"ES256\"} x", "{'alg':'ES256'}"] {
        assert_eq!(cause_of_header(header), "malformed", "{header}");
    }
    for claims in ["", "null", "[]", "1", "{}{}"] {
        assert_eq!(cause_of_claims_text(claims), "malformed", "{claims}");
    }
    let deep = format!("{{\"a\":{}1{}}}", "[".repeat(1000), "]".repeat(1000));
    assert_eq!(cause_of_claims_text(&deep), "malformed", "deeper than any parser should go");
}

#[test]
fn an_oversized_token_is_refused_before_anything_else() {
    let mut claims = good_claims();
    claims["filler"] = json!("x".repeat(8192));
    assert_eq!(cause_of_claims_text(&claims.to_string()), "oversized");
    assert_eq!(cause(es256(), &"a".repeat(100_000)), "oversized");
}

// --- The claims.

#[test]
fn a_duplicate_claim_is_refused() {
    let claims = good_claims().to_string();
    let twice = claims.replacen('{', r#"{"sub":"admin","#, 1);
    assert_eq!(cause_of_claims_text(&twice), "duplicate_member");
    let escaped = claims.replacen('{', r#"{"\u0065xp":9999999999,"#, 1);
    assert_eq!(cause_of_claims_text(&escaped), "duplicate_member");
    let nested = claims.replacen('{', r#"{"x":{"a":1,"a":2},"#, 1);
    assert_eq!(cause_of_claims_text(&nested), "duplicate_member");
}

#[test]
fn an_expired_token_is_refused() {
    assert_eq!(cause_of_claim("exp", Some(json!(NOW_S - 5))), "expired");
    assert_eq!(cause_of_claim("exp", Some(json!(0))), "expired");
    assert_eq!(cause_of_claim("exp", Some(json!(-1))), "expired");
    assert_eq!(cause_of_claim("exp", Some(json!(i64::MIN))), "expired");
    assert!(accepts_claim("exp", json!(NOW_S - 4)), "five seconds are granted");
    assert!(accepts_claim("exp", json!(i64::MAX)));
}

#[test]
fn a_token_without_a_whole_number_as_expiry_is_refused() {
    assert_eq!(cause_of_claim("exp", None), "missing_claim");
    for value in [json!(null), json!("1900000000"), json!(1.9e9), json!(true), json!([1]), json!(u64::MAX)] {
        assert_eq!(cause_of_claim("exp", Some(value.clone())), "bad_claim", "{value}");
    }
    let text = good_claims().to_string().replace(&(NOW_S + 3600).to_string(), "1e400");
    assert_eq!(cause_of_claims_text(&text), "malformed", "a number that is none");
}

#[test]
fn a_token_that_is_not_valid_yet_is_refused() {
    assert_eq!(cause_of_claim("nbf", Some(json!(NOW_S + 6))), "not_yet_valid");
    assert!(accepts_claim("nbf", json!(NOW_S + 5)), "five seconds are granted");
    for value in [json!(null), json!("1"), json!(1.5), json!({})] {
        assert_eq!(cause_of_claim("nbf", Some(value.clone())), "bad_claim", "{value}");
    }
}

#[test]
fn a_token_that_is_not_valid_yet_becomes_valid_later() {
    let mut claims = good_claims();
    claims["nbf"] = json!(NOW_S + 100);
    let token = Signer::Es256.token(ES256_HEADER, &claims.to_string());
    assert_eq!(es256().verify_token(&token, NOW_S), Err("not_yet_valid"));
    assert!(es256().verify_token(&token, NOW_S + 100).is_ok());
    assert_eq!(es256().verify_token(&token, NOW_S), Err("not_yet_valid"), "the cache asks again");
}

#[test]
fn an_oddly_typed_issue_time_is_refused() {
    assert_eq!(cause_of_claim("iat", Some(json!("now"))), "bad_claim");
    assert_eq!(cause_of_claim("iat", Some(json!(null))), "bad_claim");
    assert!(accepts_claim("iat", json!(1.5)), "RFC 7519 allows a fraction");
}

#[test]
fn a_token_of_another_issuer_is_refused() {
    assert_eq!(cause_of_claim("iss", None), "missing_claim");
    for value in [json!("attacker"), json!("Behavry"), json!("behavry "), json!(""), json!(["behavry"]), json!(null)] {
        assert_eq!(cause_of_claim("iss", Some(value.clone())), "wrong_issuer", "{value}");
    }
}

#[test]
fn an_audience_is_required_once_it_is_configured() {
    let settings = VerifierSettings { audience: Some("ollama".into()), ..settings() };
    let verifier = Verifier::new(KeySet::from_pem(P256_PUBLIC).unwrap(), settings);
    let token = |audience: Option<Value>| {
        let mut claims = good_claims();
        if let Some(audience) = audience {
            claims["aud"] = audience;
        }
        Signer::Es256.token(ES256_HEADER, &claims.to_string())
    };
    assert!(ask(&verifier, &token(Some(json!("ollama")))).is_ok());
    assert!(ask(&verifier, &token(Some(json!(["other", "ollama"])))).is_ok());
    assert_eq!(cause(&verifier, &token(None)), "wrong_audience");
    for value in [json!("other"), json!([]), json!(null), json!(1), json!(["ollama", 1]), json!({"ollama": 1})] {
        assert_eq!(cause(&verifier, &token(Some(value.clone()))), "wrong_audience", "{value}");
    }
}

#[test]
fn a_token_for_somebody_else_is_refused_by_a_proxy_without_an_audience() {
    assert_eq!(cause_of_claim("aud", Some(json!("billing"))), "wrong_audience");
}

#[test]
fn an_administrator_s_token_is_not_an_agent_s() {
    assert_eq!(cause_of_claim("jti", None), "not_an_agent");
    assert_eq!(cause_of_claim("sub", None), "not_an_agent");
    for name in ["sub", "jti"] {
        assert_eq!(cause_of_claim(name, Some(json!(""))), "not_an_agent");
        assert_eq!(cause_of_claim(name, Some(json!(null))), "not_an_agent");
    }
    let mut claims = good_claims();
    claims.as_object_mut().unwrap().remove("roles");
    assert!(ask(es256(), &Signer::Es256.token(ES256_HEADER, &claims.to_string())).is_ok(), "permissions are enough");
    claims.as_object_mut().unwrap().remove("permissions");
    assert_eq!(cause_of_claims_text(&claims.to_string()), "not_an_agent");
}

#[test]
fn oddly_typed_names_are_refused() {
    for name in ["sub", "jti"] {
        for value in [json!(1), json!(["a"]), json!({}), json!(true)] {
            assert_eq!(cause_of_claim(name, Some(value.clone())), "bad_claim", "{name} {value}");
        }
    }
    for name in ["roles", "permissions"] {
        for value in [json!("internal"), json!(null), json!([1]), json!([""]), json!([null]), json!({"internal": true})]
        {
            assert_eq!(cause_of_claim(name, Some(value.clone())), "bad_claim", "{name} {value}");
        }
    }
    for name in ["name", "risk_tier"] {
        assert_eq!(cause_of_claim(name, Some(json!(7))), "bad_claim");
        assert!(accepts_claim(name, json!(null)));
    }
}

#[test]
fn names_with_control_characters_or_without_end_are_refused() {
    for text in ["a\nb", "\u{1b}[2J", "a\u{0}", "\u{7f}", "\u{85}"] {
        assert_eq!(cause_of_claim("sub", Some(json!(text))), "bad_claim");
        assert_eq!(cause_of_claim("jti", Some(json!(text))), "bad_claim");
        assert_eq!(cause_of_claim("roles", Some(json!([text]))), "bad_claim");
        assert_eq!(cause_of_claim("permissions", Some(json!([text]))), "bad_claim");
        assert_eq!(cause_of_claim("name", Some(json!(text))), "bad_claim");
    }
    assert_eq!(cause_of_claim("sub", Some(json!("é".repeat(257)))), "bad_claim");
    assert!(accepts_claim("sub", json!("é".repeat(256))));
    assert_eq!(cause_of_claim("roles", Some(json!(["r".repeat(129)]))), "bad_claim");
    assert_eq!(cause_of_claim("permissions", Some(json!(vec!["p"; 65]))), "bad_claim");
}

#[test]
fn a_ninth_role_is_refused() {
    assert!(accepts_claim("roles", json!(vec!["r"; 8])));
    assert_eq!(cause_of_claim("roles", Some(json!(vec!["r"; 9]))), "too_many_roles");
}

#[test]
fn claims_are_not_looked_at_before_the_signature_holds() {
    let mut claims = good_claims();
    claims["exp"] = json!(1);
    let token = Signer::Rs256.token(ES256_HEADER, &claims.to_string());
    assert_eq!(cause(es256(), &token), "bad_signature");
}

// --- Keys.

#[test]
fn keys_are_read_in_every_form_that_openssl_writes() {
    let rsa = VerificationKey::from_pem(RSA_PUBLIC).unwrap();
    assert_eq!(rsa.algorithm(), Algorithm::Rs256);
    let pkcs1 = VerificationKey::from_pem(key_file!("rsa2048.pkcs1.public.pem")).unwrap();
    assert_eq!(rsa.thumbprint(), pkcs1.thumbprint());
    assert_eq!(VerificationKey::from_pem(P256_PUBLIC).unwrap().algorithm(), Algorithm::Es256);
    assert_eq!(VerificationKey::from_pem(ED25519_PUBLIC).unwrap().algorithm(), Algorithm::EdDsa);
    for (private, public) in [
        (RSA_PRIVATE, RSA_PUBLIC),
        (&key_file!("rsa2048.pkcs1.private.pem")[..], RSA_PUBLIC),
        (P256_PRIVATE, P256_PUBLIC),
        (key_file!("p256.sec1.private.pem"), P256_PUBLIC),
        (ED25519_PRIVATE, ED25519_PUBLIC),
    ] {
        let kid = VerificationKey::from_pem(public).unwrap().thumbprint();
        assert_eq!(SigningKey::from_pem(private).unwrap().kid(), kid.as_deref());
    }
}

#[test]
fn a_pem_key_bent_by_an_environment_file_is_still_read() {
    let text = std::str::from_utf8(RSA_PUBLIC).unwrap();
    for bent in [text.replace('\n', "\\n"), text.replace('\n', "\r\n"), text.replace('\n', " "), format!("\n  {text}")]
    {
        assert!(VerificationKey::from_pem(bent.as_bytes()).is_ok(), "{bent}");
    }
}

#[test]
fn a_wrong_or_weak_key_is_refused_with_what_to_do() {
    let refused = |text: &[u8]| VerificationKey::from_pem(text).unwrap_err();
    assert_eq!(refused(b""), KeyError::Empty);
    assert_eq!(refused(b" \n"), KeyError::Empty);
    assert_eq!(refused(b"ssh-rsa AAAA"), KeyError::NotPem);
    assert_eq!(refused(b"-----BEGIN PUBLIC KEY-----\n!!\n-----END PUBLIC KEY-----"), KeyError::NotPem);
    assert_eq!(refused(b"-----BEGIN PUBLIC KEY-----\nAAAA"), KeyError::NotPem);
    assert_eq!(refused(b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----"), KeyError::Unsupported);
    assert_eq!(refused(RSA_PRIVATE), KeyError::PrivateWherePublic);
    assert_eq!(refused(key_file!("p256.sec1.private.pem")), KeyError::PrivateWherePublic);
    assert_eq!(refused(key_file!("encrypted.private.pem")), KeyError::Encrypted);
    assert_eq!(refused(key_file!("certificate.pem")), KeyError::Certificate);
    assert_eq!(refused(key_file!("rsa1024.public.pem")), KeyError::RsaTooSmall { bits: 1024 });
    assert_eq!(refused(key_file!("p384.public.pem")), KeyError::Unsupported);
    assert_eq!(refused(&[RSA_PUBLIC, P256_PUBLIC].concat()), KeyError::SeveralInPem);
    assert_eq!(SigningKey::from_pem(RSA_PUBLIC).unwrap_err(), KeyError::PublicWherePrivate);
    let weak = SigningKey::from_pem(key_file!("rsa1024.private.pem")).unwrap_err();
    assert_eq!(weak, KeyError::RsaTooSmall { bits: 1024 });
    assert!(weak.to_string().contains("openssl genrsa"), "the words say what to do");
}

#[test]
fn a_weak_secret_is_refused() {
    let refused = |secret: &[u8]| KeySet::from_secret(secret).unwrap_err();
    assert_eq!(refused(b""), KeyError::Empty);
    assert_eq!(refused(&[b'x'; 31]), KeyError::SecretTooShort { bytes: 31 });
    assert_eq!(refused(RSA_PUBLIC), KeyError::PemAsSecret);
    assert!(KeySet::from_secret(&[b'x'; 32]).is_ok());
}

#[test]
fn small_order_ed25519_keys_are_refused() {
    let mut identity = [0_u8; 32];
    identity[0] = 1;
    let mut minus_one = [0xff_u8; 32];
    minus_one[0] = 0xec;
    minus_one[31] = 0x7f;
    let eighth = [
        0xc7, 0x17, 0x6a, 0x70, 0x3d, 0x4d, 0xd8, 0x4f, 0xba, 0x3c, 0x0b, 0x76, 0x0d, 0x10, 0x67, 0x0f, 0x2a, 0x20,
        0x53, 0xfa, 0x2c, 0x39, 0xcc, 0xc6, 0x4e, 0xc7, 0xfd, 0x77, 0x92, 0xac, 0x03, 0x7a,
    ];
    for point in [[0_u8; 32], identity, minus_one, eighth] {
        let prefix = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
        let der = STANDARD.encode([&prefix[..], &point].concat());
        let text = format!("-----BEGIN PUBLIC KEY-----\n{der}\n-----END PUBLIC KEY-----\n");
        assert_eq!(VerificationKey::from_pem(text.as_bytes()).unwrap_err(), KeyError::SmallOrder);
        let jwks = json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "x": URL_SAFE_NO_PAD.encode(point)}]});
        assert_eq!(KeySet::from_jwks(jwks.to_string().as_bytes()).unwrap_err(), KeyError::NoUsableKey);
    }
}

#[test]
fn the_key_id_is_the_thumbprint_of_rfc_7638() {
    // Section 3.1 of the RFC, and RFC 8037 appendix A.3.
    let jwks = json!({"keys": [
        {"kty": "RSA", "e": "AQAB", "alg": "RS256", "kid": "2011-04-29",
         "n": "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMs\
               tn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajr\
               n1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw"},
        {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}
    ]});
    let keys = KeySet::from_jwks(jwks.to_string().as_bytes()).unwrap();
    assert_eq!(keys.keys()[0].thumbprint().unwrap(), "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs");
    assert_eq!(keys.keys()[1].thumbprint().unwrap(), "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k");
    assert_eq!(keys.keys()[0].kid(), Some("2011-04-29"));
}

#[test]
fn our_own_jwks_verifies_our_own_tokens() {
    for private in [RSA_PRIVATE, P256_PRIVATE, ED25519_PRIVATE] {
        let key = SigningKey::from_pem(private).unwrap();
        let jwk = key.public_jwk().unwrap();
        assert!(["d", "p", "q", "dp", "dq", "qi"].iter().all(|member| jwk.get(member).is_none()), "public parts only");
        let jwks = json!({"keys": [jwk]}).to_string();
        let keys = KeySet::from_jwks(jwks.as_bytes()).unwrap();
        let issuer = Issuer::new(key, "behavry", DEFAULT_TTL_S);
        let (token, _) = issuer.mint(&Claims { sub: "a".into(), ..Claims::default() }, NOW_S).unwrap();
        assert_eq!(ask(&verifier(keys), &token).unwrap().agent_id, "a");
    }
    assert_eq!(SigningKey::from_secret(SECRET).unwrap().public_jwk(), None, "a secret is never published");
}

#[test]
fn keys_of_a_jwks_that_cannot_verify_are_passed_over() {
    let good = VerificationKey::from_pem(P256_PUBLIC).unwrap().public_jwk().unwrap();
    let weak_n = URL_SAFE_NO_PAD.encode([0xff_u8; 128]);
    let changed = |member: &str, value: Value| {
        let mut jwk = good.clone();
        jwk[member] = value;
        jwk
    };
    let jwks = json!({"keys": [
        changed("use", json!("enc")),
        changed("alg", json!("ES384")),
        changed("key_ops", json!(["sign"])),
        changed("crv", json!("P-384")),
        changed("x", json!("AAAA")),
        changed("y", json!(URL_SAFE_NO_PAD.encode([1_u8; 32]))),
        changed("kid", json!("")),
        changed("kid", json!(7)),
        {"kty": "oct", "k": URL_SAFE_NO_PAD.encode([7_u8; 64]), "alg": "HS256"},
        {"kty": "RSA", "n": weak_n, "e": "AQAB"},
        "nonsense",
        changed("key_ops", json!(["verify"])),
    ]});
    let keys = KeySet::from_jwks(jwks.to_string().as_bytes()).unwrap();
    assert_eq!(keys.keys().len(), 1);
    let skipped: Vec<usize> = keys.skipped().iter().map(|skipped| skipped.index).collect();
    assert_eq!(skipped, (0..11).collect::<Vec<_>>());
}

#[test]
fn an_empty_broken_or_disclosed_jwks_is_an_error() {
    let refused = |document: &str| KeySet::from_jwks(document.as_bytes()).unwrap_err();
    assert_eq!(refused(""), KeyError::Empty);
    for document in ["[]", "{}", "{\"keys\":{}}", "{\"keys\":[],\"keys\":[]}", "not json"] {
        assert_eq!(refused(document), KeyError::NotAJwks, "{document}");
    }
    assert_eq!(refused(r#"{"keys":[]}"#), KeyError::NoUsableKey);
    let good = VerificationKey::from_pem(P256_PUBLIC).unwrap().public_jwk().unwrap();
    let mut disclosed = good.clone();
    disclosed["d"] = json!("AAAA");
    assert_eq!(refused(&json!({"keys": [good, disclosed]}).to_string()), KeyError::PrivateInJwks);
    assert_eq!(refused(&json!({"keys": vec![good; 17]}).to_string()), KeyError::TooManyKeys);
}

#[test]
fn a_token_without_a_key_id_is_tried_against_each_key_of_its_algorithm() {
    let first = SigningKey::generate(Algorithm::Es256).unwrap().verification_key();
    let second = VerificationKey::from_pem(P256_PUBLIC).unwrap().with_kid("second".into());
    let verifier = verifier(KeySet::new(vec![first]).unwrap().with(second).unwrap());
    assert!(ask(&verifier, &Signer::Es256.token(ES256_HEADER, &good_claims().to_string())).is_ok());
}

#[test]
fn no_debug_text_holds_a_key() {
    let secret = std::str::from_utf8(SECRET).unwrap();
    let texts = [
        format!("{:?}", KeySet::from_secret(SECRET).unwrap()),
        format!("{:?}", SigningKey::from_secret(SECRET).unwrap()),
        format!("{:?}", SigningKey::from_pem(ED25519_PRIVATE).unwrap()),
    ];
    for text in texts {
        let bytes = format!("{:?}", &SECRET[..8]);
        assert!(
            !text.contains(secret) && !text.contains(bytes.trim_matches(['[', ']'])),
            "the secret is in a Debug text"
        );
        assert!(text.len() < 200, "longer than algorithm and kid: {} bytes", text.len());
    }
}

// --- The proxy's own key.

#[test]
fn the_signing_key_is_made_once_and_kept() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("state/signing-key.pem");
    let made = SigningKey::load_or_create(&path, Algorithm::EdDsa).unwrap();
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!(mode(&path), 0o600);
    assert_eq!(mode(path.parent().unwrap()), 0o700);
    let loaded = SigningKey::load_or_create(&path, Algorithm::EdDsa).unwrap();
    assert_eq!(made.kid(), loaded.kid());
    let words = SigningKey::load_or_create(&path, Algorithm::Rs256).unwrap_err().to_string();
    assert!(words.contains("EdDSA") && words.contains("RS256"), "{words}");
}

#[test]
fn starts_at_the_same_moment_agree_on_one_key() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("key.pem");
    let make = || SigningKey::load_or_create(&path, Algorithm::Es256).unwrap().kid().map(str::to_owned);
    let kids: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(make)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(kids.iter().all(|kid| *kid == kids[0]), "{kids:?}");
}

#[test]
fn a_signing_key_that_others_can_read_stops_the_start() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("key.pem");
    std::fs::write(&path, ED25519_PRIVATE).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
    let words = SigningKey::load_or_create(&path, Algorithm::EdDsa).unwrap_err().to_string();
    assert!(words.contains("chmod 600"), "{words}");
}

#[test]
fn a_broken_signing_key_file_stops_the_start_and_is_not_replaced() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("key.pem");
    for content in [&b""[..], b"garbage", RSA_PUBLIC] {
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        let words = SigningKey::load_or_create(&path, Algorithm::EdDsa).unwrap_err().to_string();
        assert!(words.contains("key.pem"), "{words}");
        assert_eq!(std::fs::read(&path).unwrap(), content);
    }
}

#[test]
fn a_new_rsa_key_signs_tokens_that_its_public_half_verifies() {
    let key = SigningKey::generate(Algorithm::Rs256).unwrap();
    let keys = KeySet::new(vec![key.verification_key()]).unwrap();
    let issuer = Issuer::new(key, "behavry", DEFAULT_TTL_S);
    let (token, _) = issuer.mint(&Claims { sub: "a".into(), ..Claims::default() }, NOW_S).unwrap();
    assert_eq!(ask(&verifier(keys), &token).unwrap().agent_id, "a");
}
