//! Request bodies in Zstandard: decoded within the limit, judged and filtered, and passed on decoded.

use ruzstd::encoding::{CompressionLevel, compress_to_vec};
use serde_json::json;

use crate::client::{End, Request};
use crate::house::{House, Plan};

fn zstd(plain: &str) -> Vec<u8> {
    compress_to_vec(plain.as_bytes(), CompressionLevel::Fastest)
}

fn encoded(path: &str, encoding: &str, body: impl Into<Vec<u8>>) -> Request {
    Request::new("POST", path).header("content-type", "application/json").header("content-encoding", encoding).body(body)
}

const CHAT: &str = r#"{ "model":"ollama/tiny-story", "store":true, "messages":[{"role":"system","content":"S"},{"role":"user","content":"hi"}] }"#;

#[tokio::test]
async fn a_body_in_zstd_is_judged_filtered_and_passed_on_decoded() {
    let house = House::open().await;
    for (path, body) in [
        ("/v1/chat/completions", CHAT),
        ("/v1/responses", r#"{"model":"ollama/tiny-story","input":"hi","instructions":"S"}"#),
        ("/v1/messages", r#"{"model":"ollama/tiny-story","max_tokens":9,"system":"S","messages":[{"role":"user","content":"hi"}]}"#),
        ("/v1/completions", r#"{"model":"ollama/tiny-story","prompt":"hi"}"#),
        ("/v1/embeddings", r#"{"model":"ollama/tiny-embed","input":"hi"}"#),
    ] {
        for chunked in [false, true] {
            house.simulator.forget();
            let id = format!("{path}-{chunked}");
            let mut request = encoded(path, "zstd", zstd(body)).bearer(&house.token()).id(&id);
            if chunked {
                request = request.chunked(7);
            }
            let reply = house.send(request).await;
            assert_eq!((reply.status, reply.end), (200, End::Whole), "{path}: {}", reply.text());
            let seen = &house.simulator.seen()[0];
            let sent = body.replace("ollama/", "").replace(r#" "store":true,"#, "");
            assert_eq!(String::from_utf8_lossy(&seen.body), sent, "{path}");
            assert_eq!(seen.header("content-encoding"), None, "{path}");
            assert_eq!(seen.header("content-length"), Some(sent.len().to_string().as_str()), "{path}");
            let extra = &house.final_of(&id).await["extra"];
            assert_eq!(extra["filters"][0], "model_prefix", "{path}");
            assert_eq!(extra["has_system_prompt"], json!(body.contains("\"S\"")), "{path}");
        }
    }
}

#[tokio::test]
async fn a_large_body_in_many_blocks_arrives_byte_for_byte() {
    let house = House::open().await;
    let text: String = (0..200_000u32).map(|n| format!("{:08x}", n.wrapping_mul(2_654_435_761))).collect();
    let body = format!(r#"{{"model":"tiny-story","messages":[{{"role":"user","content":"{text}"}}]}}"#);
    let request = encoded("/v1/chat/completions", "zstd", zstd(&body)).bearer(&house.token()).id("large");
    assert_eq!(house.send(request).await.status, 200);
    use sha2::Digest as _;
    let wanted: [u8; 32] = sha2::Sha256::digest(body.as_bytes()).into();
    let seen = &house.simulator.seen()[0];
    assert_eq!((seen.body_bytes, seen.body_sha256), (body.len() as u64, wanted));
}

#[tokio::test]
async fn every_other_encoding_is_415_and_so_is_zstd_where_ollama_does_not_take_it() {
    let house = House::open().await;
    let token = house.token();
    for (path, encoding) in [
        ("/v1/chat/completions", "gzip"),
        ("/v1/chat/completions", "br"),
        ("/v1/chat/completions", "ZSTD"),
        ("/v1/chat/completions", "zstd, zstd"),
        ("/v1/chat/completions", "gzip, zstd"),
        ("/v1/chat/completions", ""),
        ("/api/chat", "zstd"),
        ("/api/show", "zstd"),
    ] {
        let reply = house.send(encoded(path, encoding, zstd(CHAT)).bearer(&token)).await;
        assert_eq!((reply.status, reply.code()), (415, "unsupported_encoding".to_owned()), "{path} {encoding:?}");
    }
    let twice = encoded("/v1/responses", "zstd", zstd(CHAT)).header("content-encoding", "zstd").bearer(&token);
    assert_eq!(house.send(twice).await.status, 415);
    let tokens = encoded("/api/v1/auth/token", "zstd", zstd("{}"));
    assert_eq!(house.send(tokens).await.status, 415, "our own routes take plain bodies");
    let plain = encoded("/v1/chat/completions", "identity", CHAT.replace("ollama/", "")).bearer(&token);
    assert_eq!(house.send(plain).await.status, 200);
}

#[tokio::test]
async fn a_bomb_is_refused_while_it_is_decoded_and_garbage_is_said_to_be_none() {
    let plan = Plan { config: "[limits]\nbody_bytes = 2000000\n".to_owned(), ..Plan::default() };
    let house = House::with(plan).await;
    // 32 GB of spaces in a megabyte: a frame of blocks that repeat a byte 128 KiB times.
    let mut bomb = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x38];
    for _ in 0..250_000 {
        bomb.extend_from_slice(&[0x02, 0x00, 0x10, b' ']);
    }
    let cases = [
        (bomb, 413, "body_too_large"),
        (zstd(&" ".repeat(2_000_001)), 413, "body_too_large"),
        (vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa0, 0x19, 0, 0, b'x'], 400, "invalid_body"),
        (b"PROMPT-CANARY".to_vec(), 400, "invalid_body"),
        (CHAT.as_bytes().to_vec(), 400, "invalid_body"),
        (zstd(CHAT)[..20].to_vec(), 400, "invalid_body"),
        ([zstd(CHAT), b"PROMPT-CANARY".to_vec()].concat(), 400, "invalid_body"),
        (Vec::new(), 400, "invalid_body"),
    ];
    for (number, (body, status, code)) in cases.into_iter().enumerate() {
        let id = format!("bad-{number}");
        let request = encoded("/v1/responses", "zstd", body).bearer(&house.token()).id(&id);
        let reply = house.send(request).await;
        assert_eq!((reply.status, reply.code()), (status, code.to_owned()), "{number}");
        assert!(!reply.text().contains("CANARY"));
        assert_eq!(house.final_of(&id).await["response_code"], status, "{number}");
    }
    assert_eq!(house.simulator.connections(), 0);
    assert!(!(house.log() + &house.audit_text()).contains("PROMPT-CANARY"));
    // What fits passes, and nothing is held of what did not.
    let fits = zstd(&format!("{CHAT}{}", " ".repeat(1_900_000)));
    assert_eq!(house.send(encoded("/v1/chat/completions", "zstd", fits).bearer(&house.token())).await.status, 200);
}
