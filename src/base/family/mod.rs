//! Decoder families: each file maps its `config.json` to a [`DecoderSpec`] and does nothing else.

mod llama;

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::rotary::Scaling;
use super::{Activation, DecoderSpec, Error, Result};

type Mapping = fn(&Config) -> Result<DecoderSpec>;

/// `model_type` → mapping.
const FAMILIES: &[(&str, Mapping)] = &[("llama", llama::spec)];

/// The `model_type`s that prefold knows.
pub fn known() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|(name, _)| *name)
}

/// Maps a `config.json` to a [`DecoderSpec`]; `path` names the file in errors.
///
/// # Errors
/// When the family is unknown, or a field is missing, of another type, or asks for what prefold does not compute.
pub fn spec_from_config(path: &Path, config: &Value) -> Result<DecoderSpec> {
    let config = Config { path: path.into(), value: config };
    let family = config.string("model_type")?;
    match FAMILIES.iter().find(|(name, _)| *name == family) {
        Some((_, mapping)) => mapping(&config),
        None => Err(Error::Family {
            path: path.into(),
            family: family.into(),
            known: known().collect::<Vec<_>>().join(", "),
        }),
    }
}

/// Typed access to a `config.json`. A field that is `null` counts as absent, as in transformers.
struct Config<'a> {
    path: PathBuf,
    value: &'a Value,
}

impl Config<'_> {
    fn get(&self, field: &str) -> Option<&Value> {
        self.value.get(field).filter(|v| !v.is_null())
    }

    fn fail<T>(&self, field: &str, why: impl Into<String>, help: impl Into<String>) -> Result<T> {
        Err(Error::Config { path: self.path.clone(), field: field.into(), why: why.into(), help: help.into() })
    }

    fn missing<T>(&self, field: &str) -> Result<T> {
        self.fail(field, "is missing", "take config.json from the same place as the weights")
    }

    fn mistyped<T>(&self, field: &str, expected: &str) -> Result<T> {
        let found = self.get(field).map(ToString::to_string).unwrap_or_default();
        self.fail(field, format!("should be {expected}, but is {found}"), "correct the configuration")
    }

    fn string(&self, field: &str) -> Result<&str> {
        match self.get(field) {
            None => self.missing(field),
            Some(value) => value.as_str().map_or_else(|| self.mistyped(field, "a string"), Ok),
        }
    }

    /// A positive integer below 2³¹, so that products of two of them cannot overflow.
    fn size_or(&self, field: &str, default: Option<usize>) -> Result<usize> {
        match (self.get(field), default) {
            (None, Some(default)) => Ok(default),
            (None, None) => self.missing(field),
            (Some(value), _) => match value.as_u64() {
                Some(n) if n > 0 && n < 1 << 31 => Ok(n as usize),
                _ => self.mistyped(field, "a positive integer"),
            },
        }
    }

    fn size(&self, field: &str) -> Result<usize> {
        self.size_or(field, None)
    }

    /// A size with a limit of its own, because something is laid out for each.
    fn size_up_to(&self, field: &str, default: Option<usize>, limit: usize) -> Result<usize> {
        match self.size_or(field, default)? {
            size if size <= limit => Ok(size),
            size => self.fail(field, format!("is {size}"), format!("prefold reads models with at most {limit}")),
        }
    }

    fn positive_or(&self, field: &str, default: f64) -> Result<f64> {
        match self.number_or(field, default)? {
            x if x > 0.0 => Ok(x),
            x => self.fail(field, format!("is {x}"), "it must be positive"),
        }
    }

    fn number_or(&self, field: &str, default: f64) -> Result<f64> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => match value.as_f64() {
                Some(x) if x.is_finite() => Ok(x),
                _ => self.mistyped(field, "a number"),
            },
        }
    }

    fn bool_or(&self, field: &str, default: bool) -> Result<bool> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => value.as_bool().map_or_else(|| self.mistyped(field, "true or false"), Ok),
        }
    }

    fn activation(&self, field: &str) -> Result<Activation> {
        match self.string(field)? {
            "silu" | "swish" => Ok(Activation::Silu),
            "gelu" => Ok(Activation::Gelu),
            "gelu_new" | "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
            "relu" => Ok(Activation::Relu),
            other => self.fail(
                field,
                format!("is `{other}`, an activation that prefold does not compute"),
                "known: silu, gelu, gelu_new, gelu_pytorch_tanh, relu",
            ),
        }
    }

    /// Rotary base and scaling rule, from `rope_theta` and `rope_scaling`, or from `rope_parameters` where transformers
    /// 5 keeps both.
    fn rope(&self, default_theta: f64) -> Result<(f64, Scaling)> {
        let field = if self.get("rope_parameters").is_some() { "rope_parameters" } else { "rope_scaling" };
        let Some(table) = self.get(field) else {
            return Ok((self.positive_or("rope_theta", default_theta)?, Scaling::Default));
        };
        if !table.is_object() {
            return self.mistyped(field, "an object");
        }
        let rope = Config { path: self.path.clone(), value: table };
        let theta = rope.positive_or("rope_theta", self.positive_or("rope_theta", default_theta)?)?;
        let kind = match rope.get("rope_type").or_else(|| rope.get("type")) {
            Some(kind) => kind.as_str().unwrap_or_default().to_owned(),
            None => "default".into(),
        };
        let factor = |name: &str| -> Result<f64> {
            match rope.number_or(name, f64::NAN)? {
                x if x.is_nan() => rope.fail(&format!("{field}.{name}"), "is missing", "the scaling rule needs it"),
                x if x > 0.0 => Ok(x),
                x => rope.fail(&format!("{field}.{name}"), format!("is {x}"), "it must be positive"),
            }
        };
        let scaling = match kind.as_str() {
            "default" => Scaling::Default,
            "linear" => Scaling::Linear { factor: factor("factor")? },
            "llama3" => Scaling::Llama3 {
                factor: factor("factor")?,
                low_freq_factor: factor("low_freq_factor")?,
                high_freq_factor: factor("high_freq_factor")?,
                original_max_positions: factor("original_max_position_embeddings")?,
            },
            "factors" => Scaling::Factors(rope.factors()?),
            other => {
                return self.fail(
                    &format!("{field}.rope_type"),
                    format!("is `{other}`, a scaling rule that prefold does not compute"),
                    "known: default, linear, llama3",
                );
            }
        };
        Ok((theta, scaling))
    }

    fn factors(&self) -> Result<Vec<f32>> {
        let values: Option<Vec<f32>> = self.get("factors").and_then(Value::as_array).and_then(|values| {
            values.iter().map(|v| v.as_f64().filter(|x| x.is_finite() && *x > 0.0).map(|x| x as f32)).collect()
        });
        values.map_or_else(|| self.mistyped("factors", "a list of positive numbers"), Ok)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn llama() -> Value {
        json!({"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
               "num_hidden_layers": 2, "num_attention_heads": 4, "rms_norm_eps": 1e-5, "hidden_act": "silu"})
    }

    fn message(config: &Value) -> String {
        spec_from_config(Path::new("config.json"), config).unwrap_err().to_string()
    }

    #[test]
    fn errors_name_file_field_and_reason() {
        let with = |key: &str, value: Value| {
            let mut config = llama();
            config[key] = value;
            message(&config)
        };
        insta::assert_snapshot!([
            with("model_type", json!("mamba")),
            with("hidden_size", Value::Null),
            with("hidden_size", json!("wide")),
            with("num_attention_heads", json!(3)),
            with("num_key_value_heads", json!(3)),
            with("head_dim", json!(7)),
            with("hidden_act", json!("xielu")),
            with("rope_scaling", json!({"rope_type": "yarn"})),
            with("rope_scaling", json!({"rope_type": "linear"})),
            with("rope_scaling", json!({"rope_type": "linear", "factor": 0})),
            message(&json!({})),
        ].join("\n"), @r#"
        config.json: model_type `mamba` is not a family that prefold knows
        config.json: `hidden_size` is missing
        config.json: `hidden_size` should be a positive integer, but is "wide"
        config.json: `num_attention_heads` is 3, which does not divide hidden_size (64)
        config.json: `num_key_value_heads` is 3, which does not divide num_attention_heads (4)
        config.json: `head_dim` is 7, an odd number
        config.json: `hidden_act` is `xielu`, an activation that prefold does not compute
        config.json: `rope_scaling.rope_type` is `yarn`, a scaling rule that prefold does not compute
        config.json: `rope_scaling.factor` is missing
        config.json: `rope_scaling.factor` is 0
        config.json: `model_type` is missing
        "#);
    }

    #[test]
    fn rope_parameters_hold_theta_in_transformers_5() {
        let mut old = llama();
        old["rope_theta"] = json!(5e5);
        old["rope_scaling"] = json!({"type": "linear", "factor": 2.0});
        let mut new = llama();
        new["rope_parameters"] = json!({"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5});
        let path = Path::new("config.json");
        let (old, new) = (spec_from_config(path, &old).unwrap(), spec_from_config(path, &new).unwrap());
        assert_eq!(old, new);
        assert_eq!(old.attention.rotary[0].inv_freq[0], 0.5);
    }
}
