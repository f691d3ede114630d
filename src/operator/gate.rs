//! Who is answered: names that are ours (against DNS rebinding), pages of this origin, and the credential where there is one.

use std::net::IpAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header;
use pingora::http::RequestHeader;
use sha2::{Digest, Sha256};

/// A credential has so many bytes at least: past guessing, as with the shared secret of HS256.
const CREDENTIAL_BYTES: usize = 32;
/// A header that is longer carries no credential of ours.
const HEADER_BYTES: usize = 8192;

/// What the operator's listener asks of a request before it looks at the route.
pub struct Gate {
    /// Besides addresses and `localhost`; in lower case, without a port.
    hosts: Vec<String>,
    /// Only its hash: nothing here can print or leak it, and two hashes are compared in the same time wherever they differ.
    credential: Option<[u8; 32]>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Pass,
    UnknownHost,
    /// A browser says that a page of another origin asks.
    OtherSite,
    NoCredential,
}

impl Gate {
    /// `credential`: the text of its file, without the line's end.
    pub fn new(hosts: &[String], credential: Option<&[u8]>) -> Result<Gate, String> {
        if let Some(text) = credential {
            if text.len() < CREDENTIAL_BYTES {
                return Err(format!(
                    "has {} bytes, and {CREDENTIAL_BYTES} is the least; make one with: openssl rand -hex 32",
                    text.len()
                ));
            }
            if !text.iter().all(u8::is_ascii_graphic) {
                return Err("has characters that no header can carry; make one with: openssl rand -hex 32".to_owned());
            }
        }
        Ok(Gate {
            hosts: hosts.iter().map(|host| host.to_ascii_lowercase()).collect(),
            credential: credential.map(|text| Sha256::digest(text).into()),
        })
    }

    /// `open`: the route asks for no credential.
    pub fn judge(&self, head: &RequestHeader, open: bool) -> Verdict {
        let text = |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok());
        // An absolute target names the host as well, and a client means that one (RFC 9112, section 3.2.2).
        let host = head.uri.host().or(text("host")).unwrap_or("");
        if !self.is_ours(host) {
            return Verdict::UnknownHost;
        }
        // CORS keeps the reply from another origin's page already; this keeps it from taking watchers' places as well. Links still lead here.
        let site = text("sec-fetch-site").unwrap_or("none");
        let follows_a_link = text("sec-fetch-mode") == Some("navigate") && text("sec-fetch-dest") == Some("document");
        if !matches!(site, "none" | "same-origin") && !follows_a_link {
            return Verdict::OtherSite;
        }
        match &self.credential {
            Some(credential) if !open && !carries(credential, text(header::AUTHORIZATION.as_str())) => {
                Verdict::NoCredential
            }
            _ => Verdict::Pass,
        }
    }

    /// A page of somebody else's whose name was made to resolve to us sends that name (DNS rebinding): only addresses, `localhost`
    /// and what the configuration lists are ours.
    fn is_ours(&self, host: &str) -> bool {
        let name = host
            .rsplit_once(':')
            .filter(|(_, port)| port.bytes().all(|byte| byte.is_ascii_digit()))
            .map_or(host, |(name, _)| name);
        let name = name.trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
        name == "localhost" || name.parse::<IpAddr>().is_ok() || self.hosts.contains(&name)
    }
}

/// As a bearer, or as a Basic password with any user: browsers set no header on an `EventSource`, but repeat Basic.
fn carries(credential: &[u8; 32], authorization: Option<&str>) -> bool {
    let Some((scheme, value)) =
        authorization.filter(|text| text.len() <= HEADER_BYTES).and_then(|text| text.split_once(' '))
    else {
        return false;
    };
    let value = value.trim();
    let said = if scheme.eq_ignore_ascii_case("bearer") {
        value.as_bytes().to_vec()
    } else if scheme.eq_ignore_ascii_case("basic") {
        let Ok(pair) = STANDARD.decode(value) else { return false };
        let Some(colon) = pair.iter().position(|byte| *byte == b':') else { return false };
        pair[colon + 1..].to_vec()
    } else {
        return false;
    };
    let said: [u8; 32] = Sha256::digest(said).into();
    said.iter().zip(credential).fold(0, |differs, (a, b)| differs | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "0123456789abcdef0123456789abcdef";

    fn head(headers: &[(&'static str, &str)]) -> RequestHeader {
        let mut head = RequestHeader::build("GET", b"/", None).expect("a head");
        for (name, value) in headers {
            head.insert_header(*name, *value).expect("a header");
        }
        head
    }

    #[test]
    fn a_name_that_was_made_to_resolve_to_us_is_unknown() {
        let gate = Gate::new(&["Gateway.Internal".to_owned()], None).expect("a gate");
        for known in [
            "localhost",
            "LOCALHOST:5173",
            "127.0.0.1:5173",
            "[::1]:5173",
            "[::1]",
            "10.0.0.7",
            "gateway.internal:5173",
        ] {
            assert_eq!(gate.judge(&head(&[("host", known)]), false), Verdict::Pass, "{known}");
        }
        for unknown in [
            "",
            "evil.example",
            "evil.example:5173",
            "localhost.evil.example",
            "127.0.0.1.evil.example:80",
            "x.gateway.internal",
        ] {
            assert_eq!(gate.judge(&head(&[("host", unknown)]), false), Verdict::UnknownHost, "{unknown}");
        }
    }

    #[test]
    fn another_sites_page_is_refused_and_a_link_from_it_is_not() {
        let gate = Gate::new(&[], None).expect("a gate");
        let ask = |site, mode, dest| {
            let headers =
                [("host", "localhost"), ("sec-fetch-site", site), ("sec-fetch-mode", mode), ("sec-fetch-dest", dest)];
            gate.judge(&head(&headers), false)
        };
        assert_eq!(ask("same-origin", "cors", "empty"), Verdict::Pass);
        assert_eq!(ask("none", "navigate", "document"), Verdict::Pass);
        assert_eq!(ask("cross-site", "navigate", "document"), Verdict::Pass);
        assert_eq!(ask("cross-site", "navigate", "iframe"), Verdict::OtherSite);
        assert_eq!(ask("cross-site", "no-cors", "image"), Verdict::OtherSite);
        assert_eq!(ask("same-site", "cors", "empty"), Verdict::OtherSite);
    }

    #[test]
    fn the_credential_passes_as_a_bearer_or_as_a_password_and_nothing_else_does() {
        let gate = Gate::new(&[], Some(TOKEN.as_bytes())).expect("a gate");
        let ask = |authorization: &str, open| {
            gate.judge(&head(&[("host", "localhost"), ("authorization", authorization)]), open)
        };
        let basic = |pair: &str| format!("Basic {}", STANDARD.encode(pair));
        for good in [
            format!("Bearer {TOKEN}"),
            format!("bearer  {TOKEN}"),
            basic(&format!("any:{TOKEN}")),
            basic(&format!(":{TOKEN}")),
        ] {
            assert_eq!(ask(&good, false), Verdict::Pass, "{good}");
        }
        for bad in [
            String::new(),
            TOKEN.to_owned(),
            "Bearer".to_owned(),
            "Bearer ".to_owned(),
            format!("Bearer {}", &TOKEN[1..]),
            format!("Bearer {TOKEN}0"),
            basic(TOKEN),
            basic(&format!("{TOKEN}:")),
            "Basic ???".to_owned(),
            format!("Digest {TOKEN}"),
            format!("Bearer {}", "x".repeat(10_000)),
        ] {
            assert_eq!(ask(&bad, false), Verdict::NoCredential, "{bad}");
            assert_eq!(ask(&bad, true), Verdict::Pass, "/livez asks for none");
        }
    }

    #[test]
    fn a_credential_that_can_be_guessed_or_not_be_sent_is_refused() {
        assert!(Gate::new(&[], Some(&TOKEN.as_bytes()[1..])).is_err());
        assert!(Gate::new(&[], Some("0123456789abcdef 0123456789abcdef".as_bytes())).is_err());
    }
}
