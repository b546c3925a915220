//! Options in layers: a file, `--set key=value`, the command line; each over the one before.
//!
//! Every layer is checked by itself against the JSON schema of the options, so that an error names the layer, the key and
//! the nearest known key.

use std::path::Path;

use miette::Result;
use schemars::{JsonSchema, schema_for};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::usage;
use crate::data::distance;
use crate::files;

/// Options from one place.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    source: String,
    value: Value,
}

/// An option that another one, set in a higher layer, takes the place of: `(set, dropped)`.
type Replaced = (&'static str, &'static str);

impl Layer {
    /// A `.toml`, `.yaml` or `.yml` file.
    pub(super) fn file(path: &Path) -> Result<Self> {
        let source = path.display().to_string();
        if !path.is_file() {
            return Err(usage(format!("there is no configuration {source}"), "check --config"));
        }
        let text = String::from_utf8(files::read(path)?)
            .map_err(|e| usage(format!("{source} is not UTF-8: {e}"), "save it as UTF-8"))?;
        let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase());
        let value = match extension.as_deref() {
            Some("yaml" | "yml") => serde_saphyr::from_str(&text).map_err(|e| one_line(&e.to_string())),
            Some("toml") => toml::from_str(&text).map_err(|e| at_line(&text, &e)),
            _ => {
                let message = format!("{source} is neither TOML nor YAML by its name");
                return Err(usage(message, "name the file .toml, .yaml or .yml"));
            }
        };
        let value = value.map_err(|why| usage(format!("{source}: {why}"), "see schemas/train.schema.json"))?;
        match value {
            Value::Null => Ok(Self { source, value: Value::Object(Map::new()) }),
            Value::Object(_) => Ok(Self { source, value }),
            _ => Err(usage(format!("{source} holds no table of options"), "see schemas/train.schema.json")),
        }
    }

    /// `key=value`, the key with dots, the value as in TOML; what is no TOML value is text. `null` unsets an option that
    /// need not be set.
    pub(super) fn set(text: &str) -> Result<Self> {
        let source = format!("--set {text}");
        let fail = |why: &str| Err(usage(format!("{source}: {why}"), "write --set train.learning_rate=1e-3"));
        let Some((key, value)) = text.split_once('=') else { return fail("there is no `=`") };
        if key.split('.').any(|part| part.trim().is_empty()) {
            return fail("the key has an empty part");
        }
        let value = match value.trim() {
            "null" => Value::Null,
            value => match toml::from_str::<Map<String, Value>>(&format!("v = {value}")) {
                Ok(mut table) if table.len() == 1 => table.remove("v").unwrap_or_default(),
                _ => Value::String(value.into()),
            },
        };
        let nest = |inner, part: &str| Value::Object(Map::from_iter([(part.trim().to_owned(), inner)]));
        Ok(Self { source, value: key.split('.').rev().fold(value, nest) })
    }

    /// What the command line says by itself.
    pub(super) fn command_line(value: Value) -> Self {
        Self { source: "the command line".into(), value }
    }
}

/// The defaults with all layers over them.
pub(super) fn resolve<T>(layers: Vec<Layer>, replaced: &[Replaced]) -> Result<T>
where
    T: Default + Serialize + DeserializeOwned + JsonSchema,
{
    let schema = schema_for!(T).to_value();
    let mut merged = serde_json::to_value(T::default()).unwrap_or_default();
    for Layer { source, mut value } in layers {
        check(&schema, &schema, &mut value, &source, &mut Vec::new())?;
        read::<T>(value.clone(), &source)?;
        for (set, dropped) in replaced {
            if is_set(&value, set) && !is_set(&value, dropped) {
                unset(&mut merged, dropped);
            }
        }
        merge(&mut merged, value);
    }
    read(merged, "the options together")
}

/// Options as a TOML file would hold them; those that are not set are left out.
pub(super) fn to_toml(options: &impl Serialize) -> Result<String> {
    let mut value = serde_json::to_value(options).map_err(|e| usage(e.to_string(), "this is a defect of prefold"))?;
    drop_unset(&mut value);
    toml::to_string(&value).map_err(|e| usage(e.to_string(), "this is a defect of prefold"))
}

fn drop_unset(value: &mut Value) {
    if let Value::Object(fields) = value {
        fields.retain(|_, value| !value.is_null());
        fields.values_mut().for_each(drop_unset);
    }
}

fn read<T: DeserializeOwned>(value: Value, source: &str) -> Result<T> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let message = format!("{source}: `{}`: {}", error.path(), in_words(&error.inner().to_string()));
        usage(message, "see schemas/train.schema.json")
    })
}

/// serde's message in the words of a configuration. JSON has neither NaN nor infinity: they arrive as null.
fn in_words(message: &str) -> String {
    let words = [
        ("invalid type: null, expected f64", "is not a finite number"),
        ("expected usize", "expected a whole number from 0 up"),
        ("expected u64", "expected a whole number from 0 up"),
        ("expected f64", "expected a number"),
    ];
    words.iter().fold(message.to_owned(), |message, (serde, words)| message.replace(serde, words))
}

fn merge(base: &mut Value, over: Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (key, value) in over {
                merge(base.entry(key).or_insert(Value::Null), value);
            }
        }
        (base, over) => *base = over,
    }
}

fn pointer(key: &str) -> String {
    format!("/{}", key.replace('.', "/"))
}

fn is_set(value: &Value, key: &str) -> bool {
    value.pointer(&pointer(key)).is_some_and(|value| !value.is_null())
}

fn unset(value: &mut Value, key: &str) {
    if let Some(value) = value.pointer_mut(&pointer(key)) {
        *value = Value::Null;
    }
}

/// Refuses keys that the schema does not know. A number where only text may stand becomes text, and text that is a number
/// becomes one where only a number may stand: `holdout: 0.1`, and YAML's `1e-3`, which many readers take for text.
fn check(root: &Value, schema: &Value, value: &mut Value, source: &str, path: &mut Vec<String>) -> Result<()> {
    let schemas = alternatives(root, schema);
    if let Value::Object(fields) = value {
        let known: Map<String, Value> = schemas
            .iter()
            .filter_map(|s| s.get("properties")?.as_object())
            .flatten()
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect();
        if known.is_empty() {
            return Ok(());
        }
        let open = schemas.iter().any(|s| s.get("additionalProperties").is_some_and(|a| a != &Value::Bool(false)));
        for (key, value) in fields {
            path.push(key.clone());
            match known.get(key) {
                Some(schema) => check(root, schema, value, source, path)?,
                None if open => {}
                None => return Err(unknown_key(root, source, path)),
            }
            path.pop();
        }
        return Ok(());
    }
    let allows = |names: &[&str]| {
        let is_one = |name: &Value| name.as_str().is_some_and(|name| names.contains(&name));
        let types = schemas.iter().filter_map(|s| s.get("type"));
        types.into_iter().any(|t| t.as_array().map_or_else(|| is_one(t), |types| types.iter().any(is_one)))
    };
    match value {
        Value::Number(number) if allows(&["string"]) && !allows(&["number", "integer"]) => {
            *value = Value::String(number.to_string());
        }
        Value::String(text) if allows(&["number", "integer"]) && !allows(&["string"]) => {
            if let Ok(number @ Value::Number(_)) = serde_json::from_str(text) {
                *value = number;
            }
        }
        _ => {}
    }
    Ok(())
}

/// A schema with its references followed and its alternatives laid open.
fn alternatives<'s>(root: &'s Value, schema: &'s Value) -> Vec<&'s Value> {
    let referred = schema.get("$ref").and_then(Value::as_str).and_then(|r| root.pointer(r.strip_prefix('#')?));
    let listed = ["anyOf", "oneOf", "allOf"].into_iter().filter_map(|key| schema.get(key)?.as_array()).flatten();
    let inner = referred.into_iter().chain(listed).flat_map(|schema| alternatives(root, schema));
    std::iter::once(schema).chain(inner).collect()
}

fn unknown_key(root: &Value, source: &str, path: &[String]) -> miette::Report {
    let message = format!("{source}: there is no option `{}`", path.join("."));
    let mut known = Vec::new();
    collect_keys(root, root, &mut Vec::new(), &mut known);
    match nearest(path, &known) {
        Some(key) => usage(message, format!("did you mean `{key}`?")),
        None => usage(message, "see schemas/train.schema.json"),
    }
}

fn collect_keys(root: &Value, schema: &Value, path: &mut Vec<String>, keys: &mut Vec<Vec<String>>) {
    for schema in alternatives(root, schema) {
        for (key, inner) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
            path.push(key.clone());
            keys.push(path.clone());
            collect_keys(root, inner, path, keys);
            path.pop();
        }
    }
}

/// The known key most like `path`: by its last part, keys of the same table before others.
fn nearest(path: &[String], known: &[Vec<String>]) -> Option<String> {
    let (last, table) = path.split_last()?;
    let from = |key: &Vec<String>| {
        let (name, of) = key.split_last()?;
        Some(2 * distance(last, name)? + usize::from(of != table))
    };
    let near = known.iter().filter_map(|key| Some((from(key)?, key)));
    near.min_by_key(|(distance, _)| *distance).map(|(_, key)| key.join("."))
}

fn one_line(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default().trim();
    // what follows is advice for programmers
    let line = line.split(", set DuplicateKeyPolicy").next().unwrap_or(line);
    line.strip_prefix("error: ").unwrap_or(line).to_owned()
}

/// A TOML error with its line and column.
fn at_line(text: &str, error: &toml::de::Error) -> String {
    let before = error.span().and_then(|span| text.get(..span.start));
    let place = before.map(|before| {
        let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
        format!("line {}, column {column}: ", before.matches('\n').count() + 1)
    });
    format!("{}{}", place.unwrap_or_default(), one_line(error.message()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::cli::train::RunConfig;

    fn file(name: &str, text: &str) -> Result<Layer> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        let layer = Layer::file(&path).map_err(|error| {
            let help = error.help().map(|help| help.to_string()).unwrap_or_default();
            usage(error.to_string().replace(&folder.path().display().to_string(), "FOLDER"), help)
        })?;
        Ok(Layer { source: name.into(), ..layer })
    }

    fn run(layers: Vec<Layer>) -> Result<RunConfig> {
        resolve(
            layers,
            &[("data.holdout", "data.eval"), ("data.eval", "data.holdout"), ("train.epochs", "train.max_steps")],
        )
    }

    /// An error and its help.
    fn failure(layer: Result<Layer>) -> String {
        let error = layer.and_then(|layer| run(vec![layer])).unwrap_err();
        format!("{error} ({})", error.help().map(|help| help.to_string()).unwrap_or_default())
    }

    #[test]
    fn each_layer_lies_over_the_one_before() {
        let toml = "model = \"a\"\n[train]\nepochs = 2\nmax_steps = 5\nseed = 1\n[train.adamw]\nbeta1 = 0.5\n[data]\neval = \"e\"";
        let config = run(vec![
            file("run.toml", toml).unwrap(),
            Layer::set("train.seed=7").unwrap(),
            Layer::set("adapter.layers=[0, 2]").unwrap(),
            Layer::set("data.holdout = 0.1").unwrap(),
            Layer::set("data.format.system=You = me").unwrap(),
            Layer::command_line(json!({"train": {"epochs": 9, "adamw": {"beta2": 0.75}}})),
        ])
        .unwrap();
        assert_eq!((config.model.as_deref(), config.train.seed, config.train.epochs), (Some("a"), 7, 9));
        assert_eq!((config.train.adamw.beta1, config.train.adamw.beta2), (0.5, 0.75));
        assert_eq!(config.adapter.layers, Some(vec![0, 2]));
        assert_eq!(config.data.holdout.as_deref(), Some("0.1"));
        assert_eq!(config.data.format.system.as_deref(), Some("You = me"));
        assert!(config.data.eval.is_none() && config.train.max_steps.is_none(), "replaced by higher layers");
    }

    #[test]
    fn yaml_says_the_same_as_toml() {
        let yaml =
            "model: a\ntrain:\n  learning_rate: 1e-3\n  objective: dpo\n  dpo: {beta: 0.5}\ndata:\n  holdout: 20\n";
        let toml = "model = \"a\"\n[train]\nlearning_rate = 1e-3\nobjective = \"dpo\"\ndpo = { beta = 0.5 }\n[data]\nholdout = \"20\"";
        let [yaml, toml] = [file("a.yaml", yaml), file("a.toml", toml)].map(|layer| run(vec![layer.unwrap()]).unwrap());
        assert_eq!(serde_json::to_value(&yaml).unwrap(), serde_json::to_value(&toml).unwrap());
        assert_eq!(yaml.train.learning_rate, 1e-3);
        assert_eq!(run(vec![file("empty.yml", "").unwrap()]).unwrap().train, RunConfig::default().train);
    }

    #[test]
    fn unset_options_are_the_default() {
        let config = run(vec![Layer::set("train.max_steps=5").unwrap(), Layer::set("train.max_steps=null").unwrap()]);
        assert_eq!(config.unwrap().train.max_steps, None);
    }

    #[test]
    fn errors_name_the_layer_the_key_and_the_nearest_known_one() {
        let errors = [
            failure(file("a.toml", "[train]\nlearning_rat = 1.0")),
            failure(file("a.yaml", "train:\n  adamw:\n    beta_1: 0.9")),
            failure(file("a.toml", "learning-rate = 1.0")),
            failure(file("a.toml", "[train]\nzzz = 1")),
            failure(Layer::set("trian.epochs=3")),
            failure(Layer::set("train.epochs=many")),
            failure(Layer::set("train.learning_rate=nan")),
            failure(Layer::set("train.epochs")),
            failure(Layer::set("train..epochs=1")),
            failure(Layer::set("train=3")),
            failure(file("a.toml", "[train]\nobjective = \"ppo\"")),
            failure(file("a.toml", "[train]\nseed = 1\nseed = 2")),
            failure(file("a.toml", "x = [1,")),
            failure(file("a.yaml", "train: [1")),
            failure(file("a.yaml", "train:\n  seed: 1\n  seed: 2")),
            failure(file("a.yaml", "- 1")),
            failure(file("a.json", "{}")),
        ];
        insta::assert_snapshot!(errors.join("\n"), @r#"
        a.toml: there is no option `train.learning_rat` (did you mean `train.learning_rate`?)
        a.yaml: there is no option `train.adamw.beta_1` (did you mean `train.adamw.beta1`?)
        a.toml: there is no option `learning-rate` (did you mean `train.learning_rate`?)
        a.toml: there is no option `train.zzz` (see schemas/train.schema.json)
        --set trian.epochs=3: there is no option `trian` (did you mean `train`?)
        --set train.epochs=many: `train.epochs`: invalid type: string "many", expected a whole number from 0 up (see schemas/train.schema.json)
        --set train.learning_rate=nan: `train.learning_rate`: is not a finite number (see schemas/train.schema.json)
        --set train.epochs: there is no `=` (write --set train.learning_rate=1e-3)
        --set train..epochs=1: the key has an empty part (write --set train.learning_rate=1e-3)
        --set train=3: `train`: invalid type: integer `3`, expected struct TrainConfig (see schemas/train.schema.json)
        a.toml: `train.objective`: unknown variant `ppo`, expected one of `sft`, `dpo`, `simpo` (see schemas/train.schema.json)
        FOLDER/a.toml: line 3, column 1: duplicate key (see schemas/train.schema.json)
        FOLDER/a.toml: line 1, column 8: unclosed array, expected `]` (see schemas/train.schema.json)
        FOLDER/a.yaml: line 1 column 8: unclosed bracket '[' (see schemas/train.schema.json)
        FOLDER/a.yaml: line 3 column 3: duplicate mapping key: seed (see schemas/train.schema.json)
        FOLDER/a.yaml holds no table of options (see schemas/train.schema.json)
        FOLDER/a.json is neither TOML nor YAML by its name (name the file .toml, .yaml or .yml)
        "#);
    }
}
