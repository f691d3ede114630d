//! What a token costs: at its first sight and from the cache of verified tokens, refused for each kind of reason, and looked up among
//! the revoked. Prints a section for bench/RESULTS.md.
//!
//! ```text
//! cargo run --release --example token_cost
//! ```
//! Times are of the CPU, of one thread, in microseconds: the median of the rounds, and their range. Other work on the machine makes
//! caches colder, but is not counted.
use behavry_ollama_proxy::identity::issuer::Claims;
use behavry_ollama_proxy::identity::revocations::Revocations;
use behavry_ollama_proxy::identity::{Algorithm, Issuer, KeySet, SigningKey, Verifier, VerifierSettings};

#[path = "cost/cpu.rs"]
mod cpu;
#[path = "cost/rounds.rs"]
mod rounds;

use rounds::{Cost, ROUNDS, measure};

/// Fewer than the cache holds, so that a second pass finds each.
const TOKENS: usize = 1000;
const NOW_S: i64 = 1_800_000_000;

fn main() {
    println!("### Tokens (`cargo run --release --example token_cost`), CPU µs for each\n");
    println!("Median (range) of {ROUNDS} rounds of {TOKENS} tokens.\n");
    let signers = [
        ("RS256", SigningKey::generate(Algorithm::Rs256)),
        ("ES256", SigningKey::generate(Algorithm::Es256)),
        ("EdDSA", SigningKey::generate(Algorithm::EdDsa)),
        ("HS256", SigningKey::from_secret(b"a secret of the bench's, of more than 32 bytes")),
    ];
    println!("| | first sight | from the cache | bad signature | good signature, expired |");
    println!("|---|---|---|---|---|");
    let mut last = None;
    for (name, key) in signers {
        let signer = Signer::new(key.expect("a good key"));
        println!("| {name} | {} |", signer.costs().map(|cost| cost.to_string()).join(" | "));
        last = Some(signer);
    }
    let signer = last.expect("four");
    println!("\n| refused before any signature is checked | |\n|---|---|");
    for (name, token) in signer.hopeless() {
        let cost = measure(TOKENS, || {
            let (verifier, token) = (signer.verifier(), &token);
            move || (0..TOKENS).for_each(|_| assert!(verifier.verify_token(token, NOW_S).is_err()))
        });
        println!("| {name} | {cost} |");
    }
    println!("\n| revoked sessions | a lookup |\n|---|---|");
    let (token, _) = signer.issuer.mint(&signer.claims(0), NOW_S).expect("good claims");
    let caller = signer.verifier().verify_token(&token, NOW_S).expect("it holds");
    for count in [0, 1, 1000, 20_000] {
        let entry = |n| format!("[[revoked]]\nsession = \"gone-{n}\"\nat = 2026-01-01T00:00:00Z\n");
        let list = Revocations::parse(&(0..count).map(entry).collect::<String>()).expect("a good list");
        let (list, caller) = (&list, &caller);
        let cost = measure(TOKENS, || {
            move || (0..TOKENS).for_each(|_| assert!(!std::hint::black_box(list).name(std::hint::black_box(caller))))
        });
        println!("| {count} | {cost} |");
    }
}

/// An issuer, and verifiers that know its key.
struct Signer {
    issuer: Issuer,
}

impl Signer {
    fn new(key: SigningKey) -> Signer {
        Signer { issuer: Issuer::new(key, "behavry", 3600) }
    }

    /// One that has seen nothing yet.
    fn verifier(&self) -> Verifier {
        let keys = KeySet::new(vec![self.issuer.key().verification_key()]).expect("one key");
        let settings = VerifierSettings { issuer: "behavry".into(), audience: None, leeway_s: 30 };
        Verifier::new(keys, settings)
    }

    fn claims(&self, number: usize) -> Claims {
        Claims {
            sub: format!("agent-{number}"),
            roles: vec!["internal".into()],
            permissions: vec!["web:read".into(), "web:write".into()],
            ..Claims::default()
        }
    }

    /// First sight, from the cache, bad signature, expired.
    fn costs(&self) -> [Cost; 4] {
        let mint = |number| self.issuer.mint(&self.claims(number), NOW_S).expect("good claims").0;
        let tokens: Vec<String> = (0..TOKENS).map(mint).collect();
        let forged: Vec<String> = tokens.iter().map(|token| forge(token)).collect();
        let good = |verifier: &Verifier| {
            tokens.iter().for_each(|token| assert!(verifier.verify_token(token, NOW_S).is_ok()));
        };
        let refused = |tokens: &[String], verifier: &Verifier, now_s: i64| {
            tokens.iter().for_each(|token| assert!(verifier.verify_token(token, now_s).is_err()));
        };
        [
            measure(TOKENS, || {
                let verifier = self.verifier();
                move || good(&verifier)
            }),
            measure(TOKENS, || {
                let verifier = self.verifier();
                good(&verifier);
                move || good(&verifier)
            }),
            measure(TOKENS, || {
                let verifier = self.verifier();
                let forged = &forged;
                move || refused(forged, &verifier, NOW_S)
            }),
            measure(TOKENS, || {
                let verifier = self.verifier();
                let tokens = &tokens;
                move || refused(tokens, &verifier, NOW_S + 86_400)
            }),
        ]
    }

    /// What is refused by its looks.
    fn hopeless(&self) -> [(&'static str, String); 4] {
        let token = self.issuer.mint(&self.claims(0), NOW_S).expect("good claims").0;
        let (_, rest) = token.split_once('.').expect("three segments");
        let none = "eyJhbGciOiJub25lIn0"; // {"alg":"none"}
        [
            ("`alg` is `none`", format!("{none}.{rest}")),
            ("two segments", token[..token.rfind('.').expect("three segments")].to_owned()),
            ("no base64", format!("{token}!")),
            ("17 KiB long", "a".repeat(17 << 10)),
        ]
    }
}

/// Another character in the middle of the signature.
fn forge(token: &str) -> String {
    let place = token.rfind('.').expect("three segments") + 20;
    let other = if &token[place..=place] == "A" { "B" } else { "A" };
    let mut forged = token.to_owned();
    forged.replace_range(place..=place, other);
    forged
}
