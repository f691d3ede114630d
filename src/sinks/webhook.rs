//! Batches to a URL, as NDJSON, signed as the Standard Webhooks specification has it (<https://www.standardwebhooks.com>): libraries
//! that verify it exist in most languages.
//!
//! `webhook-id` is a hash of the body: the same batch has the same one, however often it is sent, for a receiver that drops what it has. `webhook-timestamp` is the
//! time of the attempt in seconds since 1970, and `webhook-signature` is `v1,` and base64 of HMAC-SHA256 over `id.timestamp.body`.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, Mac};
use http::{HeaderName, HeaderValue, header};
use sha2::{Digest, Sha256};

use super::{Batch, Failure, answer};
use crate::config::ServiceUrl;
use crate::outbound::{Bounds, Outbound};

/// A secret has so many bytes at least: the output of SHA-256, past guessing.
const SECRET_BYTES: usize = 32;
/// Of what is answered only the status matters.
const REPLY_BYTES: usize = 1 << 20;

pub struct Webhook {
    url: ServiceUrl,
    outbound: Outbound,
    secret: Secret,
}

/// What signs. No `Debug`.
pub struct Secret(Hmac<Sha256>);

impl Secret {
    /// The text of a file, without the line's end: bytes, or `whsec_` and their base64, as the specification writes secrets.
    pub fn new(text: &[u8]) -> Result<Secret, String> {
        let decoded = match text.strip_prefix(b"whsec_") {
            Some(encoded) => STANDARD.decode(encoded).map_err(|_| "has no base64 after whsec_".to_owned())?,
            None => text.to_vec(),
        };
        if decoded.len() < SECRET_BYTES {
            return Err(format!(
                "has {} bytes, and {SECRET_BYTES} is the least; make one with: openssl rand -hex 32",
                decoded.len()
            ));
        }
        Ok(Secret(Hmac::new_from_slice(&decoded).expect("HMAC takes keys of any length")))
    }

    fn sign(&self, id: &str, timestamp_s: u64, body: &[u8]) -> String {
        let mut mac = self.0.clone();
        mac.update(format!("{id}.{timestamp_s}.").as_bytes());
        mac.update(body);
        format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()))
    }
}

impl Webhook {
    pub fn new(url: ServiceUrl, outbound: Outbound, secret: Secret) -> Webhook {
        Webhook { url, outbound, secret }
    }

    pub async fn deliver(&mut self, batch: &Batch, within: Duration) -> Result<(), Failure> {
        let body = batch.body();
        let hash = Sha256::digest(&body);
        let id: String =
            std::iter::once("msg_".to_owned()).chain(hash[..16].iter().map(|byte| format!("{byte:02x}"))).collect();
        let timestamp_s = std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs();
        let signature = self.secret.sign(&id, timestamp_s, &body);
        let value = |text: String| HeaderValue::try_from(text).expect("base64, hex and digits");
        let headers = [
            (header::CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson")),
            (HeaderName::from_static("webhook-id"), value(id)),
            (HeaderName::from_static("webhook-timestamp"), value(timestamp_s.to_string())),
            (HeaderName::from_static("webhook-signature"), value(signature)),
        ];
        let bounds = Bounds { within, reply_bytes: REPLY_BYTES };
        let reply = self.outbound.post(&self.url, &headers, body, bounds).await;
        let reply = reply.map_err(|why| Failure::new(format!("{} {why}", self.url)))?;
        answer::taken(&self.url, reply.status, &reply.headers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_what_the_specification_and_python_say() {
        // hmac.new(key, b"msg_p5jXN8AQM9LWM0D4loKWxJek.1614265330.{\"test\": 2432232314}", "sha256"), the specification's own
        // example, with the key that it has.
        let sign =
            |secret: &Secret| secret.sign("msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, br#"{"test": 2432232314}"#);
        let example = STANDARD.decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").expect("base64");
        let secret = Secret(Hmac::new_from_slice(&example).expect("any length"));
        assert_eq!(sign(&secret), "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn a_secret_has_32_bytes_and_may_be_written_as_the_specification_does() {
        let raw = [b'k'; 32];
        let written = format!("whsec_{}", STANDARD.encode(raw));
        let signed = |text: &[u8]| Secret::new(text).map(|secret| secret.sign("id", 1, b"body"));
        assert_eq!(signed(&raw), signed(written.as_bytes()));
        assert_ne!(signed(&raw), signed(&[b'l'; 32]));
        for short in [&b""[..], &raw[..31], b"whsec_", format!("whsec_{}", STANDARD.encode(&raw[..31])).as_bytes()] {
            let why = signed(short).expect_err("too short");
            assert!(why.contains("32 is the least"), "{why}");
        }
        assert!(signed(b"whsec_*").is_err());
    }
}
