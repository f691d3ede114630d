use super::rotate::{Plan, RotateError, Rotated, Step, rotate};
use super::*;
use crate::identity::issuer::Claims;
use crate::identity::{Issuer, Verifier, VerifierSettings, cause};

const NOW: i64 = 1_800_000_000;

fn now() -> Timestamp {
    Timestamp::from_second(NOW).unwrap()
}

fn later(seconds: i64) -> Timestamp {
    Timestamp::from_second(NOW + seconds).unwrap()
}

/// Ed25519, since it is made in no time.
fn plan() -> Plan {
    Plan { algorithm: None, ttl_s: 3600, leeway_s: 30, end_old: false }
}

fn end(rotated: &Rotated) -> Timestamp {
    rotated.until.as_ref().unwrap().parse().unwrap()
}

struct State(tempfile::TempDir);

impl State {
    fn new() -> State {
        let state = State(tempfile::tempdir().unwrap());
        OwnKeys::open(state.path(), Some(Algorithm::EdDsa)).unwrap();
        state
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn keys(&self) -> OwnKeys {
        OwnKeys::reload(self.path()).unwrap()
    }

    fn kid(&self) -> String {
        self.keys().signing.kid().unwrap().to_owned()
    }

    fn token(&self, ttl_s: i64) -> String {
        let claims = Claims { sub: "a".into(), roles: vec!["r".into()], ttl_s: Some(ttl_s), ..Claims::default() };
        Issuer::new(self.keys().signing, "behavry", 3600).mint(&claims, NOW).unwrap().0
    }

    fn verdict(&self, token: &str, at: Timestamp) -> Result<(), &'static str> {
        let settings = VerifierSettings { issuer: "behavry".into(), audience: None, leeway_s: 5 };
        let verifier = Verifier::new(self.keys().key_set(at).unwrap(), settings);
        verifier.verify_token(token, at.as_second()).map(|_| ())
    }
}

#[test]
fn after_a_rotation_the_new_key_signs_and_tokens_of_the_old_hold_until_they_end() {
    let state = State::new();
    let (old_kid, old_token) = (state.kid(), state.token(3600));
    let rotated = rotate(state.path(), plan(), now(), |_| true).unwrap();
    assert_eq!((&rotated.old_kid, &rotated.new_kid), (&old_kid, &state.kid()));
    assert_ne!(old_kid, rotated.new_kid);
    assert_eq!(state.verdict(&old_token, later(3599)), Ok(()));
    assert_eq!(state.verdict(&state.token(60), later(0)), Ok(()));
    let until = end(&rotated);
    assert!(until >= later(3600 + 30), "never before its last token");
    assert_eq!(state.verdict(&old_token, until), Err(cause::UNKNOWN_KEY));
    assert_eq!(state.keys().next_end(now()), Some(until));
    assert_eq!(state.keys().next_end(until), None);
}

#[test]
fn wherever_a_rotation_is_broken_off_one_key_signs_and_every_token_of_it_holds() {
    for broken_off in [Step::NewPublished, Step::OldPublished, Step::Switched] {
        let state = State::new();
        let (old_kid, old_token) = (state.kid(), state.token(3600));
        let ended = rotate(state.path(), plan(), now(), |step| {
            // What another process sees at this step.
            assert_eq!(state.verdict(&old_token, later(60)), Ok(()), "{step:?}");
            assert_eq!(state.verdict(&state.token(60), later(0)), Ok(()), "{step:?}");
            step != broken_off
        });
        assert!(matches!(ended, Err(RotateError::BrokenOff(step)) if step == broken_off));
        assert_eq!(state.kid() == old_kid, broken_off != Step::Switched, "{broken_off:?}");
        assert_eq!(state.verdict(&old_token, later(3599)), Ok(()), "{broken_off:?}");
        // Even long after: the end of a key that signs again, or still, does not count.
        let much_later = Timestamp::from_second(NOW + 400 * 24 * 3600).unwrap();
        assert_eq!(state.keys().key_set(much_later).unwrap().keys().len(), 1);
        rotate(state.path(), plan(), now(), |_| true).unwrap();
        assert_eq!(state.verdict(&old_token, later(3599)), Ok(()), "{broken_off:?}, rotated again");
    }
}

#[test]
fn the_new_key_is_known_before_it_signs() {
    let state = State::new();
    let mut published = Vec::new();
    let rotated = rotate(state.path(), plan(), now(), |step| {
        let set = state.keys().key_set(now()).unwrap();
        published.push((step, set.keys().iter().map(|key| key.kid().unwrap().to_owned()).collect::<Vec<_>>()));
        true
    })
    .unwrap();
    let (old, new) = (rotated.old_kid, rotated.new_kid);
    assert_eq!(
        published,
        [
            (Step::NewPublished, vec![old.clone(), new.clone()]),
            (Step::OldPublished, vec![old.clone(), new.clone()]),
            (Step::Switched, vec![new, old]),
        ]
    );
}

#[test]
fn a_key_that_gave_a_long_life_verifies_as_long() {
    let state = State::new();
    let key = state.keys().signing.verification_key();
    let year = 365 * 24 * 3600;
    note_ttl(state.path(), &key, year).unwrap();
    note_ttl(state.path(), &key, 7200).unwrap();
    let token = state.token(year);
    let rotated = rotate(state.path(), plan(), now(), |_| true).unwrap();
    assert_eq!(state.verdict(&token, later(year - 1)), Ok(()));
    assert!(end(&rotated) > later(year + 30));
    // The next key owes nothing to that token.
    let next = rotate(state.path(), plan(), now(), |_| true).unwrap();
    assert!(end(&next) < later(2 * 3600));
}

#[test]
fn a_default_life_needs_no_note() {
    let state = State::new();
    note_ttl(state.path(), &state.keys().signing.verification_key(), DEFAULT_TTL_S).unwrap();
    assert!(!folder_path(state.path()).exists());
}

#[test]
fn a_key_that_is_not_trusted_any_more_ends_with_the_rotation() {
    let state = State::new();
    let first = state.token(3600);
    rotate(state.path(), plan(), now(), |_| true).unwrap();
    let second = state.token(3600);
    let ended = rotate(state.path(), Plan { end_old: true, ..plan() }, now(), |_| true).unwrap();
    assert_eq!(ended.until, None);
    for token in [first, second] {
        assert_eq!(state.verdict(&token, later(1)), Err(cause::UNKNOWN_KEY));
    }
    assert_eq!(state.verdict(&state.token(60), later(1)), Ok(()));
}

#[test]
fn rotation_changes_the_algorithm_and_the_wrong_one_at_the_start_is_refused_with_the_command() {
    let state = State::new();
    let said = OwnKeys::open(state.path(), Some(Algorithm::Es256)).unwrap_err().to_string();
    assert!(said.contains("token keys rotate --algorithm ES256"), "{said}");
    let token = state.token(3600);
    let es256 = Plan { algorithm: Some(Algorithm::Es256), ..plan() };
    assert_eq!(rotate(state.path(), es256, now(), |_| true).unwrap().algorithm, Algorithm::Es256);
    assert!(OwnKeys::open(state.path(), Some(Algorithm::Es256)).is_ok());
    assert_eq!(state.verdict(&token, later(60)), Ok(()));
    let shared = Plan { algorithm: Some(Algorithm::Hs256), ..plan() };
    assert!(matches!(rotate(state.path(), shared, now(), |_| true), Err(RotateError::New(_))));
}

#[test]
fn keys_that_verify_are_bounded_and_those_that_ended_are_taken_away() {
    let state = State::new();
    let refused = (0..MAX_KEYS).find_map(|_| rotate(state.path(), plan(), now(), |_| true).err());
    assert!(matches!(refused, Some(RotateError::Full)), "{refused:?}");
    assert_eq!(state.keys().key_set(now()).unwrap().keys().len(), MAX_KEYS);
    rotate(state.path(), plan(), later(2 * 24 * 3600), |_| true).unwrap();
    let files = std::fs::read_dir(folder_path(state.path())).unwrap().count();
    assert_eq!(files, 2, "the old one and the one that signs");
}

#[test]
fn a_folder_that_is_wrong_is_refused_with_its_file() {
    let state = State::new();
    rotate(state.path(), plan(), now(), |_| true).unwrap();
    let good = std::fs::read_to_string(file_path(state.path(), &state.kid())).unwrap();
    let path = folder_path(state.path()).join("x.json");
    for text in
        ["", "{}", "{\"keys\":[]}", &good.replace("\"until\": \"2", "\"until\": \"x"), &good.replace("3600", "\"\"")]
    {
        std::fs::write(&path, text).unwrap();
        let said = OwnKeys::reload(state.path()).unwrap_err().to_string();
        assert!(said.starts_with(&path.display().to_string()), "{said}");
    }
    std::fs::write(&path, &good).unwrap();
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o666)).unwrap();
    assert!(OwnKeys::reload(state.path()).is_err(), "whoever writes there is trusted with every token");
    std::fs::rename(&path, folder_path(state.path()).join(".new-0")).unwrap();
    assert!(OwnKeys::reload(state.path()).is_ok(), "a draft is not read");
}

#[test]
fn while_running_no_key_is_made() {
    let state = State::new();
    std::fs::remove_file(signing_key_path(state.path())).unwrap();
    assert!(matches!(OwnKeys::reload(state.path()), Err(OwnKeysError::Gone { .. })));
    assert!(!signing_key_path(state.path()).exists());
}
