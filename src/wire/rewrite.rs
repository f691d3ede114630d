//! Bytes cut from, put into or replaced in a request or a reply; everything else stays byte-exact.
//!
//! - [`edit`]: edits of a JSON body, collected while it is read and applied once; commas stay right.
//! - [`settings`]: what an operator wants of the settings that a model is loaded with.
//! - [`scrub`]: what a backend says of its own machine, taken out of a 401.
//! - [`usage`]: hiding the counts that the proxy, and not the client, has asked for.

pub mod edit;
pub mod scrub;
pub mod settings;
pub mod usage;

pub use edit::{Assignment, set};
pub use scrub::Scrubber;
pub use usage::UsageHider;
