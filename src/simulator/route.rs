//! Which handler a request meets, and what Go's mux and Ollama's middleware say before it: redirects, 404, 405, hosts
//! and origins.

use super::reply::{Framing, Reply, TEXT};

/// Ollama's routes, as far as they are simulated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    Root,
    Version,
    Status,
    Tags,
    Ps,
    Show,
    Chat,
    Generate,
    Embed,
    Embeddings,
    OpenAiChat,
    Completions,
    OpenAiEmbeddings,
    OpenAiModels,
    OpenAiModel,
    Responses,
    Messages,
    Pull,
    Push,
    Create,
    Copy,
    Delete,
    Blob,
}

/// Whose words an answer is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    Native,
    OpenAi,
    Anthropic,
}

impl Route {
    /// Computes something: the routes on which faults strike.
    pub fn infers(self) -> bool {
        use Route::*;
        matches!(
            self,
            Chat | Generate | Embed | Embeddings | OpenAiChat | Completions | OpenAiEmbeddings | Responses | Messages
        )
    }

    pub fn dialect(self) -> Dialect {
        use Route::*;
        match self {
            OpenAiChat | Completions | OpenAiEmbeddings | OpenAiModels | OpenAiModel | Responses => Dialect::OpenAi,
            Messages => Dialect::Anthropic,
            _ => Dialect::Native,
        }
    }
}

/// Path, methods as `Allow` lists them, route. A path that ends in a colon takes one more segment.
const TABLE: &[(&str, &[&str], Route)] = &[
    ("/", &["HEAD", "GET"], Route::Root),
    ("/api/version", &["HEAD", "GET"], Route::Version),
    ("/api/status", &["GET"], Route::Status),
    ("/api/tags", &["HEAD", "GET"], Route::Tags),
    ("/api/ps", &["GET"], Route::Ps),
    ("/api/show", &["POST"], Route::Show),
    ("/api/chat", &["POST"], Route::Chat),
    ("/api/generate", &["POST"], Route::Generate),
    ("/api/embed", &["POST"], Route::Embed),
    ("/api/embeddings", &["POST"], Route::Embeddings),
    ("/v1/chat/completions", &["POST"], Route::OpenAiChat),
    ("/v1/completions", &["POST"], Route::Completions),
    ("/v1/embeddings", &["POST"], Route::OpenAiEmbeddings),
    ("/v1/models", &["GET"], Route::OpenAiModels),
    ("/v1/models/:", &["GET"], Route::OpenAiModel),
    ("/v1/responses", &["POST"], Route::Responses),
    ("/v1/messages", &["POST"], Route::Messages),
    ("/api/pull", &["POST"], Route::Pull),
    ("/api/push", &["POST"], Route::Push),
    ("/api/create", &["POST"], Route::Create),
    ("/api/copy", &["POST"], Route::Copy),
    ("/api/delete", &["DELETE"], Route::Delete),
    ("/api/blobs/:", &["POST", "HEAD"], Route::Blob),
];

/// A route that was met, with the segment of its path that names something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Met {
    pub route: Route,
    pub segment: String,
    /// The origin that CORS answers for.
    pub origin: Option<String>,
}

/// Finds the route of a request, or the reply that stands in its way.
pub(super) fn meet(method: &str, target: &str, host: Option<&str>, origin: Option<&str>) -> Result<Met, Reply> {
    let (authority, rest) = match target.split_once("://") {
        Some((_, rest)) => match rest.find('/') {
            Some(slash) => (Some(&rest[..slash]), &rest[slash..]),
            None => (Some(rest), "/"),
        },
        None => (None, target),
    };
    let path = rest.split('?').next().unwrap_or(rest);
    // Go's ServeMux cleans the path as it is written, gin's router sees it decoded.
    if let Some(clean) = cleaned(path) {
        return Err(redirect(307, "Temporary Redirect", method, &clean));
    }
    let Some(path) = decoded(path) else {
        return Err(Reply::new(400, "text/plain; charset=utf-8", "400 Bad Request").with("Connection", "close"));
    };
    let found = find(&path);
    if found.is_none()
        && let Some(shorter) = path.strip_suffix('/')
        && find(shorter).is_some()
    {
        return Err(match method {
            "GET" => redirect(301, "Moved Permanently", method, shorter),
            _ => redirect(307, "Temporary Redirect", method, shorter),
        });
    }
    let allow =
        found.as_ref().filter(|(methods, _, _)| !methods.contains(&method)).map(|(methods, _, _)| methods.join(", "));
    let barred = |status| {
        let reply = Reply::empty(status);
        match &allow {
            Some(methods) => reply.with("Allow", methods.clone()),
            None => reply,
        }
    };
    if !local_host(authority.or(host).unwrap_or_default()) {
        return Err(barred(403));
    }
    let mut granted = None;
    if let Some(origin) = origin.filter(|origin| !own_origin(origin, authority.or(host).unwrap_or_default())) {
        if !local_origin(origin) {
            return Err(barred(403));
        }
        if method == "OPTIONS" {
            return Err(preflight(barred(204), origin));
        }
        granted = Some(origin.to_owned());
    }
    match (found, allow) {
        (None, _) => Err(unknown()),
        (Some(_), Some(methods)) => Err(Reply::new(405, TEXT, "405 method not allowed").with("Allow", methods)),
        (Some((_, route, segment)), None) => Ok(Met { route, segment, origin: granted }),
    }
}

/// What Go's router says where there is nothing.
pub(super) fn unknown() -> Reply {
    Reply::new(404, TEXT, "404 page not found")
}

fn find(path: &str) -> Option<(&'static [&'static str], Route, String)> {
    TABLE.iter().find_map(|(pattern, methods, route)| match pattern.strip_suffix(':') {
        None => (*pattern == path).then(|| (*methods, *route, String::new())),
        Some(prefix) => {
            let segment = path.strip_prefix(prefix)?;
            (!segment.is_empty() && !segment.contains('/')).then(|| (*methods, *route, segment.to_owned()))
        }
    })
}

/// The path without empty, `.` and `..` segments, if it has any.
fn cleaned(path: &str) -> Option<String> {
    let inner = path.strip_prefix('/')?;
    let unclean = |segment: &str| matches!(segment, "." | "..");
    if !path.contains("//") && !inner.split('/').any(unclean) {
        return None;
    }
    let mut kept: Vec<&str> = Vec::new();
    for segment in inner.split('/') {
        match segment {
            "" | "." => {}
            ".." => drop(kept.pop()),
            segment => kept.push(segment),
        }
    }
    let slash = if path.ends_with('/') && !kept.is_empty() { "/" } else { "" };
    Some(format!("/{}{slash}", kept.join("/")))
}

fn decoded(path: &str) -> Option<String> {
    if !path.contains('%') {
        return Some(path.to_owned());
    }
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        if byte == b'%' {
            let digits = std::str::from_utf8(tail.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &tail[2..];
        } else {
            bytes.push(byte);
        }
    }
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

fn redirect(status: u16, words: &str, method: &str, to: &str) -> Reply {
    let reply = match method {
        "GET" => Reply::new(status, "text/html; charset=utf-8", format!("<a href=\"{to}\">{words}</a>.\n\n")),
        _ => Reply::empty(status),
    };
    reply.with("Location", to.to_owned())
}

/// Ollama's rule for a server that is bound to loopback, as the simulator is.
fn local_host(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    let name = name.to_ascii_lowercase();
    if let Ok(address) = name.parse::<std::net::Ipv4Addr>() {
        return address.is_loopback() || address.is_private() || address.is_unspecified();
    }
    if let Ok(address) = name.parse::<std::net::Ipv6Addr>() {
        return address.is_loopback() || address.is_unspecified();
    }
    name.is_empty()
        || name == "localhost"
        || [".localhost", ".local", ".internal"].iter().any(|end| name.ends_with(end))
}

fn own_origin(origin: &str, host: &str) -> bool {
    origin.split_once("://").is_some_and(|(_, authority)| authority == host)
}

fn local_origin(origin: &str) -> bool {
    match origin.split_once("://") {
        Some(("http" | "https", authority)) => {
            let name = authority.rsplit_once(':').map_or(authority, |(name, _)| name);
            matches!(name, "localhost" | "127.0.0.1" | "0.0.0.0")
        }
        Some((scheme, _)) => matches!(scheme, "app" | "file" | "tauri" | "vscode-webview" | "vscode-file"),
        None => false,
    }
}

fn preflight(reply: Reply, origin: &str) -> Reply {
    const HEADERS: &str = "Authorization,Content-Type,User-Agent,Accept,X-Requested-With,Openai-Beta,X-Stainless-Arch,\
        X-Stainless-Async,X-Stainless-Custom-Poll-Interval,X-Stainless-Helper-Method,X-Stainless-Lang,X-Stainless-Os,\
        X-Stainless-Package-Version,X-Stainless-Poll-Helper,X-Stainless-Retry-Count,X-Stainless-Runtime,\
        X-Stainless-Runtime-Version,X-Stainless-Timeout";
    let mut reply = reply
        .with("Access-Control-Allow-Headers", HEADERS)
        .with("Access-Control-Allow-Methods", "GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS")
        .with("Access-Control-Allow-Origin", origin.to_owned())
        .with("Access-Control-Max-Age", "43200")
        .with("Vary", "Origin")
        .with("Vary", "Access-Control-Request-Method")
        .with("Vary", "Access-Control-Request-Headers");
    reply.framing = Framing::Bare;
    reply
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(method: &str, target: &str) -> u16 {
        meet(method, target, Some("127.0.0.1:11434"), None).map_or_else(|reply| reply.status, |_| 200)
    }

    #[test]
    fn unclean_paths_are_redirected_and_encoded_ones_are_decoded() {
        for (target, expected) in [
            ("/api/tags", 200),
            ("/api/tags?x=1", 200),
            ("/api%2ftags", 200),
            ("/api/%74ags", 200),
            ("//api/tags", 307),
            ("/x/../api/tags", 307),
            ("/%2fapi/tags", 404),
            ("/x/%2e%2e/api/tags", 404),
            ("/api/tags/", 301),
            ("/api/%zz", 400),
            ("/v1/models/a", 200),
            ("/v1/models/a%2Fb", 404),
            ("/API/tags", 404),
        ] {
            assert_eq!(status("GET", target), expected, "{target}");
        }
        assert_eq!(status("POST", "/api/tags"), 405);
    }

    #[test]
    fn foreign_hosts_and_origins_are_forbidden() {
        let status = |host, origin| meet("GET", "/", Some(host), origin).map_or_else(|reply| reply.status, |_| 200);
        for host in ["localhost", "LOCALHOST:1", "x.local", "10.0.0.1:80", "[::1]:80", "127.0.0.1", ""] {
            assert_eq!(status(host, None), 200, "{host}");
        }
        for host in ["example.com", "8.8.8.8"] {
            assert_eq!(status(host, None), 403, "{host}");
        }
        assert_eq!(status("localhost", Some("http://example.com")), 403);
        assert_eq!(status("localhost", Some("null")), 403);
        assert_eq!(status("localhost", Some("http://localhost:3000")), 200);
    }
}
