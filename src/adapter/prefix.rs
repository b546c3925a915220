//! Prefix tuning (Li and Liang, arXiv 2101.00190): trained keys and values that every query sees before those of the
//! tokens, whose positions follow them.
//!
//! | tensor | shape | start |
//! |---|---|---|
//! | `layers.{i}.key`, `.value` | `[num_kv_heads, num_virtual_tokens, head_dim]` | normal of deviation 0.02, or a prompt's own cache |
//!
//! With `projection` they are computed as PEFT's `PrefixEncoder` does, `W₂ tanh(W₁ e + b₁) + b₂` for every virtual token's
//! `e`. A row of W₂ makes one number of one layer: for the n-th adapted layer all its keys, then all its values.
//!
//! | tensor | shape | start |
//! |---|---|---|
//! | `embedding` | `[num_virtual_tokens, kv_width]` | standard normal |
//! | `transform.0.weight`, `.bias` | `[hidden, kv_width]`, `[hidden]` | uniform within `±1/√kv_width` |
//! | `transform.2.weight`, `.bias` | `[2 · layers · kv_width, hidden]`, `[…]` | uniform within `±1/√hidden` |

use std::collections::BTreeMap;

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::method::{Base, Start, TensorSpec, Tensors};
use super::{AdapterConfig, AdapterMethod, Error, Result, prompt};
use crate::base::ops::linear;
use crate::base::{Linear, SiteHook};

/// Deviation of keys and values that start at random.
const DEVIATION: f64 = 0.02;

/// Prefix tuning (Li and Liang, arXiv 2101.00190).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Prefix {
    /// How many positions are trained.
    pub num_virtual_tokens: usize,
    /// Whether keys and values are made by a trained MLP.
    pub projection: bool,
    /// The MLP's width; that of all key heads together where not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encoder_hidden_size: Option<usize>,
    /// What keys and values start from.
    pub init: PrefixInit,
}

/// What keys and values start from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PrefixInit {
    /// Random numbers.
    #[default]
    Random,
    /// A prompt's own: the first step is the base model after that prompt.
    Prompt,
}

impl Default for Prefix {
    fn default() -> Self {
        Self { num_virtual_tokens: 20, projection: false, encoder_hidden_size: None, init: PrefixInit::Random }
    }
}

impl Prefix {
    fn hidden(&self, config: &AdapterConfig) -> usize {
        self.encoder_hidden_size.unwrap_or(config.kv_width())
    }

    /// The keys and values of a layer, `[num_kv_heads, num_virtual_tokens, head_dim]` each; none where the layer is not
    /// adapted.
    ///
    /// # Errors
    /// When a tensor is missing or misshapen.
    pub fn keys_and_values(
        &self,
        config: &AdapterConfig,
        tensors: &Tensors,
        layer: usize,
    ) -> candle_core::Result<Option<(Tensor, Tensor)>> {
        let get = |name: &str| match tensors.get(name) {
            Some(tensor) => Ok(tensor),
            None => candle_core::bail!("the adapter has no tensor `{name}`"),
        };
        let Some(order) = config.adapted_layers().iter().position(|adapted| *adapted == layer) else {
            return Ok(None);
        };
        if !self.projection {
            let part = |part: &str| get(&format!("layers.{layer}.{part}")).cloned();
            return Ok(Some((part("key")?, part("value")?)));
        }
        let width = config.kv_width();
        let hidden = linear(get("embedding")?, get("transform.0.weight")?, Some(get("transform.0.bias")?))?.tanh()?;
        let rows = |start: usize| {
            let weight = get("transform.2.weight")?.narrow(0, start, width)?;
            let bias = get("transform.2.bias")?.narrow(0, start, width)?;
            let flat = linear(&hidden, &weight, Some(&bias))?;
            let heads = (self.num_virtual_tokens, config.kv_heads(), config.head_dim);
            flat.reshape(heads)?.transpose(0, 1)?.contiguous()
        };
        Ok(Some((rows(2 * order * width)?, rows((2 * order + 1) * width)?)))
    }
}

impl AdapterMethod for Prefix {
    fn check(&self, config: &AdapterConfig) -> Result<()> {
        let fail = |field, why: String, help| Err(Error::Config { field, why, help });
        if self.num_virtual_tokens == 0 || self.num_virtual_tokens > 1 << 16 {
            return fail("num_virtual_tokens", format!("is {}", self.num_virtual_tokens), "it is 1 to 65536");
        }
        if self.projection && self.init == PrefixInit::Prompt {
            let why = "is prompt with projection = true".into();
            return fail("init", why, "an MLP cannot start from given keys and values: leave out one of the two");
        }
        if self.hidden(config) == 0 || self.hidden(config) > 1 << 20 {
            return fail("encoder_hidden_size", format!("is {}", self.hidden(config)), "it is the width of an MLP");
        }
        Ok(())
    }

    fn tensors(&self, config: &AdapterConfig) -> Option<BTreeMap<String, TensorSpec>> {
        let layers = config.adapted_layers();
        let (width, hidden) = (config.kv_width(), self.hidden(config));
        if !self.projection {
            let spec = TensorSpec::new(
                [config.kv_heads(), self.num_virtual_tokens, config.head_dim],
                Start::Normal(DEVIATION),
            );
            let names = layers.iter().flat_map(|i| [format!("layers.{i}.key"), format!("layers.{i}.value")]);
            return Some(names.map(|name| (name, spec.clone())).collect());
        }
        let out = layers.len().saturating_mul(2).saturating_mul(width);
        let uniform = |fan_in: usize| Start::Uniform((fan_in as f64).sqrt().recip());
        let tensors = [
            ("embedding", TensorSpec::new([self.num_virtual_tokens, width], Start::Normal(1.0))),
            ("transform.0.weight", TensorSpec::new([hidden, width], uniform(width))),
            ("transform.0.bias", TensorSpec::new([hidden], uniform(width))),
            ("transform.2.weight", TensorSpec::new([out, hidden], uniform(hidden))),
            ("transform.2.bias", TensorSpec::new([out], uniform(hidden))),
        ];
        Some(tensors.into_iter().map(|(name, spec)| (name.to_owned(), spec)).collect())
    }

    fn start(&self, config: &AdapterConfig, base: &Base, tensors: &mut Tensors) -> Result<()> {
        if self.init == PrefixInit::Random {
            return Ok(());
        }
        let seen = prompt::capture(base.decoder, base.prompt()?)?;
        for layer in config.adapted_layers() {
            let Some(seen) = seen.get(layer) else { continue };
            let tokens = seen.tokens()?;
            if tokens != self.num_virtual_tokens {
                return Err(Error::Config {
                    field: "num_virtual_tokens",
                    why: format!("is {}, the prompt has {tokens} tokens", self.num_virtual_tokens),
                    help: "with init = prompt leave it out: it is the prompt's length",
                });
            }
            tensors.insert(format!("layers.{layer}.key"), seen.key.clone());
            tensors.insert(format!("layers.{layer}.value"), seen.value.clone());
        }
        Ok(())
    }

    fn hook(&self, config: &AdapterConfig, tensors: &Tensors) -> Result<Box<dyn SiteHook>> {
        Ok(Box::new(PrefixHook { prefix: self.clone(), config: config.clone(), tensors: tensors.clone() }))
    }

    /// Keys of zeros still take a part of the softmax.
    fn zeros_are_the_base(&self) -> bool {
        false
    }
}

/// The method at work on a decoder.
struct PrefixHook {
    prefix: Prefix,
    config: AdapterConfig,
    tensors: Tensors,
}

impl SiteHook for PrefixHook {
    fn changes(&self, _layer: usize, _linear: Linear) -> bool {
        false
    }

    fn sees_unrotated(&self, _layer: usize) -> bool {
        false
    }

    fn prefix(&self, layer: usize) -> candle_core::Result<Option<(Tensor, Tensor)>> {
        self.prefix.keys_and_values(&self.config, &self.tensors, layer)
    }

    fn prefix_length(&self) -> usize {
        self.prefix.num_virtual_tokens
    }
}
