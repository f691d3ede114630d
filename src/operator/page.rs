//! *Live Activity*: one page, its style and its script, built into the program. It needs nothing from anywhere else.

/// Nothing but this origin's own files; no inline script or style, so that a name that got into the page as markup would still do nothing.
pub const SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                                   img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
                                   require-trusted-types-for 'script'";

const INDEX: &str = include_str!("page/index.html");
const STYLE: &str = include_str!("page/activity.css");
const SCRIPT: &str = include_str!("page/activity.js");

/// Content type and text of the file at a path.
pub fn file(path: &str) -> Option<(&'static str, &'static str)> {
    match path {
        "/" => Some(("text/html; charset=utf-8", INDEX)),
        "/activity.css" => Some(("text/css; charset=utf-8", STYLE)),
        "/activity.js" => Some(("text/javascript; charset=utf-8", SCRIPT)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_asks_for_nothing_from_elsewhere_and_writes_no_markup() {
        for text in [INDEX, STYLE, SCRIPT] {
            for outside in ["//cdn", "https://", "@import", "src=\"http"] {
                assert!(!text.contains(outside), "{outside}");
            }
        }
        for unsafe_way in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "DOMParser"] {
            assert!(!SCRIPT.contains(unsafe_way), "{unsafe_way}");
        }
        assert!(
            !INDEX.contains("<style") && !INDEX.contains(" style=") && !INDEX.contains(" onclick"),
            "nothing inline"
        );
    }
}
