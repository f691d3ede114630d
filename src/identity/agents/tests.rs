use std::os::unix::fs::{MetadataExt, PermissionsExt};

use super::*;
use crate::identity::api_key::ApiKeyHash;
use crate::identity::cause;
use crate::identity::device::DeviceKey;

fn agent(id: &str, more: &str) -> String {
    format!("[[agent]]\nid = \"{id}\"\n{more}\n")
}

fn fault(text: &str) -> String {
    Agents::parse(text).unwrap_err().to_string()
}

#[test]
fn the_right_secret_gives_the_agent() {
    let secret = Secret::random();
    let hash = SecretHash::of(&secret);
    let line = format!("secret_hash = \"{}\"", hash.as_str());
    let text = agent("a", &line) + &agent("b", &format!("{line}\nstate = \"suspended\"")) + &agent("c", "");
    let agents = Agents::parse(&text).unwrap();
    assert_eq!(agents.authenticate("a", &secret).unwrap().id, "a");
    assert_eq!(agents.authenticate("a", &Secret::random()), Err(AuthFailure::WrongIdOrSecret));
    assert_eq!(agents.authenticate("nobody", &secret), Err(AuthFailure::WrongIdOrSecret));
    assert_eq!(agents.authenticate("c", &secret), Err(AuthFailure::WrongIdOrSecret), "no hash, no secret");
    assert_eq!(agents.authenticate("b", &secret), Err(AuthFailure::Suspended));
    assert_eq!(agents.authenticate("b", &Secret::random()), Err(AuthFailure::WrongIdOrSecret));
}

#[test]
fn a_broken_file_is_refused_with_its_line() {
    for (text, line, words) in [
        (agent("a", "colour = \"red\""), 3, "unknown field"),
        (agent("a", "") + &agent("a", ""), 4, "twice"),
        (agent("a", "id = \"b\""), 3, "duplicate"),
        (agent("a", "state = \"asleep\""), 3, "unknown variant"),
        (agent("a", "secret = \"hunter2\""), 3, "unknown field"),
        (agent("a", "\nsecret_hash = \"hunter2\""), 4, "argon2id"),
        (agent("", ""), 1, "`id`"),
        (agent("a\\u001b", ""), 1, "`id`"),
        (agent("a", "roles = [\"1\",\"2\",\"3\",\"4\",\"5\",\"6\",\"7\",\"8\",\"9\"]"), 1, "`roles`"),
        ("[[agent]]\nname = \"x\"\n".into(), 1, "missing field `id`"),
        ("\n\n[agents]\n".into(), 3, "unknown field"),
        ("id = ".into(), 1, ""),
    ] {
        let said = fault(&text);
        assert!(said.starts_with(&format!("agents.toml:{line}: ")) && said.contains(words), "{text}\n{said}");
        assert!(!said.contains("hunter2"), "a hash or secret is never quoted");
    }
}

const DEVICE: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBwHRSNviAJ/Gf9o9Iq7i4SwiFXNWG8ELj5+xDRdKidG me@laptop";

fn device_keys(lines: &[&str]) -> String {
    format!("device_keys = {lines:?}")
}

fn api_keys(keys: &[(&str, &str)]) -> String {
    let keys: Vec<String> = keys
        .iter()
        .map(|(name, key)| format!("{{ name = {name:?}, sha256 = \"{}\" }}", ApiKeyHash::of(key).to_hex()))
        .collect();
    format!("api_keys = [{}]", keys.join(", "))
}

#[test]
fn a_device_key_stands_for_its_agent() {
    let text = agent("a", "roles = [\"r\"]\npermissions = [\"web:read\"]\nrisk_tier = \"low\"\nname = \"A\"")
        + &device_keys(&[DEVICE]);
    let agents = Agents::parse(&text).unwrap();
    let key = DeviceKey::parse(DEVICE).unwrap();
    let caller = agents.keyring().device(&key).unwrap();
    assert_eq!((&*caller.agent_id, caller.agent_name.as_deref()), ("a", Some("A")));
    assert_eq!(caller.session_id, "SHA256:rz2L0IwXB9NDnzf6Q5IAEMIS92rk/5mYNNhLMtR1ylU");
    assert_eq!((&caller.roles[..], &caller.permissions[..]), (&["r".to_owned()][..], &["web:read".to_owned()][..]));
    assert_eq!(caller.risk_tier.as_deref(), Some("low"));
    let nobody = Agents::parse(&agent("a", "")).unwrap();
    assert_eq!(nobody.keyring().device(&key), Err(cause::UNKNOWN_DEVICE));
    let asleep = Agents::parse(&agent("a", &format!("state = \"suspended\"\n{}", device_keys(&[DEVICE])))).unwrap();
    assert_eq!(asleep.keyring().device(&key), Err(cause::SUSPENDED));
}

#[test]
fn an_api_key_counts_where_it_is_turned_on_and_its_agent_is_active() {
    let text = agent("a", &api_keys(&[("ci", "bop_1"), ("other", "bop_2")]))
        + &agent("b", &format!("state = \"suspended\"\n{}", api_keys(&[("ci", "bop_3")])));
    let off = Agents::parse(&text).unwrap();
    assert_eq!(off.keyring().api_key("bop_1"), Err(cause::API_KEYS_OFF));
    let on = off.accepting_api_keys(true);
    let caller = on.keyring().api_key("bop_1").unwrap();
    assert_eq!((&*caller.agent_id, &*caller.session_id), ("a", &*ApiKeyHash::of("bop_1").session_id()));
    assert_eq!(on.keyring().api_key("bop_2").unwrap().agent_id, "a");
    assert_eq!(on.keyring().api_key("bop_3"), Err(cause::SUSPENDED));
    assert_eq!(on.keyring().api_key("bop_4"), Err(cause::UNKNOWN_API_KEY));
    assert!(!format!("{on:?}").contains(&ApiKeyHash::of("bop_1").to_hex()), "no debug text holds a hash");
}

#[test]
fn a_key_that_is_broken_or_belongs_to_two_is_refused_with_its_line() {
    let same_key_other_comment = DEVICE.replace("me@laptop", "you@desk");
    let many = vec![DEVICE; 65];
    for (text, line, words) in [
        (agent("a", &device_keys(&["ssh-rsa AAAA hunter2"])), 3, "ssh-ed25519"),
        (
            agent("a", &device_keys(&[DEVICE])) + &agent("b", &device_keys(&[&same_key_other_comment])),
            6,
            "agent \"a\"'s",
        ),
        (agent("a", &device_keys(&[DEVICE, &same_key_other_comment])), 3, "one agent"),
        (agent("a", &device_keys(&many)), 1, "more than 64"),
        (agent("a", "api_keys = [{ name = \"ci\", sha256 = \"hunter2\" }]"), 3, "SHA-256"),
        (agent("a", "api_keys = [{ name = \"ci\", key = \"hunter2\" }]"), 3, "unknown field"),
        (agent("a", &api_keys(&[("", "bop_1")])), 3, "`name`"),
        (agent("a", &api_keys(&[("ci", "bop_1"), ("ci", "bop_2")])), 3, "twice"),
        (agent("a", &api_keys(&[("ci", "bop_1")])) + &agent("b", &api_keys(&[("ci", "bop_1")])), 6, "agent \"a\"'s"),
    ] {
        let said = fault(&text);
        assert!(said.starts_with(&format!("agents.toml:{line}: ")) && said.contains(words), "{text}\n{said}");
        assert!(!said.contains("hunter2") && !said.contains("AAAAC3"), "a key or hash is never quoted");
    }
}

#[test]
fn an_empty_file_has_no_agents() {
    assert!(Agents::parse("").unwrap().is_empty());
}

#[test]
fn agents_keep_the_order_of_the_file() {
    let agents = Agents::parse(&(agent("z", "") + &agent("a", "") + &agent("m", ""))).unwrap();
    assert_eq!(agents.iter().map(|agent| agent.id.as_str()).collect::<Vec<_>>(), ["z", "a", "m"]);
}

#[test]
fn the_first_start_makes_one_agent_and_never_replaces_a_file() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("state/agents.toml");
    let (made, secret) = Agents::create_with_demo(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    let loaded = Agents::load(&path).unwrap();
    assert_eq!(made.find(DEMO_AGENT_ID), loaded.find(DEMO_AGENT_ID));
    assert_eq!(loaded.authenticate(DEMO_AGENT_ID, &secret).unwrap().permissions, ["web:read", "web:write"]);
    assert!(!std::fs::read_to_string(&path).unwrap().contains(secret.expose()), "secrets are stored hashed");
    assert!(matches!(Agents::create_with_demo(&path), Err(AgentsError::AlreadyThere { .. })));
}

#[test]
fn agents_agree_on_an_id_while_nothing_of_it_has_changed() {
    let with = |hash: &SecretHash, more: &str| {
        let text = agent("a", &format!("secret_hash = \"{}\"\n{more}", hash.as_str())) + &agent("b", "");
        Agents::parse(&text).unwrap()
    };
    let hash = SecretHash::of_nobody();
    let now = with(&hash, "");
    assert!(now.agrees_on(&with(&hash, "state = \"active\""), "a") && now.agrees_on(&Agents::default(), "nobody"));
    for other in [with(&SecretHash::of_nobody(), ""), with(&hash, "state = \"suspended\""), Agents::default()] {
        assert!(!now.agrees_on(&other, "a"));
    }
}

#[test]
fn a_file_that_others_can_write_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("agents.toml");
    std::fs::write(&path, agent("a", "")).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
    assert!(Agents::load(&path).is_ok());
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o664)).unwrap();
    assert!(Agents::load(&path).unwrap_err().to_string().contains("chmod go-w"));
    assert!(matches!(Agents::load(&root.path().join("none")), Err(AgentsError::NotThere { .. })));
}
