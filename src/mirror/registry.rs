//! The model's own registry: what Ollama asks of it, asked once.
//!
//! As Ollama does (0.17.4: `server/images.go`, `server/download.go`): the manifest by its tag, each blob by its digest, and ten redirects
//! at most, which lead to the network that holds the blobs. Unlike Ollama: none off https, and none to an address nearer than the
//! registry's own. No key is sent; a registry that asks for one is left to the backends, which have theirs.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http::header::{ACCEPT, HeaderName, HeaderValue, LOCATION};

use super::Fault;
use super::manifest;
use crate::config::ServiceUrl;
use crate::outbound::reach::Reach;
use crate::outbound::{Opened, Outbound};
use crate::wire::model::ModelRef;

/// For a reply's head, and for each piece of a manifest.
const HEAD: Duration = Duration::from_secs(30);
const REDIRECTS: usize = 10;
pub(super) const MANIFEST_TYPE: &str = "application/vnd.docker.distribution.manifest.v2+json";

pub(super) struct Registry {
    /// `https://host[:port]`.
    origin: String,
    /// `/v2/namespace/model`, in the letters that the caller wrote: some registries tell them apart.
    path: String,
    tag: String,
    own: Outbound,
    /// For where it sends us.
    others: Outbound,
}

impl Registry {
    pub async fn find(outbound: &Outbound, model: &ModelRef, plain: bool) -> Result<Registry, Fault> {
        let spelled = model.spelled();
        let scheme = if plain { "http" } else { "https" };
        let origin = format!("{scheme}://{}", model.host);
        let url = ServiceUrl::parse(&origin).map_err(|_| {
            Fault::Registry(if plain {
                "is to be asked by http, and is not on this machine"
            } else {
                "has a name that is no host"
            })
        })?;
        let (host, port) = (url.uri().host().unwrap_or_default().to_owned(), url.uri().port_u16().unwrap_or(443));
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let found = tokio::time::timeout(HEAD, tokio::net::lookup_host((host, port))).await;
        let found = found.ok().and_then(Result::ok).ok_or(Fault::Registry("has no address"))?;
        let most = found.filter_map(|address| Reach::of(address.ip())).max().unwrap_or(Reach::Public);
        Ok(Registry {
            origin,
            path: format!("/v2/{}/{}", spelled.namespace, spelled.name),
            tag: spelled.tag.to_owned(),
            own: outbound.clone(),
            others: outbound.within(most),
        })
    }

    pub async fn manifest(&self) -> Result<Bytes, Fault> {
        let accept = [(ACCEPT, HeaderValue::from_static(MANIFEST_TYPE))];
        let mut reply = self.open(&format!("{}/manifests/{}", self.path, self.tag), &accept).await?;
        let mut bytes = BytesMut::new();
        while let Some(piece) = reply.next(HEAD).await.map_err(Fault::Outbound)? {
            if bytes.len() + piece.len() > manifest::MOST_BYTES {
                return Err(Fault::Manifest("is too long"));
            }
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes.freeze())
    }

    pub async fn blob(&self, digest: &str) -> Result<Opened, Fault> {
        self.open(&format!("{}/blobs/{digest}", self.path), &[]).await
    }

    async fn open(&self, path: &str, headers: &[(HeaderName, HeaderValue)]) -> Result<Opened, Fault> {
        let mut url = format!("{}{path}", self.origin);
        for _ in 0..=REDIRECTS {
            let parsed = ServiceUrl::parse(&url).map_err(|_| Fault::Registry("redirects to what is no https URL"))?;
            let is_own = origin_of(&url) == self.origin;
            let client = if is_own { &self.own } else { &self.others };
            let reply = client.open(&parsed, headers, HEAD).await.map_err(Fault::Outbound)?;
            match reply.status {
                200 => return Ok(reply),
                301 | 302 | 303 | 307 | 308 => url = redirected(&url, &self.origin, &reply.headers)?,
                401 | 403 if is_own => return Err(Fault::NeedsKey),
                status => return Err(Fault::Status(status)),
            }
        }
        Err(Fault::Registry("redirects in a circle"))
    }
}

/// Where a redirect leads. `registry` is the origin that was asked first: what began with https ends there.
fn redirected(from: &str, registry: &str, headers: &HeaderMap) -> Result<String, Fault> {
    let no = Fault::Registry("redirects to what is no https URL");
    let to = headers.get(LOCATION).and_then(|to| to.to_str().ok()).ok_or(no)?;
    let to = match to {
        to if to.starts_with('/') && !to.starts_with("//") => format!("{}{to}", origin_of(from)),
        to => to.to_owned(),
    };
    let secure = |url: &str| url.get(..8).is_some_and(|start| start.eq_ignore_ascii_case("https://"));
    if secure(&to) || (!secure(registry) && ServiceUrl::parse(&to).is_ok()) { Ok(to) } else { Err(no) }
}

/// Scheme, host and port of a URL, as it is written.
fn origin_of(url: &str) -> &str {
    let start = url.find("://").map_or(0, |at| at + 3);
    let end = url[start..].find(['/', '?', '#']).map_or(url.len(), |at| start + at);
    &url[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redirect_stays_on_https_where_it_began_there() {
        let to = |from: &str, registry: &str, location: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(LOCATION, HeaderValue::from_str(location).unwrap());
            redirected(from, registry, &headers).ok()
        };
        let registry = "https://registry.example";
        let from = "https://registry.example/v2/a/b";
        for (location, expected) in [
            ("/elsewhere?x=1", Some("https://registry.example/elsewhere?x=1")),
            ("https://cdn.example/blob?signed", Some("https://cdn.example/blob?signed")),
            ("HTTPS://cdn.example/", Some("HTTPS://cdn.example/")),
            ("http://cdn.example/blob", None),
            ("http://127.0.0.1:11434/api/delete", None),
            ("//cdn.example/blob", None),
            ("ftp://cdn.example/", None),
            ("file:///etc/passwd", None),
            ("elsewhere", None),
            ("", None),
        ] {
            assert_eq!(to(from, registry, location).as_deref(), expected, "{location}");
        }
        // From a path of a host that it was sent to, a bare path is that host's.
        assert_eq!(to("https://cdn.example/x", registry, "/y").as_deref(), Some("https://cdn.example/y"));
        // A registry on this machine, which may be http.
        let local = "http://127.0.0.1:5000";
        assert!(to("http://127.0.0.1:5000/v2/a", local, "http://localhost:9/blob").is_some());
        assert!(to("http://127.0.0.1:5000/v2/a", local, "http://10.0.0.1/blob").is_none());
        assert!(redirected(from, registry, &HeaderMap::new()).is_err());
    }
}
