use super::*;
use crate::wire::{BodyRule, Kind};

const BOTH: RouteSettings = RouteSettings { drop_in: true };
const PREFIX_ONLY: RouteSettings = RouteSettings { drop_in: false };
const DIGEST: &str = "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";
const METHODS: &[&str] = &["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PROPFIND"];

/// The contract's table, written again by hand: path, methods, endpoint, kind.
fn contract() -> Vec<(String, &'static [&'static str], Endpoint, Kind)> {
    use Endpoint::*;
    let rows: &[(&str, &'static [&'static str], Endpoint, Kind)] = &[
        ("/", &["GET", "HEAD"], Root, Kind::Read),
        ("/api/version", &["GET", "HEAD"], Version, Kind::Read),
        ("/api/status", &["GET"], Status, Kind::Read),
        ("/api/tags", &["GET", "HEAD"], Tags, Kind::List),
        ("/api/ps", &["GET"], Ps, Kind::List),
        ("/api/show", &["POST"], Show, Kind::Read),
        ("/api/chat", &["POST"], Chat, Kind::Infer),
        ("/api/generate", &["POST"], Generate, Kind::Infer),
        ("/api/embed", &["POST"], Embed, Kind::Infer),
        ("/api/embeddings", &["POST"], Embeddings, Kind::Infer),
        ("/v1/chat/completions", &["POST"], ChatCompletions, Kind::Infer),
        ("/v1/completions", &["POST"], Completions, Kind::Infer),
        ("/v1/embeddings", &["POST"], OpenAiEmbeddings, Kind::Infer),
        ("/v1/responses", &["POST"], Responses, Kind::Infer),
        ("/v1/messages", &["POST"], Messages, Kind::Infer),
        ("/v1/models", &["GET"], Models, Kind::List),
        ("/v1/models/llama3.2:1b", &["GET"], Model, Kind::Read),
        ("/api/pull", &["POST"], Pull, Kind::Manage),
        ("/api/push", &["POST"], Push, Kind::Manage),
        ("/api/create", &["POST"], Create, Kind::Manage),
        ("/api/copy", &["POST"], Copy, Kind::Manage),
        ("/api/delete", &["DELETE"], Delete, Kind::Manage),
    ];
    let mut rows: Vec<_> = rows.iter().map(|(p, m, e, k)| (p.to_string(), *m, *e, *k)).collect();
    rows.push((format!("/api/blobs/{DIGEST}"), &["HEAD", "POST"], Blob, Kind::Manage));
    rows
}

#[test]
fn every_row_of_the_contract_resolves_under_the_prefix_and_at_the_root() {
    for (path, methods, endpoint, kind) in contract() {
        assert_eq!(endpoint.kind(), kind, "{path}");
        for spelled in [path.clone(), format!("{BASE_PATH}{path}")] {
            for method in METHODS {
                match resolve(method, &spelled, &BOTH) {
                    Ok(Route::Ollama { endpoint: found, upstream_path, .. }) => {
                        assert!(methods.contains(method), "{method} {spelled} must not pass");
                        assert_eq!((found, upstream_path.as_ref()), (endpoint, path.as_str()));
                    }
                    Err(RouteError::MethodNotAllowed { allow }) => {
                        assert!(!methods.contains(method), "{method} {spelled} must pass");
                        assert_eq!(allow.split(", ").collect::<Vec<_>>(), methods, "Allow of {spelled}");
                    }
                    other => panic!("{method} {spelled}: {other:?}"),
                }
            }
        }
    }
}

#[test]
fn every_endpoint_has_exactly_one_row() {
    let mut in_table: Vec<&str> =
        TABLE.iter().filter_map(|row| if let To::Ollama(e) = row.2 { Some(e.as_str()) } else { None }).collect();
    let mut in_contract: Vec<&str> = contract().iter().map(|row| row.2.as_str()).collect();
    in_table.sort_unstable();
    in_contract.sort_unstable();
    assert_eq!(in_table, in_contract);
}

#[test]
fn a_route_that_streams_its_body_is_the_blob_alone() {
    let streams: Vec<_> = contract().into_iter().filter(|r| r.2.body() == BodyRule::Stream).collect();
    assert_eq!(streams.len(), 1);
    assert_eq!(streams[0].2, Endpoint::Blob);
}

#[test]
fn the_base_with_and_without_a_slash_is_the_root() {
    for path in ["/api/v1/ollama", "/api/v1/ollama/"] {
        for settings in [&BOTH, &PREFIX_ONLY] {
            for method in ["GET", "HEAD"] {
                let route = resolve(method, path, settings);
                assert!(
                    matches!(&route, Ok(Route::Ollama { endpoint: Endpoint::Root, upstream_path, .. }) if upstream_path == "/"),
                    "{method} {path}: {route:?}"
                );
            }
        }
    }
    assert_eq!(resolve("GET", "/api/v1/ollama//", &BOTH), Err(RouteError::Unknown));
    assert_eq!(resolve("GET", "/api/v1/ollamax", &BOTH), Err(RouteError::Unknown));
    assert_eq!(resolve("GET", "/api/v1", &BOTH), Err(RouteError::Unknown));
    assert_eq!(resolve("POST", "/api/v1/ollama/api/v1/ollama/api/chat", &BOTH), Err(RouteError::Unknown));
}

#[test]
fn without_drop_in_only_the_prefix_and_our_own_routes_are_served() {
    for (path, methods, ..) in contract() {
        assert_eq!(resolve(methods[0], &path, &PREFIX_ONLY), Err(RouteError::Unknown), "{path}");
        assert!(resolve(methods[0], &format!("{BASE_PATH}{path}"), &PREFIX_ONLY).is_ok(), "{path}");
    }
    assert_eq!(resolve("POST", "/api/v1/auth/token", &PREFIX_ONLY), Ok(Route::Token));
    assert_eq!(resolve("GET", "/.well-known/jwks.json", &PREFIX_ONLY), Ok(Route::Jwks));
    assert_eq!(resolve("POST", "/v1/files", &PREFIX_ONLY), Err(RouteError::Unknown));
}

#[test]
fn our_own_routes_are_of_the_origin_alone_and_keep_their_method() {
    let not = |allow| Err(RouteError::MethodNotAllowed { allow });
    assert_eq!(resolve("GET", "/api/v1/auth/token", &BOTH), not("POST"));
    assert_eq!(resolve("POST", "/.well-known/jwks.json", &BOTH), not("GET"));
    assert_eq!(resolve("POST", "/api/v1/ollama/api/v1/auth/token", &BOTH), Err(RouteError::Unknown));
    assert_eq!(resolve("GET", "/api/v1/ollama/.well-known/jwks.json", &BOTH), Err(RouteError::Unknown));
    assert_eq!(resolve("POST", "/api/v1/auth/token/", &BOTH), Err(RouteError::Unknown));
}

#[test]
fn no_other_spelling_of_a_route_resolves() {
    for (path, methods, ..) in contract() {
        if path == "/" {
            continue;
        }
        for base in ["", BASE_PATH] {
            let whole = format!("{base}{path}");
            let mut tricks = vec![
                format!("{whole}/"),
                format!("/{whole}"),
                format!("{whole}//"),
                format!("/.{whole}"),
                format!("/x/..{whole}"),
                format!("{whole}/."),
                format!("{whole}/.."),
                format!("{whole}/../chat"),
                format!("{whole};x=1"),
                format!("{whole}%00"),
                format!("{whole}%20"),
                format!("{whole} "),
                format!("{whole}\0"),
                format!("{whole}\n"),
                format!("{whole}#x"),
                format!("{whole}?x"),
                format!("{whole}\\"),
                format!("{whole}é"),
                whole.replacen('/', "\\", 1),
                whole.replacen('/', "%2f", 1),
                whole.trim_start_matches('/').to_owned(),
                format!("http://localhost{whole}"),
                format!("*{whole}"),
                whole.replace("/", "//"),
                whole.replace("/", "/./"),
                // characters that fold to ASCII letters (Kelvin sign, long s)
                whole.replace('s', "ſ").replace('k', "\u{212a}") + "\u{0}",
            ];
            for (i, c) in whole.char_indices() {
                // each byte percent-encoded, in both cases; each slash doubled
                tricks.push(format!("{}%{:02x}{}", &whole[..i], c as u8, &whole[i + 1..]));
                tricks.push(format!("{}%{:02X}{}", &whole[..i], c as u8, &whole[i + 1..]));
                if c == '/' {
                    tricks.push(format!("{}//{}", &whole[..i], &whole[i + 1..]));
                    tricks.push(format!("{}\\{}", &whole[..i], &whole[i + 1..]));
                    tricks.push(format!("{}/./{}", &whole[..i], &whole[i + 1..]));
                }
                // a letter in upper case; in a model's name that is another spelling of the name, not of the path
                let in_model = path.starts_with("/v1/models/") && i >= base.len() + "/v1/models/".len();
                if c.is_ascii_lowercase() && !in_model {
                    tricks.push(format!("{}{}{}", &whole[..i], c.to_ascii_uppercase(), &whole[i + 1..]));
                }
            }
            for trick in tricks {
                assert_eq!(resolve(methods[0], &trick, &BOTH), Err(RouteError::Unknown), "{trick:?}");
            }
        }
    }
}

#[test]
fn only_paths_of_the_table_resolve_among_random_ones() {
    // A small generator, so that a failure can be repeated: words of the table and tricks, glued at random.
    let words = [
        "/",
        "/",
        "/",
        "api",
        "v1",
        "ollama",
        "chat",
        "completions",
        "tags",
        "models",
        "blobs",
        "auth",
        "token",
        "x",
        "..",
        ".",
        "%2f",
        "%2e",
        ";",
        "API",
        "\\",
        "//",
        "llama3.2:1b",
        DIGEST,
        "é",
        " ",
        "?",
        "files",
        "experimental",
        "",
    ];
    let canonical: Vec<String> = contract()
        .into_iter()
        .flat_map(|r| [r.0.clone(), format!("{BASE_PATH}{}", r.0)])
        .chain([BASE_PATH.to_owned()])
        .collect();
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut found = 0;
    for _ in 0..200_000 {
        let path: String = (0..next() % 9).map(|_| words[(next() % words.len() as u64) as usize]).collect();
        let method = METHODS[(next() % METHODS.len() as u64) as usize];
        if let Ok(Route::Ollama { endpoint, upstream_path, .. }) = resolve(method, &path, &BOTH) {
            found += 1;
            let model = endpoint == Endpoint::Model && is_model(upstream_path.trim_start_matches("/v1/models/"));
            assert!(model || canonical.contains(&path), "{method} {path:?} resolved to {endpoint:?}");
            assert!(
                path.ends_with(upstream_path.as_ref()) || upstream_path == "/",
                "{path:?} became {upstream_path:?}"
            );
        }
    }
    assert!(found > 100, "the generator must reach the table, it did {found} times");
}

#[test]
fn a_model_is_one_segment_of_name_characters() {
    for good in ["llama3.2", "Qwen2.5-Coder:7b-instruct", "_x", "a:b:local", "x.gguf"] {
        let route = resolve("GET", &format!("/v1/models/{good}"), &BOTH).expect(good);
        let Route::Ollama { endpoint: Endpoint::Model, upstream_path, model, digest: None } = route else {
            panic!("{good}: {route:?}")
        };
        assert_eq!(model.as_deref(), Some(good));
        assert_eq!(upstream_path, format!("/v1/models/{good}"));
    }
    for bad in
        ["", ".", "..", ".hidden", "-x", ":x", "library/llama3.2", "library%2Fllama3.2", "a b", "a@b", "é", "a\u{212a}"]
    {
        assert_eq!(resolve("GET", &format!("/v1/models/{bad}"), &BOTH), Err(RouteError::Unknown), "{bad:?}");
    }
    let long = "a".repeat(MODEL_MAX_BYTES);
    assert!(resolve("GET", &format!("/v1/models/{long}"), &BOTH).is_ok());
    assert_eq!(resolve("GET", &format!("/v1/models/{long}a"), &BOTH), Err(RouteError::Unknown));
}

#[test]
fn a_digest_is_sha256_and_64_lower_case_digits() {
    let route = resolve("HEAD", &format!("/api/blobs/{DIGEST}"), &BOTH);
    assert!(matches!(&route, Ok(Route::Ollama { digest: Some(d), model: None, .. }) if d == DIGEST), "{route:?}");
    let upper = DIGEST.to_uppercase();
    for bad in
        [&upper, "sha256:", "sha256:abc", "sha512:abc", &DIGEST[..70], &format!("{DIGEST}0"), &DIGEST.replace(':', "-")]
    {
        assert_eq!(resolve("POST", &format!("/api/blobs/{bad}"), &BOTH), Err(RouteError::Unknown), "{bad}");
    }
}

#[test]
fn egress_routes_are_named_whatever_the_method() {
    for path in [
        "/api/experimental",
        "/api/experimental/web_search",
        "/api/experimental/aliases",
        "/api/me",
        "/api/signout",
        "/api/user/keys",
        "/api/user/keys/c3NoLWVk",
        "/api/v1/ollama/api/me",
    ] {
        for method in ["GET", "POST", "DELETE"] {
            assert_eq!(resolve(method, path, &BOTH), Ok(Route::Egress), "{method} {path}");
        }
    }
    for path in
        ["/api/user", "/api/experimentalx", "/api/experimental/", "/api/experimental/../chat", "/api/experimental/%2e"]
    {
        assert_eq!(resolve("POST", path, &BOTH), Err(RouteError::Unknown), "{path}");
    }
}

#[test]
fn operations_that_are_not_offered_carry_bifrosts_word() {
    for (method, path, word) in [
        ("POST", "/v1/audio/speech", "speech"),
        ("POST", "/v1/audio/transcriptions", "transcription"),
        ("POST", "/v1/images/generations", "image_generation"),
        ("POST", "/v1/images/edits", "image_edit"),
        ("POST", "/v1/images/variations", "image_variation"),
        ("POST", "/v1/videos", "video_generation"),
        ("POST", "/v1/rerank", "rerank"),
        ("POST", "/v1/files", "file_upload"),
        ("GET", "/v1/files", "file_list"),
        ("GET", "/v1/files/file-AbC", "file_retrieve"),
        ("GET", "/v1/files/file-AbC/content", "file_content"),
        ("DELETE", "/v1/files/file-AbC", "file_delete"),
        ("POST", "/v1/batches", "batch_create"),
        ("GET", "/v1/batches", "batch_list"),
        ("GET", "/v1/batches/b1", "batch_retrieve"),
        ("POST", "/v1/batches/b1/cancel", "batch_cancel"),
        ("GET", "/v1/batches/b1/results", "batch_results"),
        ("POST", "/v1/containers", "container_create"),
        ("GET", "/v1/containers/c1/files", "container_file_list"),
        ("GET", "/v1/containers", "container_list"),
        ("GET", "/v1/containers/c1", "container_retrieve"),
        ("DELETE", "/v1/containers/c1", "container_delete"),
        ("POST", "/v1/containers/c1/files", "container_file_create"),
        ("GET", "/v1/containers/c1/files/f1", "container_file_retrieve"),
        ("GET", "/v1/containers/c1/files/f1/content", "container_file_content"),
        ("DELETE", "/v1/containers/c1/files/f1", "container_file_delete"),
        ("GET", "/v1/videos", "video_list"),
        ("GET", "/v1/videos/v1", "video_retrieve"),
        ("GET", "/v1/videos/v1/content", "video_download"),
        ("DELETE", "/v1/videos/v1", "video_delete"),
        ("POST", "/v1/videos/v1/remix", "video_remix"),
        ("DELETE", "/v1/batches/b1", "batch_delete"),
        // Whatever stands below them, and whatever the method.
        ("POST", "/v1/audio/speech/x", "speech"),
        ("PATCH", "/v1/audio/transcriptions/x/y", "transcription"),
        ("PUT", "/v1/images/generations/x", "image_generation"),
        ("GET", "/v1/images/edits/x", "image_edit"),
        ("GET", "/v1/images/variations", "image_variation"),
        ("GET", "/v1/rerank/x", "rerank"),
    ] {
        for base in ["", BASE_PATH] {
            assert_eq!(
                resolve(method, &format!("{base}{path}"), &BOTH),
                Ok(Route::Unsupported { operation: word }),
                "{method} {base}{path}"
            );
        }
    }
    for path in
        ["/v1/ocr", "/v1/responses/input_tokens", "/v1/messages/count_tokens", "/v1/moderations", "/debug/pprof/"]
    {
        assert_eq!(resolve("POST", path, &BOTH), Err(RouteError::Unknown), "{path}");
    }
}

#[test]
fn operations_that_may_be_streamed_have_a_word_for_that() {
    for operation in ["speech", "transcription", "image_generation", "image_edit"] {
        assert_eq!(streamed(operation), Some(format!("{operation}_stream").as_str()));
    }
    for operation in ["image_variation", "rerank", "file_content", "video_generation", ""] {
        assert_eq!(streamed(operation), None, "{operation}");
    }
}

#[test]
fn a_method_is_compared_as_it_is_written() {
    assert_eq!(resolve("post", "/api/chat", &BOTH), Err(RouteError::MethodNotAllowed { allow: "POST" }));
    assert_eq!(resolve("GET, HEAD", "/", &BOTH), Err(RouteError::MethodNotAllowed { allow: "GET, HEAD" }));
    assert_eq!(resolve("", "/api/chat", &BOTH), Err(RouteError::MethodNotAllowed { allow: "POST" }));
}

#[test]
fn a_query_is_visible_ascii_and_bounded() {
    for good in ["", "a=1&b=2", "ts=1700000000", "x=%41%2f", "a[]=1", "q=a+b;c,d!$'()*:@/?~_-."] {
        assert_eq!(check_query(good), Ok(()), "{good}");
    }
    for bad in ["a b", "a\tb", "a\r\nb", "a\0", "a#b", "é", "%", "%4", "%zz", "a\u{7f}", "\"", "<", ">", "\\"] {
        assert_eq!(check_query(bad), Err(QueryError::BadByte), "{bad:?}");
    }
    assert_eq!(check_query(&"a".repeat(QUERY_MAX_BYTES)), Ok(()));
    assert_eq!(check_query(&"a".repeat(QUERY_MAX_BYTES + 1)), Err(QueryError::TooLong));
}

#[test]
fn the_dialect_of_a_path_without_a_route_is_guessed_from_its_beginning() {
    assert_eq!(dialect_of("/v1/nothing"), Dialect::OpenAi);
    assert_eq!(dialect_of("/api/v1/ollama/v1/nothing"), Dialect::OpenAi);
    assert_eq!(dialect_of("/api/v1/ollama/v1/messages/count_tokens"), Dialect::Anthropic);
    assert_eq!(dialect_of("/api/nothing"), Dialect::Native);
    assert_eq!(dialect_of("/v1x"), Dialect::Native);
    assert_eq!(dialect_of(""), Dialect::Native);
}

#[test]
fn a_record_has_of_a_path_what_the_table_has() {
    for (path, held) in [
        ("/", "/"),
        ("/api/chat", "/api/chat"),
        ("/api/v1/auth/token", "/api/v1/auth/token"),
        ("/api/v1/ollama", "/api/v1/ollama"),
        ("/api/v1/ollama/v1/files", "/api/v1/ollama/v1/files"),
        ("/api/chat/", "/api/chat/*"),
        ("/api/chat/eyJhbGciOiJIUzI1NiJ9.e30.c2ln", "/api/chat/*"),
        ("/api/v1/ollama/api/nothing", "/api/v1/ollama/api/*"),
        ("/v1/files/my%20question", "/v1/files/*"),
        ("/v1/models/a/b", "/v1/models/*"),
        ("/apichat", "/*"),
        ("/API/chat", "/*"),
        ("//api/chat", "/*"),
        ("/wp-login.php", "/*"),
        ("*", "/*"),
        ("", ""),
    ] {
        assert_eq!(recorded(path), held, "{path}");
    }
}
