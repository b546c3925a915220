//! Fields of a PEFT configuration.

use std::path::Path;

use serde_json::{Map, Value};

use crate::adapter::{Error, Result};

/// A configuration and where it is from.
pub(super) struct Config<'a> {
    pub(super) folder: &'a Path,
    pub(super) fields: Map<String, Value>,
}

/// Fields that say nothing of the function, or what the tensors say too.
const HARMLESS: [&str; 28] = [
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "init_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "num_transformer_submodules",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "velora_config",
    "prefix_projection",
    "encoder_hidden_size",
];

/// Fields that change the function unless they are empty, and what they do.
const FOREIGN: [(&str, &str); 11] = [
    ("alora_invocation_tokens", "activates only after certain tokens"),
    ("arrow_config", "routes between adapters"),
    ("kasa_config", "trains singular values"),
    ("layer_replication", "repeats layers"),
    ("lora_bias", "trains a bias of B"),
    ("modules_to_save", "replaces whole modules"),
    ("monteclora_config", "samples its weights"),
    ("target_parameters", "adapts single parameters"),
    ("trainable_token_indices", "trains token embeddings"),
    ("use_bdlora", "makes A or B block-diagonal"),
    ("use_qalora", "pools the inputs of A"),
];

/// Starts of A and B that leave the base weights alone.
const PLAIN_STARTS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

impl Config<'_> {
    pub(super) fn fail<T>(&self, why: impl Into<String>, help: impl Into<String>) -> Result<T> {
        Err(Error::Peft { path: self.folder.into(), why: why.into(), help: help.into() })
    }

    /// A field that is neither absent nor null.
    pub(super) fn get(&self, field: &str) -> Option<&Value> {
        self.fields.get(field).filter(|value| !value.is_null())
    }

    pub(super) fn text(&self, field: &str) -> Result<&str> {
        match self.get(field).map(Value::as_str) {
            Some(Some(text)) => Ok(text),
            _ => self.fail(format!("`{field}` is not a text"), "take adapter_config.json as PEFT wrote it"),
        }
    }

    pub(super) fn count(&self, field: &str) -> Result<usize> {
        match self.get(field).and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok()) {
            Some(number) => Ok(number),
            None => self.fail(format!("`{field}` is not a count"), "take adapter_config.json as PEFT wrote it"),
        }
    }

    pub(super) fn number(&self, field: &str) -> Result<f64> {
        match self.get(field).and_then(Value::as_f64) {
            Some(number) => Ok(number),
            None => self.fail(format!("`{field}` is not a number"), "take adapter_config.json as PEFT wrote it"),
        }
    }

    pub(super) fn flag(&self, field: &str) -> Result<bool> {
        match self.get(field) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => self.fail(format!("`{field}` is neither true nor false"), "take the file as PEFT wrote it"),
        }
    }

    /// Numbers by pattern.
    pub(super) fn pattern(&self, field: &str) -> Result<Vec<(String, f64)>> {
        let Some(value) = self.get(field) else { return Ok(Vec::new()) };
        let entries = value
            .as_object()
            .map(|map| map.iter().map(|(key, value)| Some((key.clone(), value.as_f64()?))).collect::<Option<Vec<_>>>());
        match entries.flatten() {
            Some(entries) => Ok(entries),
            None => self.fail(format!("`{field}` does not map names to numbers"), "take the file as PEFT wrote it"),
        }
    }

    /// Refuses options that change the function, and warns of options that are not known.
    pub(super) fn check_fields(&self, known: &[&str]) -> Result<()> {
        for (field, _) in self.fields.iter().filter(|(_, value)| !is_empty(value)) {
            let field = field.as_str();
            if let Some((_, what)) = FOREIGN.iter().find(|(name, _)| *name == field) {
                let help = "merge it in PEFT with merge_and_unload() and use the merged model";
                return self.fail(format!("`{field}` {what}, which prefold does not compute"), help);
            }
            if !known.contains(&field) && !HARMLESS.contains(&field) {
                tracing::warn!("{}: `{field}` is not known to prefold and was ignored", self.folder.display());
            }
        }
        match self.get("bias").and_then(Value::as_str) {
            None | Some("none") => {}
            Some(bias) => {
                return self.fail(format!("`bias` is {bias}: it changes biases"), "train it with bias=\"none\"");
            }
        }
        match self.get("init_lora_weights") {
            Some(Value::String(start)) if !PLAIN_STARTS.contains(&start.as_str()) => self.fail(
                format!("`init_lora_weights` is {start}, which may have changed the base weights"),
                "save it in PEFT with path_initial_model_for_weight_conversion, which makes it a plain LoRA",
            ),
            _ => Ok(()),
        }
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(entries) => entries.is_empty(),
        _ => false,
    }
}
