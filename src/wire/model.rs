//! Model names by Ollama's own rules (`types/model/name.go`, `internal/modelref`; ollama-wire 6.1).
//!
//! Ollama accepts many spellings of one model. A policy must see one, or a denied model is a matter of spelling.
use std::fmt;

const DEFAULT_HOST: &str = "registry.ollama.ai";
const DEFAULT_NAMESPACE: &str = "library";
const DEFAULT_TAG: &str = "latest";

/// How the namespace of a temporary name begins: a model that is on its way from the mirror to a backend (`crate::mirror`) has one for a
/// moment, of 64 hexadecimal digits behind this. Such names are shown to nobody.
pub const TEMPORARY: &str = "behavry-mirror-";

/// Where a model runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    Local,
    /// On ollama.com, with the server's identity: egress.
    Cloud,
}

impl Source {
    pub fn as_str(self) -> &'static str {
        match self {
            Source::Local => "local",
            Source::Cloud => "cloud",
        }
    }
}

/// One model, whatever way the caller spelled it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ModelRef {
    /// What the caller wrote (it fits Ollama's grammar, so it is safe to record).
    pub raw: String,
    /// All parts lower case, defaults filled in.
    pub host: String,
    pub namespace: String,
    pub name: String,
    pub tag: String,
    pub source: Source,
}

/// Why a text is no model name. It never quotes the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameError {
    /// Nothing but white space.
    Empty,
    /// More than one of `:cloud`, `:local` and `-cloud`.
    TwoSources,
    /// The part that breaks the rules for its length or its characters.
    Part(&'static str),
}

impl fmt::Display for NameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NameError::Empty => f.write_str("the model name is empty"),
            NameError::TwoSources => f.write_str("a model name takes one of :cloud and :local, once"),
            NameError::Part(part) => write!(
                f,
                "the {part} of the model name is not valid: use [host/][namespace/]model[:tag] with letters, digits, '_', '-' and '.'"
            ),
        }
    }
}

impl std::error::Error for NameError {}

/// Reads a model name as Ollama does: white space around it, a scheme in front and the letters' case do not count.
///
/// Stricter than Ollama where that costs no honest client anything: no white space inside (Ollama trims around `cloud`),
/// and a scheme must look like one. Versions before the suffixes `:cloud` and `:local` (0.17.4) read them as tags.
pub fn parse(raw: &str) -> Result<ModelRef, NameError> {
    let raw = raw.trim();
    if raw.is_empty() {
        return Err(NameError::Empty);
    }
    let (base, source) = cut_source(raw);
    if source.is_some() && cut_source(base).1.is_some() {
        return Err(NameError::TwoSources);
    }

    let Spelled { host, namespace, name, tag } = split(base);
    let host = match host.split_once("://") {
        Some((scheme, host)) if is_scheme(scheme) => host,
        Some(_) => return Err(NameError::Part("scheme")),
        None => host,
    };

    check("host", host, 350, b".:-")?;
    check("namespace", namespace, 80, b"-")?;
    check("model", name, 80, b".-")?;
    check("tag", tag, 80, b".-")?;
    Ok(ModelRef {
        raw: raw.to_owned(),
        host: host.to_ascii_lowercase(),
        namespace: namespace.to_ascii_lowercase(),
        name: name.to_ascii_lowercase(),
        tag: tag.to_ascii_lowercase(),
        source: source.unwrap_or(Source::Local),
    })
}

impl ModelRef {
    /// The name that a policy and the audit see (contract, section 3): lower case, without default registry and namespace,
    /// and without `:latest`. A cloud model keeps its `:cloud` or `-cloud`: a policy that allows `gpt-oss:120b` on the
    /// machines at hand has not allowed `gpt-oss:120b-cloud`.
    pub fn canonical(&self) -> String {
        let mut name = self.path();
        match (self.tag.as_str(), self.source) {
            (DEFAULT_TAG, Source::Local) => {}
            (DEFAULT_TAG, Source::Cloud) => name.push_str(":cloud"),
            (tag, source) => {
                name.push(':');
                name.push_str(tag);
                if source == Source::Cloud {
                    name.push_str("-cloud");
                }
            }
        }
        name
    }

    /// As Ollama lists it: like [`ModelRef::canonical`], but the tag is always there.
    pub fn display(&self) -> String {
        let mut name = self.canonical();
        if self.tag == DEFAULT_TAG && self.source == Source::Local {
            name.push(':');
            name.push_str(DEFAULT_TAG);
        }
        name
    }

    /// Whether it is a name that a model has only while it is on its way to a backend.
    pub fn is_temporary(&self) -> bool {
        let secret = self.namespace.strip_prefix(TEMPORARY);
        secret.is_some_and(|secret| secret.len() == 64 && secret.bytes().all(|b| b.is_ascii_hexdigit()))
    }

    /// The parts in the letters that the caller wrote.
    pub fn spelled(&self) -> Spelled<'_> {
        split(cut_source(&self.raw).0)
    }

    /// Whether two spellings mean one model.
    pub fn same_model(&self, other: &ModelRef) -> bool {
        self.name == other.name
            && self.tag == other.tag
            && self.namespace == other.namespace
            && self.host == other.host
            && self.source == other.source
    }

    fn path(&self) -> String {
        if self.host != DEFAULT_HOST {
            format!("{}/{}/{}", self.host, self.namespace, self.name)
        } else if self.namespace != DEFAULT_NAMESPACE {
            format!("{}/{}", self.namespace, self.name)
        } else {
            self.name.clone()
        }
    }
}

/// The parts of a name, in the caller's letters, defaults filled in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spelled<'a> {
    /// Perhaps with a scheme.
    pub host: &'a str,
    pub namespace: &'a str,
    pub name: &'a str,
    pub tag: &'a str,
}

fn split(base: &str) -> Spelled<'_> {
    let mut rest = base;
    let mut tag = DEFAULT_TAG;
    // A ':' before the last '/' belongs to the host (a port) or to a scheme.
    if let Some(colon) = rest.rfind(':')
        && rest.rfind('/').is_none_or(|slash| colon > slash)
    {
        tag = &rest[colon + 1..];
        rest = &rest[..colon];
    }
    let (rest, name) = cut_last_slash(rest);
    let (host, namespace) = match rest {
        None => (None, None),
        Some(rest) => {
            let (host, namespace) = cut_last_slash(rest);
            (host, Some(namespace))
        }
    };
    Spelled { host: host.unwrap_or(DEFAULT_HOST), namespace: namespace.unwrap_or(DEFAULT_NAMESPACE), name, tag }
}

/// Takes `:cloud`, `:local` or a tag's `-cloud` off the end.
fn cut_source(raw: &str) -> (&str, Option<Source>) {
    let Some(colon) = raw.rfind(':') else { return (raw, None) };
    let suffix = &raw[colon + 1..];
    if suffix.eq_ignore_ascii_case("cloud") {
        return (&raw[..colon], Some(Source::Cloud));
    }
    if suffix.eq_ignore_ascii_case("local") {
        return (&raw[..colon], Some(Source::Local));
    }
    const TAIL: &str = "-cloud";
    // The last six bytes are compared as bytes: they need not begin at a character.
    let cut = suffix.len().checked_sub(TAIL.len());
    if let Some(cut) = cut
        && !suffix.contains('/')
        && suffix.as_bytes()[cut..].eq_ignore_ascii_case(TAIL.as_bytes())
    {
        return (&raw[..raw.len() - TAIL.len()], Some(Source::Cloud));
    }
    (raw, None)
}

fn cut_last_slash(text: &str) -> (Option<&str>, &str) {
    match text.rfind('/') {
        Some(slash) => (Some(&text[..slash]), &text[slash + 1..]),
        None => (None, text),
    }
}

fn is_scheme(text: &str) -> bool {
    text.as_bytes().first().is_some_and(u8::is_ascii_alphabetic)
        && text.len() <= 32
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"+.-".contains(&b))
}

fn check(what: &'static str, part: &str, longest: usize, further: &[u8]) -> Result<(), NameError> {
    let bytes = part.as_bytes();
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let valid = !bytes.is_empty()
        && bytes.len() <= longest
        && word(bytes[0])
        && bytes[1..].iter().all(|&b| word(b) || further.contains(&b));
    if valid { Ok(()) } else { Err(NameError::Part(what)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn canonical(raw: &str) -> String {
        parse(raw).map(|m| m.canonical()).unwrap_or_else(|e| format!("{e:?}"))
    }

    #[test]
    fn every_spelling_of_a_model_has_one_canonical_name() {
        for raw in [
            "llama3.2",
            " llama3.2\n",
            "LLAMA3.2:Latest",
            "library/llama3.2",
            "registry.ollama.ai/library/llama3.2:latest",
            "https://Registry.Ollama.AI/Library/llama3.2",
            "llama3.2:local",
            "llama3.2:LATEST:Local",
        ] {
            assert_eq!(canonical(raw), "llama3.2", "{raw:?}");
        }
        assert_eq!(parse("LLAMA3.2").unwrap().display(), "llama3.2:latest");
        assert_eq!(parse("x/y:Z").unwrap().display(), "x/y:z");
    }

    #[test]
    fn what_is_not_a_default_stays_in_the_canonical_name() {
        assert_eq!(canonical("llama3.2:3B"), "llama3.2:3b");
        assert_eq!(canonical("me/mine"), "me/mine");
        assert_eq!(canonical("hf.co/User/Repo:Q4"), "hf.co/user/repo:q4");
        assert_eq!(canonical("localhost:5000/library/x"), "localhost:5000/library/x");
        assert_eq!(canonical("127.0.0.1:9/library/y:t"), "127.0.0.1:9/library/y:t");
    }

    #[test]
    fn a_cloud_model_is_never_mistaken_for_the_local_one() {
        for (raw, name) in [
            ("x:cloud", "x:cloud"),
            ("x:CLOUD", "x:cloud"),
            (" x:Cloud ", "x:cloud"),
            ("x:7b-cloud", "x:7b-cloud"),
            ("x:7B-CLOUD", "x:7b-cloud"),
            ("x:7b:cloud", "x:7b-cloud"),
        ] {
            let model = parse(raw).unwrap();
            assert_eq!((model.source, model.canonical().as_str()), (Source::Cloud, name), "{raw:?}");
        }
        // Without a tag there is no suffix: this is a local model with an odd name.
        assert_eq!(parse("x-cloud").unwrap().source, Source::Local);
        assert_eq!(parse("x:7b-local").unwrap().source, Source::Local);
        assert_eq!(parse("x:7b-local").unwrap().tag, "7b-local");
    }

    #[test]
    fn two_sources_are_refused() {
        for raw in ["x:cloud:local", "x:local:cloud", "x:cloud:cloud", "x:7b-cloud:local", "x:7b-cloud:cloud"] {
            assert_eq!(parse(raw), Err(NameError::TwoSources), "{raw:?}");
        }
    }

    #[test]
    fn names_outside_the_grammar_are_refused() {
        assert_eq!(parse("  "), Err(NameError::Empty));
        for raw in [
            "a b",
            "x:",
            ":x",
            ":cloud",
            "/x",
            "x/",
            "a//b",
            "a/b/c/d",
            "http://x",
            "x@sha256:00",
            ".x",
            "-x",
            "x:-t",
            "x:.t",
            "a.b/x",
            "tiny\u{131}",
            "x\ny",
            "x\u{0}",
            "x\u{1b}[31m",
            "\u{1b}://h/n/m",
            "a://b://c/n/m",
            "x: cloud",
            "x\u{a0}",
            "é:é-cloud",
            "x:ééé",
            "\u{212a}:cloud",
        ] {
            // A no-break space at the end is trimmed by Go and by us.
            if raw == "x\u{a0}" {
                assert_eq!(canonical(raw), "x");
                continue;
            }
            assert!(parse(raw).is_err(), "{raw:?}");
        }
        assert!(parse(&"m".repeat(80)).is_ok());
        assert!(parse(&"m".repeat(81)).is_err());
        assert!(parse(&format!("{}/n/m", "h".repeat(350))).is_ok());
        assert!(parse(&format!("{}/n/m", "h".repeat(351))).is_err());
    }

    #[test]
    fn the_parts_can_be_had_as_they_were_written() {
        let spelled = |raw: &str| {
            let model = parse(raw).unwrap();
            let parts = model.spelled();
            [parts.host, parts.namespace, parts.name, parts.tag].map(str::to_owned)
        };
        assert_eq!(spelled("hf.co/User/Repo:Q4_K_M"), ["hf.co", "User", "Repo", "Q4_K_M"]);
        assert_eq!(spelled("Llama3.2"), ["registry.ollama.ai", "library", "Llama3.2", "latest"]);
        assert_eq!(spelled("Me/x:7B:local"), ["registry.ollama.ai", "Me", "x", "7B"]);
    }

    #[test]
    fn a_name_is_temporary_by_its_whole_namespace() {
        let secret = "0123456789abcdef".repeat(4);
        let temporary = |raw: &str| parse(raw).unwrap().is_temporary();
        assert!(temporary(&format!("127.0.0.1:9/{TEMPORARY}{secret}/model")));
        assert!(temporary(&format!("gateway/{}/before:latest", format!("{TEMPORARY}{secret}").to_uppercase())));
        for other in [&secret[1..], &format!("{}g", &secret[1..]), ""] {
            assert!(!temporary(&format!("127.0.0.1:9/{TEMPORARY}{other}/model")), "{other}");
        }
        assert!(!temporary(&format!("{TEMPORARY}{secret}")), "a model's own name");
    }

    #[test]
    fn raw_is_what_was_written_but_for_the_space_around_it() {
        assert_eq!(parse("\tLibrary/X:Latest ").unwrap().raw, "Library/X:Latest");
    }
}
