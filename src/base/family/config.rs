//! Typed access to a `config.json`.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::super::{Activation, Error, Result};

/// Stands for a section that is not there.
static NOTHING: Value = Value::Null;

/// A `config.json`, or a section of it, over the defaults of its configuration class in transformers.
///
/// As there, a field that is absent takes the class's default, and one that is `null` is none.
pub(super) struct Config<'a> {
    path: PathBuf,
    value: &'a Value,
    defaults: Value,
    /// Where the section is: `text_config.`, or empty.
    prefix: String,
}

impl<'a> Config<'a> {
    pub(super) fn new(path: &Path, value: &'a Value, defaults: Value) -> Self {
        Self { path: path.into(), value, defaults, prefix: String::new() }
    }

    /// An object inside; an empty one where it is absent.
    pub(super) fn section(&self, field: &str, defaults: Value) -> Result<Config<'_>> {
        let value = match self.get(field) {
            None => &NOTHING,
            Some(value) if value.is_object() => value,
            Some(_) => return self.mistyped(field, "an object"),
        };
        Ok(Config { path: self.path.clone(), value, defaults, prefix: format!("{}{field}.", self.prefix) })
    }

    pub(super) fn get(&self, field: &str) -> Option<&Value> {
        self.value.get(field).or_else(|| self.defaults.get(field)).filter(|value| !value.is_null())
    }

    /// The fields that are written in the file.
    pub(super) fn fields(&self) -> Option<&serde_json::Map<String, Value>> {
        self.value.as_object()
    }

    pub(super) fn fail<T>(&self, field: &str, why: impl Into<String>, help: impl Into<String>) -> Result<T> {
        let field = format!("{}{field}", self.prefix);
        Err(Error::Config { path: self.path.clone(), field, why: why.into(), help: help.into() })
    }

    /// Refuses what asks for something else than `plain`.
    pub(super) fn refuse(&self, field: &str, plain: bool, what: &str) -> Result<()> {
        if self.bool(field)? == plain {
            return Ok(());
        }
        self.fail(field, format!("is {}: {what}", !plain), "prefold does not compute such models")
    }

    pub(super) fn missing<T>(&self, field: &str) -> Result<T> {
        self.fail(field, "is missing", "take config.json from the same place as the weights")
    }

    pub(super) fn mistyped<T>(&self, field: &str, expected: &str) -> Result<T> {
        let found = self.get(field).map(ToString::to_string).unwrap_or_default();
        self.fail(field, format!("should be {expected}, but is {found}"), "correct the configuration")
    }

    pub(super) fn string(&self, field: &str) -> Result<&str> {
        match self.get(field) {
            None => self.missing(field),
            Some(value) => value.as_str().map_or_else(|| self.mistyped(field, "a string"), Ok),
        }
    }

    /// A positive integer below 2³¹, so that products of two of them cannot overflow.
    pub(super) fn optional_size(&self, field: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_u64() {
            Some(n) if n > 0 && n < 1 << 31 => Ok(Some(n as usize)),
            _ => self.mistyped(field, "a positive integer"),
        }
    }

    pub(super) fn size(&self, field: &str) -> Result<usize> {
        self.optional_size(field)?.map_or_else(|| self.missing(field), Ok)
    }

    /// A size that may be 0.
    pub(super) fn count(&self, field: &str) -> Result<usize> {
        match self.get(field).map(Value::as_u64) {
            None => self.missing(field),
            Some(Some(n)) if n < 1 << 31 => Ok(n as usize),
            Some(_) => self.mistyped(field, "an integer, 0 or more"),
        }
    }

    /// A size with a limit of its own, because something is laid out for each.
    pub(super) fn size_up_to(&self, field: &str, limit: usize) -> Result<usize> {
        match self.size(field)? {
            size if size <= limit => Ok(size),
            size => self.fail(field, format!("is {size}"), format!("prefold reads models with at most {limit}")),
        }
    }

    pub(super) fn optional_number(&self, field: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x.is_finite() => Ok(Some(x)),
            _ => self.mistyped(field, "a number"),
        }
    }

    pub(super) fn optional_positive(&self, field: &str) -> Result<Option<f64>> {
        match self.optional_number(field)? {
            Some(x) if x <= 0.0 => self.fail(field, format!("is {x}"), "it must be positive"),
            other => Ok(other),
        }
    }

    pub(super) fn positive(&self, field: &str) -> Result<f64> {
        self.optional_positive(field)?.map_or_else(|| self.missing(field), Ok)
    }

    pub(super) fn bool(&self, field: &str) -> Result<bool> {
        match self.get(field) {
            None => Ok(false),
            Some(value) => value.as_bool().map_or_else(|| self.mistyped(field, "true or false"), Ok),
        }
    }

    /// A list of `count` positive numbers.
    pub(super) fn positives(&self, field: &str, count: usize) -> Result<Vec<f32>> {
        let Some(value) = self.get(field) else { return self.missing(field) };
        let number = |v: &Value| v.as_f64().map(|x| x as f32).filter(|x| x.is_finite() && *x > 0.0);
        let values: Option<Vec<f32>> = value.as_array().and_then(|values| values.iter().map(number).collect());
        match values {
            None => self.mistyped(field, "a list of positive numbers"),
            Some(values) if values.len() != count => self.fail(
                field,
                format!("has {} entries for {count} frequencies", values.len()),
                "one number for each pair of a head that is turned",
            ),
            Some(values) => Ok(values),
        }
    }

    /// A list with an entry for each layer.
    pub(super) fn per_layer(&self, field: &str, layers: usize) -> Result<Option<&[Value]>> {
        match self.get(field).map(Value::as_array) {
            None => Ok(None),
            Some(None) => self.mistyped(field, "a list"),
            Some(Some(values)) if values.len() < layers => self.fail(
                field,
                format!("has {} entries for {layers} layers", values.len()),
                "every layer needs an entry",
            ),
            Some(Some(values)) => Ok(Some(&values[..layers])),
        }
    }

    pub(super) fn activation(&self, field: &str) -> Result<Activation> {
        match self.string(field)? {
            "silu" | "swish" => Ok(Activation::Silu),
            "gelu" | "gelu_python" => Ok(Activation::Gelu),
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" | "gelu_accurate" => Ok(Activation::GeluTanh),
            "relu" => Ok(Activation::Relu),
            other => self.fail(
                field,
                format!("is `{other}`, an activation that prefold does not compute"),
                "known: silu, swish, gelu, gelu_new, gelu_fast, gelu_pytorch_tanh, relu",
            ),
        }
    }
}
