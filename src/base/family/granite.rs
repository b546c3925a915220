//! `granite`: Llama with factors on embedding, scores, blocks and logits.

use serde_json::{Value, json};

use super::super::{DecoderSpec, Result};
use super::{Config, llama};

pub(super) fn defaults() -> Value {
    let mut defaults = llama::defaults();
    for factor in ["embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"] {
        defaults[factor] = json!(1.0);
    }
    defaults
}

pub(super) fn spec(config: &Config) -> Result<DecoderSpec> {
    let mut spec = llama::spec(config)?;
    spec.embedding.scale = Some(config.positive("embedding_multiplier")?);
    spec.attention.scale = config.positive("attention_multiplier")?;
    spec.residual_scale = config.positive("residual_multiplier")?;
    spec.head.scale = 1.0 / config.positive("logits_scaling")?;
    Ok(spec)
}
