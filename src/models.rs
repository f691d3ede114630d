//! What an operator says of models, ready for use: which names stand for others, and the settings that hold for each.
//!
//! Pure. Names are compared as Ollama compares them, so that no spelling gets around a rule.

mod hours;

use std::collections::HashMap;

pub use hours::Hours;

use crate::config::{self, Setting, Span};
use crate::wire::keep_alive::KeepAlive;
use crate::wire::rewrite::settings::{Rule, Rules};
use crate::wire::{Ask, Endpoint, Kind, ModelRef, model};

/// The name of the table that holds for all models without one.
const OTHERS: &str = "*";

/// Most models that may run for one name: each is decided by the policy.
const MOST_IN_A_CHAIN: usize = 8;

/// All that is said of models.
#[derive(Default)]
pub struct Models {
    /// By canonical name.
    chains: HashMap<String, Chain>,
    rules: HashMap<String, Rules>,
    others: Rules,
    /// In the order of the configuration.
    aliases: Vec<Alias>,
    warm: Vec<Warm>,
    /// Hosts, in lower case.
    registries: Vec<String>,
}

/// A model that is loaded before anybody asks for it.
#[derive(Clone, Debug)]
pub struct Warm {
    pub model: ModelRef,
    pub hours: Hours,
}

/// A name that is no model's own.
#[derive(Clone, Debug)]
pub struct Alias {
    pub name: ModelRef,
    /// What may run for it, best first.
    pub targets: Vec<ModelRef>,
}

/// What may run when a name is asked for, best first. Never empty.
#[derive(Clone, Debug)]
struct Chain {
    targets: Vec<ModelRef>,
    is_alias: bool,
}

impl Models {
    /// # Errors
    /// A name that is none, one that is said twice, a chain that leads back to itself. The text says where and what to do.
    pub fn new(configured: &[config::Model], general: &config::Models) -> Result<Models, String> {
        let mut tables: HashMap<String, &config::Model> = HashMap::new();
        let mut names = Vec::new();
        let mut models = Models { registries: general.registries.clone(), ..Models::default() };
        for table in configured {
            let named = |e: String| format!("model {:?}: {e}", table.name);
            let rules = rules(table).map_err(named)?;
            if table.name == OTHERS {
                if !table.alias.is_empty() || !table.fallback.is_empty() || !table.warm.is_empty() {
                    return Err(named(
                        "it stands for every model, and can have no alias, fallback or warm; name one".to_owned(),
                    ));
                }
                models.others = rules;
                continue;
            }
            let name = parse(&table.name)?;
            if !table.alias.is_empty() && !rules.is_empty() {
                return Err(named("an alias has no settings of its own; set them at the model that runs".to_owned()));
            }
            if !table.warm.is_empty() {
                let hours = Hours::parse(&table.warm).filter(|_| table.alias.is_empty()).ok_or_else(|| {
                    named(format!("warm = {:?} is no span of a day; write \"always\" or one like \"07:00-18:00\", for a model itself", table.warm))
                })?;
                models.warm.push(Warm { model: name.clone(), hours });
            }
            let canonical = name.canonical();
            if tables.insert(canonical.clone(), table).is_some() {
                return Err(named("there are two tables for it; make them one".to_owned()));
            }
            if !rules.is_empty() {
                models.rules.insert(canonical, rules);
            }
            names.push(name);
        }
        for name in names {
            let mut targets = Vec::new();
            follow(&name, &tables, &mut Vec::new(), &mut targets)?;
            let table = tables[&name.canonical()];
            let is_alias = !table.alias.is_empty();
            if !is_alias && table.fallback.is_empty() {
                continue;
            }
            if targets.len() > MOST_IN_A_CHAIN {
                return Err(format!(
                    "model {:?}: more than {MOST_IN_A_CHAIN} models may run for it; shorten its fallback",
                    table.name
                ));
            }
            if is_alias {
                models.aliases.push(Alias { name: name.clone(), targets: targets.clone() });
            }
            models.chains.insert(name.canonical(), Chain { targets, is_alias });
        }
        Ok(models)
    }

    /// What may run for a name, best first; `None`: only the model of that name.
    pub fn targets(&self, asked: &ModelRef) -> Option<&[ModelRef]> {
        self.chains.get(&asked.canonical()).map(|chain| chain.targets.as_slice())
    }

    /// What may run for a request: nobody manages a model by an alias, and a list has none.
    pub fn targets_for(&self, endpoint: Endpoint, ask: &Ask) -> Vec<ModelRef> {
        match endpoint.kind() {
            Kind::Infer | Kind::Read => {
                ask.model.as_ref().and_then(|asked| self.targets(asked)).unwrap_or_default().to_vec()
            }
            _ => Vec::new(),
        }
    }

    pub fn is_alias(&self, asked: &ModelRef) -> bool {
        self.chains.get(&asked.canonical()).is_some_and(|chain| chain.is_alias)
    }

    /// In the order of the configuration.
    pub fn aliases(&self) -> &[Alias] {
        &self.aliases
    }

    pub fn warm(&self) -> &[Warm] {
        &self.warm
    }

    /// Whether Ollama may connect to the registry of a model's name.
    pub fn may_come_from(&self, model: &ModelRef) -> bool {
        self.registries.contains(&model.host)
    }

    /// What holds for the settings of a model.
    pub fn rules(&self, model: &ModelRef) -> &Rules {
        self.rules.get(&model.canonical()).unwrap_or(&self.others)
    }
}

/// Adds to `targets` what may run for a name: what it is an alias of, else itself; and then its fallbacks.
fn follow(
    name: &ModelRef,
    tables: &HashMap<String, &config::Model>,
    path: &mut Vec<String>,
    targets: &mut Vec<ModelRef>,
) -> Result<(), String> {
    let canonical = name.canonical();
    let in_a_circle = path.contains(&canonical);
    path.push(canonical);
    if in_a_circle {
        return Err(format!("model: {} leads back to itself; break the circle", path.join(" -> ")));
    }
    let table = tables.get(&path[path.len() - 1]).copied();
    let alias = table.map(|table| table.alias.as_str()).filter(|alias| !alias.is_empty());
    match alias {
        Some(alias) => follow(&parse(alias)?, tables, path, targets)?,
        None if targets.iter().any(|known| known.same_model(name)) => {}
        None => targets.push(name.clone()),
    }
    for next in table.map(|table| table.fallback.as_slice()).unwrap_or_default() {
        follow(&parse(next)?, tables, path, targets)?;
    }
    path.pop();
    Ok(())
}

fn parse(name: &str) -> Result<ModelRef, String> {
    model::parse(name).map_err(|e| format!("model {name:?}: {e}"))
}

fn rules(table: &config::Model) -> Result<Rules, String> {
    let numbers = [&table.num_ctx, &table.num_batch, &table.num_gpu, &table.main_gpu, &table.num_thread];
    let mut own = Rules { use_mmap: table.use_mmap.as_ref().map(plain), ..Rules::default() };
    for (rule, setting) in own.numbers.iter_mut().zip(numbers) {
        *rule = setting.as_ref().map(plain);
    }
    own.keep_alive = table.keep_alive.as_ref().map(keep_alive).transpose()?;
    let upside_down = own.numbers.iter().flatten().any(is_upside_down) || own.keep_alive.iter().any(is_upside_down);
    if upside_down {
        return Err("a min is larger than its max; exchange them".to_owned());
    }
    Ok(own)
}

fn plain<T: Clone>(setting: &Setting<T>) -> Rule<T> {
    match setting {
        Setting::Pin(value) => Rule::Pin(value.clone()),
        Setting::Clamp { min, max } => Rule::Clamp { least: min.clone(), most: max.clone() },
        Setting::Strip => Rule::Strip,
    }
}

fn keep_alive(setting: &Setting<Span>) -> Result<Rule<KeepAlive>, String> {
    let read = |span: &Span| match span {
        Span::Seconds(seconds) => KeepAlive::seconds(&seconds.to_string()).ok_or_else(String::new),
        Span::Text(text) => KeepAlive::duration(text).ok_or_else(|| {
            format!("keep_alive {text:?} is no duration; write one like \"30m\", or seconds without quotes")
        }),
    };
    let bound = |span: &Option<Span>| span.as_ref().map(read).transpose();
    Ok(match setting {
        Setting::Pin(span) => Rule::Pin(read(span)?),
        Setting::Clamp { min, max } => Rule::Clamp { least: bound(min)?, most: bound(max)? },
        Setting::Strip => Rule::Strip,
    })
}

fn is_upside_down<T: PartialOrd>(rule: &Rule<T>) -> bool {
    matches!(rule, Rule::Clamp { least: Some(least), most: Some(most) } if least > most)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> config::Model {
        config::Model { name: name.to_owned(), ..config::Model::default() }
    }

    fn alias(name: &str, of: &str) -> config::Model {
        config::Model { alias: of.to_owned(), ..named(name) }
    }

    fn chain(name: &str, fallback: &[&str]) -> config::Model {
        config::Model { fallback: fallback.iter().map(|name| (*name).to_owned()).collect(), ..named(name) }
    }

    fn targets(models: &Models, asked: &str) -> Option<Vec<String>> {
        let targets = models.targets(&model::parse(asked).unwrap())?;
        Some(targets.iter().map(ModelRef::canonical).collect())
    }

    fn made(configured: &[config::Model]) -> Models {
        Models::new(configured, &config::Models::default()).unwrap()
    }

    fn refused(configured: &[config::Model]) -> String {
        Models::new(configured, &config::Models::default()).err().expect("this must not be taken")
    }

    #[test]
    fn a_name_stands_for_others_in_every_spelling() {
        let tables = [alias("fast", "Llama3.2:3B"), chain("big", &["fast", "tiny"]), chain("tiny", &["last"])];
        let models = Models::new(&tables, &config::Models::default()).unwrap();
        for asked in ["fast", "FAST:latest", "library/fast", "registry.ollama.ai/library/fast"] {
            assert_eq!(targets(&models, asked).unwrap(), ["llama3.2:3b"], "{asked}");
        }
        assert_eq!(targets(&models, "big").unwrap(), ["big", "llama3.2:3b", "tiny", "last"]);
        assert_eq!(targets(&models, "llama3.2:3b"), None);
        assert!(models.is_alias(&model::parse("Fast").unwrap()) && !models.is_alias(&model::parse("big").unwrap()));
        assert_eq!(models.aliases().len(), 1);
        // An alias may have fallbacks, and what comes twice runs once.
        let models = made(&[config::Model { alias: "a".into(), ..chain("x", &["b", "a"]) }, chain("a", &["b"])]);
        assert_eq!(targets(&models, "x").unwrap(), ["a", "b"]);
    }

    #[test]
    fn a_circle_is_refused_and_shown() {
        let circle = [alias("a", "b"), alias("B:latest", "c"), chain("c", &["A"])];
        assert_eq!(refused(&circle), "model: a -> b -> c -> a leads back to itself; break the circle");
        assert!(refused(&[alias("a", "a")]).contains("a -> a leads back"));
        assert!(refused(&[chain("a", &["a:latest"])]).contains("a -> a leads back"));
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_its_name() {
        let pinned = |name: &str| config::Model { num_ctx: Some(Setting::Pin(1)), ..named(name) };
        for (tables, words) in [
            (vec![named("a b")], "model \"a b\": "),
            (vec![alias("a", "no/such/kind/of/name")], "no/such/kind/of/name"),
            (vec![pinned("a"), pinned("A:latest")], "two tables"),
            (vec![config::Model { alias: "b".into(), ..pinned("a") }], "no settings of its own"),
            (vec![chain("*", &["a"])], "can have no alias"),
            (vec![config::Model { warm: "always".into(), ..named("*") }], "can have no alias"),
            (vec![config::Model { warm: "8-18".into(), ..named("a") }], "is no span of a day"),
            (vec![config::Model { warm: "always".into(), ..alias("a", "b") }], "for a model itself"),
            (
                vec![config::Model { keep_alive: Some(Setting::Pin(Span::Text("5".into()))), ..named("a") }],
                "is no duration",
            ),
            (
                vec![config::Model { num_gpu: Some(Setting::Clamp { min: Some(2), max: Some(1) }), ..named("a") }],
                "exchange them",
            ),
            (vec![chain("a", &["b", "c", "d", "e", "f", "g", "h", "i"])], "more than 8"),
        ] {
            let e = refused(&tables);
            assert!(e.contains(words), "{e}");
        }
    }

    #[test]
    fn settings_hold_for_one_model_or_for_all_others() {
        let own = config::Model { num_ctx: Some(Setting::Pin(8192)), ..named("Mistral:latest") };
        let others = config::Model { num_ctx: Some(Setting::Strip), ..named("*") };
        let models = Models::new(&[own, others], &config::Models::default()).unwrap();
        let rule = |name: &str| models.rules(&model::parse(name).unwrap()).numbers[0].clone();
        assert_eq!(rule("library/mistral"), Some(Rule::Pin(8192)));
        assert_eq!(rule("mistral:7b"), Some(Rule::Strip));
        assert!(Models::new(&[], &config::Models::default()).unwrap().rules(&model::parse("x").unwrap()).is_empty());
    }
}
