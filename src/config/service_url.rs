//! Where a service that we call ourselves is: a key set, a token endpoint, a webhook.
//!
//! `https`, or `http` to this machine alone. Whoever answers such a URL decides who is an agent, or reads a client's secret, and over
//! `http` that is anybody on the way. There is no switch for less: a CA of one's own is the remedy. (docs/adr/0025-outbound.md)

use std::fmt;

use http::Uri;
use serde::de::Error as _;
use serde::{Deserializer, Serializer};

use super::values::{BackendUrl, secret_text};

/// A URL with a scheme, a host, and any path and query. Its `Display` leaves the query out: some put a key there.
#[derive(Clone, PartialEq, Eq)]
pub struct ServiceUrl(Uri);

impl ServiceUrl {
    /// `https://host[:port]/path?query`; `http://` only to `localhost`, 127.0.0.0/8 and [::1].
    pub fn parse(url: &str) -> Result<ServiceUrl, String> {
        let bad = |what: &str| Err(format!("the URL {what}; write it as https://host/path"));
        let start = url.find("://").map_or(0, |at| at + 3);
        let end = url[start..].find(['/', '?', '#']).map_or(url.len(), |at| start + at);
        // Its checks of scheme, host and port are the same; its words are about Ollama.
        let Ok(origin) = BackendUrl::parse(&url[..end]) else {
            return bad("has no scheme, host or port that can be used");
        };
        if origin.has_userinfo() {
            return bad("has a user or password, which would be shown wherever the URL is");
        }
        if !origin.is_tls() && !origin.is_loopback() {
            return bad("is http, so that anybody on the way could answer in its place");
        }
        if url.contains('#') {
            return bad("has a fragment, which is never sent");
        }
        let Ok(uri) = url.parse::<Uri>() else {
            return bad("has characters that must be percent-encoded");
        };
        Ok(ServiceUrl(uri))
    }

    /// The whole of it, for a request.
    pub fn uri(&self) -> &Uri {
        &self.0
    }

    /// For a field of the file; an empty text is none.
    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Option<ServiceUrl>, D::Error> {
        let text = secret_text(d)?;
        if text.is_empty() { Ok(None) } else { ServiceUrl::parse(&text).map(Some).map_err(D::Error::custom) }
    }

    /// For the settings as they are shown: without the query.
    pub fn serialize_redacted<S: Serializer>(url: &Option<ServiceUrl>, s: S) -> Result<S::Ok, S::Error> {
        match url {
            Some(url) if url.0.query().is_some() => s.serialize_str(&format!("{url}?(redacted)")),
            Some(url) => s.collect_str(url),
            None => s.serialize_str(""),
        }
    }
}

impl fmt::Display for ServiceUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, authority) = (self.0.scheme_str().unwrap_or(""), self.0.authority().map_or("", |it| it.as_str()));
        write!(f, "{scheme}://{authority}{}", self.0.path())
    }
}

impl fmt::Debug for ServiceUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn https_goes_anywhere_and_http_only_to_this_machine() {
        for good in [
            "https://keys.example/.well-known/jwks.json",
            "https://keys.example",
            "https://keys.example:8443/a?b=c",
            "https://[2001:db8::1]/keys",
            "HTTPS://keys.example/",
            "http://localhost:8080/keys",
            "http://127.0.0.1:1/keys",
            "http://[::1]:1/keys",
        ] {
            let url = ServiceUrl::parse(good).unwrap_or_else(|e| panic!("{good}: {e}"));
            assert!(url.uri().host().is_some_and(|host| !host.is_empty()), "{good}");
        }
        for (bad, words) in [
            ("http://keys.example/keys", "anybody on the way"),
            ("http://10.0.0.1/keys", "anybody on the way"),
            ("http://localhost.evil.example/keys", "anybody on the way"),
            ("https://user:pass@keys.example/", "user or password"),
            ("https://keys.example/a#b", "fragment"),
            ("https://keys.example/a b", "percent-encoded"),
            ("https://", "no scheme, host or port"),
            ("https:///keys", "no scheme, host or port"),
            ("ftp://keys.example/", "no scheme, host or port"),
            ("keys.example/keys", "no scheme, host or port"),
            ("https://keys.example:0/", "no scheme, host or port"),
            ("https://keys.example:99999/", "no scheme, host or port"),
            ("https://keys.example?http://localhost@x", "neither"),
        ] {
            match ServiceUrl::parse(bad) {
                Ok(url) if words == "neither" => assert_eq!(url.uri().host(), Some("keys.example")),
                Ok(_) => panic!("{bad} must not be taken"),
                Err(e) => assert!(e.contains(words), "{bad}: {e}"),
            }
        }
    }

    #[test]
    fn what_stands_in_the_query_is_never_shown() {
        let url = ServiceUrl::parse("https://keys.example/a?key=hidden").unwrap();
        assert_eq!(
            (url.to_string().as_str(), format!("{url:?}").as_str()),
            ("https://keys.example/a", "https://keys.example/a")
        );
        assert_eq!(url.uri().query(), Some("key=hidden"));
    }
}
