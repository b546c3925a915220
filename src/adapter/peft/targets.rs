//! Which modules a PEFT configuration means.

use fancy_regex::Regex;
use serde_json::Value;

use super::config::Config;
use crate::adapter::Result;

/// `target_modules`.
pub(super) enum Targets {
    /// Every linear map but the output projection.
    All,
    /// Names, or ends of names.
    Named(Vec<String>),
    /// An expression that the whole name matches.
    Pattern(Box<Regex>),
}

impl Targets {
    pub(super) fn of(config: &Config) -> Result<Self> {
        let help = "take adapter_config.json as PEFT wrote it";
        match config.get("target_modules") {
            Some(Value::String(text)) if text == "all-linear" => Ok(Self::All),
            Some(Value::String(text)) => match Regex::new(&format!("^(?:{text})$")) {
                Ok(pattern) => Ok(Self::Pattern(Box::new(pattern))),
                Err(error) => config.fail(format!("`target_modules` is not an expression: {error}"), help),
            },
            Some(Value::Array(names)) => {
                match names.iter().map(|name| name.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>() {
                    Some(names) => Ok(Self::Named(names)),
                    None => config.fail("`target_modules` holds what is no name", help),
                }
            }
            _ => config.fail("`target_modules` is missing", help),
        }
    }

    /// Whether PEFT adapts a module of this path.
    pub(super) fn contain(&self, path: &str) -> bool {
        match self {
            Self::All => true,
            Self::Named(names) => names.iter().any(|name| path == name || path.ends_with(&format!(".{name}"))),
            Self::Pattern(pattern) => pattern.is_match(path).unwrap_or(false),
        }
    }
}

/// The layers of `layers_to_transform`; all for none.
pub(super) fn layers(config: &Config) -> Result<Option<Vec<usize>>> {
    let number = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
    let layers = match config.get("layers_to_transform") {
        None => return Ok(None),
        Some(Value::Array(items)) if items.is_empty() => return Ok(None),
        Some(Value::Array(items)) => items.iter().map(number).collect::<Option<Vec<_>>>(),
        Some(value) => number(value).map(|layer| vec![layer]),
    };
    match layers {
        Some(layers) => Ok(Some(layers)),
        None => config.fail("`layers_to_transform` is no list of layers", "take the file as PEFT wrote it"),
    }
}

/// The entry of the first pattern that a path ends with: `re.match(rf"(.*\.)?({key})$", path)`.
pub(super) fn lookup(config: &Config, patterns: &[(String, f64)], path: &str) -> Result<Option<f64>> {
    for (key, value) in patterns {
        match Regex::new(&format!(r"^(.*\.)?({key})$")) {
            Ok(pattern) if pattern.is_match(path).unwrap_or(false) => return Ok(Some(*value)),
            Ok(_) => {}
            Err(error) => return config.fail(format!("`{key}` is not an expression: {error}"), "correct the pattern"),
        }
    }
    Ok(None)
}
