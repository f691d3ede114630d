use std::os::unix::fs::MetadataExt;

use super::*;
use crate::identity::secret::Secret;

const FILE: &str = "\
# Who may come in. Ask Ada before you change this.

# the research team's
[[agent]]
id = \"research\"   # do not rename
roles = [\"internal\"]
state = \"active\" # since May

# nobody remembers
[[agent]]
id = 'legacy'
permissions = [
    \"web:read\", # only this
]

# the end
";

fn agent(id: &str) -> Agent {
    Agent {
        id: id.to_owned(),
        name: Some("A \"new\" one".to_owned()),
        roles: vec!["ops".to_owned(), "dev".to_owned()],
        permissions: vec!["web:read".to_owned()],
        risk_tier: Some("low".to_owned()),
        state: State::Active,
    }
}

fn changed(text: &str, change: &Change) -> String {
    apply(text, change).unwrap_or_else(|e| panic!("{e}")).0
}

fn state(id: &str, state: State) -> Change {
    Change::State { id: id.to_owned(), state }
}

#[test]
fn an_edit_changes_its_own_line_and_nothing_else() {
    let suspended = changed(FILE, &state("research", State::Suspended));
    assert_eq!(suspended, FILE.replace("state = \"active\" # since May", "state = \"suspended\" # since May"));
    assert_eq!(changed(&suspended, &state("research", State::Active)), FILE);
    // A key that is not there yet comes behind those that are.
    let suspended = changed(FILE, &state("legacy", State::Suspended));
    assert_eq!(suspended, FILE.replace("this\n]\n", "this\n]\nstate = \"suspended\"\n"));
}

#[test]
fn an_added_agent_comes_last_and_is_read_as_it_was_given() {
    let (text, agents) = apply(FILE, &Change::Add { agent: agent("new"), secret_hash: None }).unwrap();
    let rest = text.replace(
        "\n[[agent]]\nid = \"new\"\nname = 'A \"new\" one'\nroles = [\"ops\", \"dev\"]\n\
         permissions = [\"web:read\"]\nrisk_tier = \"low\"\nstate = \"active\"\n",
        "",
    );
    assert_eq!(rest, FILE, "{text}");
    assert_eq!(agents.find("new"), Some(&agent("new")));
    assert_eq!(agents.iter().map(|agent| agent.id.as_str()).collect::<Vec<_>>(), ["research", "legacy", "new"]);
    let (text, agents) = apply("", &Change::Add { agent: agent("first"), secret_hash: None }).unwrap();
    assert!(text.starts_with("[[agent]]\n"));
    assert_eq!(agents.len(), 1);
}

#[test]
fn a_removed_agent_takes_its_own_comment_along_and_leaves_the_files() {
    let text = changed(FILE, &Change::Remove { id: "research".to_owned() });
    assert_eq!(
        text,
        "# Who may come in. Ask Ada before you change this.\n\n# nobody remembers\n[[agent]]\nid = 'legacy'\n\
         permissions = [\n    \"web:read\", # only this\n]\n\n# the end\n"
    );
    let text = changed(&text, &Change::Remove { id: "legacy".to_owned() });
    assert!(text.contains("Ask Ada") && text.contains("# the end") && !text.contains("nobody"), "{text}");
    assert!(Agents::parse(&text).unwrap().is_empty());
    let text = changed(&text, &Change::Add { agent: agent("again"), secret_hash: None });
    assert!(text.contains("Ask Ada") && text.contains("\n\n[[agent]]\nid = \"again\""), "{text}");
}

#[test]
fn a_rotated_secret_replaces_the_old_hash() {
    let (old, new) = (Secret::random(), Secret::random());
    let add = Change::Add { agent: agent("a"), secret_hash: Some(SecretHash::of(&old)) };
    let text = changed(HEADER, &add);
    let rotate = Change::Secret { id: "a".to_owned(), secret_hash: SecretHash::of(&new) };
    let (text, agents) = apply(&text, &rotate).unwrap();
    assert!(agents.authenticate("a", &old).is_err());
    assert!(agents.authenticate("a", &new).is_ok());
    assert_eq!(text.matches("secret_hash").count(), 1);
}

#[test]
fn what_cannot_be_done_is_said_and_changes_nothing() {
    let refused = |text: &str, change: Change| apply(text, &change).unwrap_err().to_string();
    let add = |agent: Agent| Change::Add { agent, secret_hash: None };
    assert!(refused(FILE, add(agent("research"))).contains("already"));
    assert!(refused(FILE, state("nobody", State::Active)).contains("no agent \"nobody\""));
    assert!(refused(FILE, Change::Remove { id: "nobody".to_owned() }).contains("no agent"));
    assert!(refused(FILE, add(agent(""))).contains("`id`"));
    assert!(refused(FILE, add(Agent { roles: vec!["r".to_owned(); 9], ..agent("x") })).contains("`roles`"));
    assert!(refused(FILE, add(Agent { name: Some("\u{1b}".to_owned()), ..agent("x") })).contains("`name`"));
    assert!(refused("agent = [{ id = \"a\" }]\n", add(agent("x"))).contains("[[agent]]"));
    let broken = refused("[[agent]]\nid = \"a\"\nid = \"b\"\n", add(agent("x")));
    assert!(broken.contains("agents.toml:3:") && broken.contains("correct the file"), "{broken}");
}

#[test]
fn a_first_change_makes_the_file_and_a_broken_one_is_left_alone() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("state/agents.toml");
    assert!(matches!(change_file(&path, &state("a", State::Active)), Err(EditError::Unknown { .. })));
    assert!(!path.exists(), "a change that failed makes nothing");
    change_file(&path, &Change::Add { agent: agent("a"), secret_hash: None }).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    assert_eq!(Agents::load(&path).unwrap().find("a"), Some(&agent("a")));

    std::fs::write(&path, "[[agent]\n").unwrap();
    let words = change_file(&path, &state("a", State::Active)).unwrap_err().to_string();
    assert!(words.starts_with(&format!("{}:1:", path.display())), "{words}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "[[agent]\n");
}

#[test]
fn edits_at_once_lose_nothing() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("agents.toml");
    std::thread::scope(|scope| {
        for n in 0..16 {
            let path = &path;
            scope.spawn(move || {
                let add = Change::Add { agent: agent(&format!("a{n}")), secret_hash: None };
                change_file(path, &add).unwrap_or_else(|e| panic!("{e}"));
            });
        }
    });
    assert_eq!(Agents::load(&path).unwrap().len(), 16);
    assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 1, "no draft and no lock stays behind");
}
