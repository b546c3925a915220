//! What a training run says of the adapter that it trains.

use schemars::JsonSchema;
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize};

use super::method::Base;
use super::prefix_plus::Init;
use super::{Adapter, AdapterConfig, Error, Full, Lora, Method, Prefix, PrefixInit, PrefixPlus, Result};
use crate::base::{Checkpoint, Decoder, DecoderSpec};

/// What to train: a method, and the options of every method.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AdapterOptions {
    /// The method.
    pub method: MethodName,
    /// Layers to adapt; all where not given.
    pub layers: Option<Vec<usize>>,
    /// The text that `init = prompt` starts from.
    pub prompt: Option<String>,
    /// Options of prefix_plus.
    #[serde(deserialize_with = "strict")]
    #[schemars(extend("unevaluatedProperties" = false))]
    pub prefix_plus: PrefixPlus,
    /// Options of prefix.
    #[serde(deserialize_with = "strict")]
    #[schemars(extend("unevaluatedProperties" = false))]
    pub prefix: Prefix,
    /// Options of lora.
    #[serde(deserialize_with = "strict")]
    #[schemars(extend("unevaluatedProperties" = false))]
    pub lora: Lora,
}

/// Options of which every one is known. In `adapter_config.json` they stand among the fields of the adapter, so their own type
/// does not mind others.
fn strict<'de, D: Deserializer<'de>, T: DeserializeOwned + JsonSchema>(
    deserializer: D,
) -> std::result::Result<T, D::Error> {
    let given = serde_json::Value::deserialize(deserializer)?;
    let schema = schemars::schema_for!(T);
    let known = schema.get("properties").and_then(serde_json::Value::as_object);
    let unknown =
        given.as_object().and_then(|given| given.keys().find(|key| known.is_none_or(|k| !k.contains_key(*key))));
    if let Some(key) = unknown {
        let known = known.map(|known| known.keys().cloned().collect::<Vec<_>>().join("`, `")).unwrap_or_default();
        return Err(D::Error::custom(format!("unknown field: found `{key}`, expected one of `{known}`")));
    }
    T::deserialize(given).map_err(D::Error::custom)
}

/// A method by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MethodName {
    /// Prefix-Tuning+.
    #[default]
    PrefixPlus,
    /// Prefix tuning.
    Prefix,
    /// LoRA.
    Lora,
    /// Full fine-tuning.
    Full,
}

impl std::str::FromStr for MethodName {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "prefix_plus" => Ok(Self::PrefixPlus),
            "prefix" => Ok(Self::Prefix),
            "lora" => Ok(Self::Lora),
            "full" => Ok(Self::Full),
            other => Err(format!("`{other}` is none of prefix_plus, prefix, lora, full")),
        }
    }
}

impl AdapterOptions {
    /// The configuration of an adapter for a base model.
    ///
    /// # Errors
    /// When the options make no sense for it.
    pub fn config(&self, spec: &DecoderSpec, base_model: Option<String>) -> Result<AdapterConfig> {
        let method = match self.method {
            MethodName::PrefixPlus => Method::PrefixPlus(self.prefix_plus.clone()),
            MethodName::Prefix => Method::Prefix(self.prefix.clone()),
            MethodName::Lora => {
                let mut lora = self.lora.clone();
                lora.targets.get_or_insert_with(|| spec.linears().map(Into::into).collect());
                Method::Lora(lora)
            }
            MethodName::Full => Method::Full(Full::default()),
        };
        let config = AdapterConfig { layers: self.layers.clone(), ..AdapterConfig::new(method, spec, base_model) };
        config.check()?;
        Ok(config)
    }

    /// The configuration of an adapter for a checkpoint, and the tokens of the prompt that it starts from. No weight is
    /// read.
    ///
    /// # Errors
    /// When the options make no sense for the model, or its tokenizer does not read the prompt.
    pub fn resolve(&self, checkpoint: &Checkpoint) -> Result<(AdapterConfig, Option<Vec<u32>>)> {
        // there is no file yet that a message could name
        self.resolved(checkpoint).map_err(|error| match error {
            Error::Config { field, why, help } => Error::Option { field, why, help },
            other => other,
        })
    }

    fn resolved(&self, checkpoint: &Checkpoint) -> Result<(AdapterConfig, Option<Vec<u32>>)> {
        let mut config = self.config(checkpoint.spec(), Some(checkpoint.display_name()))?;
        let prompt = match (&self.prompt, uses_prompt(&config.method)) {
            (Some(text), true) => Some(tokens(checkpoint, text)?),
            (Some(_), false) => {
                return Err(Error::Config {
                    field: "prompt",
                    why: "is given, but nothing starts from it".into(),
                    help: "set `init` of the method to prompt, or leave `prompt` out",
                });
            }
            (None, true) => {
                return Err(Error::Config {
                    field: "init",
                    why: "is prompt, but no prompt is given".into(),
                    help: "set `adapter.prompt` to the text to start from, or `init` to something else",
                });
            }
            (None, false) => None,
        };
        if let (Method::Prefix(prefix), Some(prompt)) = (&mut config.method, &prompt) {
            prefix.num_virtual_tokens = prompt.len();
        }
        config.check()?;
        config.check_fits(checkpoint.spec())?;
        config.method.as_method().check_options(&config, checkpoint.spec())?;
        Ok((config, prompt))
    }

    /// The adapter at the start of training; what is random follows from `seed`.
    ///
    /// # Errors
    /// When the options make no sense for the model, or it cannot be read, or its tokenizer does not read the prompt.
    pub fn start(&self, checkpoint: &Checkpoint, decoder: &Decoder, seed: u64) -> Result<Adapter> {
        let (config, prompt) = self.resolve(checkpoint)?;
        Adapter::start(config, &Base { checkpoint, decoder, prompt: prompt.as_deref() }, seed)
    }
}

fn uses_prompt(method: &Method) -> bool {
    match method {
        Method::PrefixPlus(method) => method.init == Init::Prompt,
        Method::Prefix(method) => method.init == PrefixInit::Prompt,
        Method::Lora(_) | Method::Full(_) => false,
    }
}

fn tokens(checkpoint: &Checkpoint, text: &str) -> Result<Vec<u32>> {
    let tokenizer = checkpoint.tokenizer()?;
    let ids = tokenizer.encode(text, true)?;
    tokenizer.check_vocabulary(text, &ids, checkpoint.spec().vocab_size)?;
    Ok(ids)
}

impl Adapter {
    /// An adapter at the start of training: float32 on the CPU.
    ///
    /// # Errors
    /// When the configuration contradicts itself or does not fit the model, or the model cannot be read or run.
    pub fn start(config: AdapterConfig, base: &Base, seed: u64) -> Result<Self> {
        config.check()?;
        config.check_fits(base.checkpoint.spec())?;
        let mut tensors = first_tensors(&config, seed)?;
        config.method.as_method().start(&config, base, &mut tensors)?;
        let adapter = Self::new(config, tensors)?;
        adapter.check_fits(base.checkpoint.spec())?;
        Ok(adapter)
    }

    /// The same for a method that reads nothing of the model: tensors of zeros, or random ones.
    ///
    /// # Errors
    /// When the configuration contradicts itself, or the method needs tensors of the model.
    pub fn without_base(config: AdapterConfig, seed: u64) -> Result<Self> {
        config.check()?;
        let tensors = first_tensors(&config, seed)?;
        Self::new(config, tensors)
    }
}

/// The tensors of an adapter before anything of the model is read.
fn first_tensors(config: &AdapterConfig, seed: u64) -> Result<super::Tensors> {
    let specs = config.method.as_method().tensors(config).into_iter().flatten();
    specs.map(|(name, spec)| Ok((name.clone(), spec.tensor(&name, seed)?))).collect()
}
