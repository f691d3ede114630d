//! What the models say.
//!
//! The `tiny` models recite what the models of the same names recite that the replies in the fixtures were recorded
//! from, token for token; all others say one sentence.

use super::models::Voice;

/// What one record shows, and how many tokens it took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub text: &'static str,
    pub tokens: u32,
    pub kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Text,
    Thought,
    /// A tag that Ollama takes out. `/api/generate` still sends a record for it, with nothing in it.
    Tag,
}

const fn say(text: &'static str) -> Piece {
    Piece { text, tokens: 1, kind: Kind::Text }
}

const fn long(text: &'static str, tokens: u32) -> Piece {
    Piece { text, tokens, kind: Kind::Text }
}

const fn think(text: &'static str) -> Piece {
    Piece { text, tokens: 1, kind: Kind::Thought }
}

const fn tag(text: &'static str) -> Piece {
    Piece { text, tokens: 1, kind: Kind::Tag }
}

/// `é` and `🦊` come as two and four byte tokens, and as one record each.
const STORY: &[Piece] = &[
    say("The "),
    say("quick "),
    say("brown "),
    say("fox <b>"),
    say("jumps & "),
    say("says \""),
    say("caf"),
    long("é", 2),
    say("\" to "),
    say("the "),
    long("🦊", 4),
    say(".\nEnd."),
];
const THINKING: &[Piece] = &[
    tag("<think>"),
    think("The user "),
    think("greets me. "),
    think("I greet back."),
    tag("</think>"),
    say("Hello "),
    say("there!"),
];
const TOOL_CALL: &[Piece] =
    &[say("{\"name\": "), say("\"get_weather\", "), say("\"parameters\": "), say("{\"city\": "), say("\"Oslo\"}}")];
const ENDLESS: &[Piece] =
    &[say("one "), say("two "), say("three "), say("four "), say("five "), say("six "), say("seven "), say("eight ")];
const STUTTER: &[Piece] = &[say("same ")];
/// The recorded random text of seed 7.
const RANDOM: &[Piece] = &[say("j"), say("d"), say("l"), say("t"), say("a"), say("b"), say("z"), say("q")];
const SENTENCE: &[Piece] = &[
    say("A "),
    say("simulated "),
    say("model "),
    say("says "),
    say("what "),
    say("it "),
    say("was "),
    say("told, "),
    say("word "),
    say("by "),
    say("word, "),
    say("and "),
    say("then "),
    say("says "),
    say("no "),
    say("more. "),
];

/// Ollama gives up when more than 30 tokens were the same, and says nothing about it.
const REPEATS: u32 = 31;

/// A model that never stops does so here, so that a reply held in memory has a bound.
const ENDLESS_TOKENS: u64 = 131_072;

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Piece(Piece),
    End(Reason),
    /// Ollama ends the stream without its end.
    GivenUp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reason {
    Stop,
    Length,
}

impl Reason {
    pub fn native(self) -> &'static str {
        match self {
            Reason::Stop => "stop",
            Reason::Length => "length",
        }
    }
}

/// One model reciting for one request.
pub(super) struct Recital<'a> {
    pieces: &'static [Piece],
    at: usize,
    /// Tokens after which the text ends by itself; the end-of-text token is one more.
    ends_after: Option<u64>,
    limit: u64,
    limited: bool,
    gives_up_after: Option<u32>,
    /// `<think>` and what follows are text.
    raw_thoughts: bool,
    stops: &'a [String],
    /// The end of the text so far, as long as a stop sequence may need it.
    tail: String,
    said: u32,
    /// Tokens so far.
    pub tokens: u64,
}

impl<'a> Recital<'a> {
    /// `limit` is `num_predict` or `max_tokens`; 0 and less are no limit, as with Ollama. `plain_tokens` is the length of
    /// an answer without a script, the end included.
    pub fn new(voice: Voice, limit: Option<i64>, raw_thoughts: bool, stops: &'a [String], plain_tokens: u32) -> Self {
        let (pieces, looping) = match voice {
            Voice::Story | Voice::Broken | Voice::Embed => (STORY, false),
            Voice::Think => (THINKING, false),
            Voice::Tools | Voice::Jinja => (TOOL_CALL, false),
            Voice::Loop | Voice::Slow => (ENDLESS, true),
            Voice::Stutter => (STUTTER, true),
            Voice::Random => (RANDOM, true),
            Voice::Plain => (SENTENCE, false),
        };
        let ends_after = match voice {
            Voice::Plain => Some(u64::from(plain_tokens.saturating_sub(1))),
            _ if looping => None,
            _ => Some(pieces.iter().map(|piece| u64::from(piece.tokens)).sum()),
        };
        let limit = limit.and_then(|limit| u64::try_from(limit).ok()).filter(|limit| *limit > 0);
        Recital {
            pieces,
            at: 0,
            ends_after,
            limit: limit.unwrap_or(ENDLESS_TOKENS).min(ENDLESS_TOKENS),
            limited: limit.is_some(),
            gives_up_after: (voice == Voice::Stutter).then_some(REPEATS),
            raw_thoughts,
            stops,
            tail: String::new(),
            said: 0,
            tokens: 0,
        }
    }

    pub fn next(&mut self) -> Step {
        if self.gives_up_after.is_some_and(|repeats| self.said >= repeats) {
            return Step::GivenUp;
        }
        let ended = self.ends_after.is_some_and(|end| self.tokens >= end);
        if self.tokens >= self.limit {
            // Without a limit of the caller's this is where an endless model is cut.
            debug_assert!(self.limited || self.tokens >= ENDLESS_TOKENS);
            return Step::End(Reason::Length);
        }
        if ended {
            self.tokens += 1;
            return Step::End(Reason::Stop);
        }
        let piece = self.pieces[self.at % self.pieces.len()];
        let after = self.tokens + u64::from(piece.tokens);
        if after > self.limit {
            // The limit falls within a character: its first bytes are dropped, their tokens are counted.
            self.tokens = self.limit;
            return Step::End(Reason::Length);
        }
        self.at += 1;
        self.said += 1;
        self.tokens = after;
        if self.meets_stop(piece.text) {
            return Step::End(Reason::Stop);
        }
        let kind = if self.raw_thoughts { Kind::Text } else { piece.kind };
        Step::Piece(Piece { kind, ..piece })
    }

    fn meets_stop(&mut self, text: &str) -> bool {
        let Some(longest) = self.stops.iter().map(String::len).max() else {
            return false;
        };
        self.tail.push_str(text);
        if self.stops.iter().any(|stop| !stop.is_empty() && self.tail.contains(stop.as_str())) {
            return true;
        }
        let mut cut = self.tail.len().saturating_sub(longest);
        while !self.tail.is_char_boundary(cut) {
            cut += 1;
        }
        self.tail.drain(..cut);
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recite(voice: Voice, limit: Option<i64>, stops: &[String]) -> (String, u64, Step) {
        let mut recital = Recital::new(voice, limit, false, stops, 16);
        let mut text = String::new();
        loop {
            match recital.next() {
                Step::Piece(piece) if piece.kind == Kind::Text => text.push_str(piece.text),
                Step::Piece(_) => {}
                end => return (text, recital.tokens, end),
            }
        }
    }

    #[test]
    fn the_story_has_seventeen_tokens_with_its_end() {
        let (text, tokens, end) = recite(Voice::Story, None, &[]);
        assert_eq!(text, "The quick brown fox <b>jumps & says \"café\" to the 🦊.\nEnd.");
        assert_eq!((tokens, end), (17, Step::End(Reason::Stop)));
        assert_eq!(recite(Voice::Think, Some(0), &[]).1, 8);
        assert_eq!(recite(Voice::Tools, None, &[]).1, 6);
        assert_eq!(recite(Voice::Plain, None, &[]).1, 16);
    }

    #[test]
    fn a_limit_within_a_character_counts_its_bytes_and_shows_none() {
        let (text, tokens, end) = recite(Voice::Story, Some(8), &[]);
        assert_eq!(text, "The quick brown fox <b>jumps & says \"caf");
        assert_eq!((tokens, end), (8, Step::End(Reason::Length)));
    }

    #[test]
    fn a_stop_sequence_ends_before_its_token_and_counts_it() {
        let (text, tokens, end) = recite(Voice::Story, None, &["brown fox".to_owned()]);
        assert_eq!(text, "The quick brown ");
        assert_eq!((tokens, end), (4, Step::End(Reason::Stop)));
    }

    #[test]
    fn the_stutterer_gives_up_after_31_records() {
        let (text, tokens, end) = recite(Voice::Stutter, Some(400), &[]);
        assert_eq!((text.len(), tokens, end), (31 * 5, 31, Step::GivenUp));
        assert_eq!(recite(Voice::Stutter, Some(4), &[]).2, Step::End(Reason::Length));
    }

    #[test]
    fn a_model_that_never_stops_stops_somewhere() {
        assert_eq!(recite(Voice::Loop, None, &[]).1, ENDLESS_TOKENS);
    }
}
