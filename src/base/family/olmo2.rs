//! `olmo2`: norms after both blocks, and over all queries and over all keys of a token.

use serde_json::{Value, json};

use super::super::{DecoderSpec, NormSite, QkNorm, QkNormOver, Result, Wiring};
use super::{Config, Fields, llama};

pub(super) fn defaults() -> Value {
    let mut defaults = llama::defaults();
    (defaults["vocab_size"], defaults["rms_norm_eps"]) = (json!(50304), json!(1e-5));
    defaults
}

pub(super) fn spec(config: &Config) -> Result<DecoderSpec> {
    let mut spec = llama::like(config, &Fields::LLAMA)?;
    spec.wiring = Wiring::PostNorm;
    spec.attention.qk_norm = Some(QkNorm { norm: spec.norm, over: QkNormOver::Projection });
    let bias = config.bool("attention_bias")?;
    (spec.attention.qkv_bias, spec.attention.output_bias) = (bias, bias);
    spec.names = spec
        .names
        .with_norm(NormSite::AttentionOutput, "model.layers.{}.post_attention_layernorm")
        .with_norm(NormSite::MlpOutput, "model.layers.{}.post_feedforward_layernorm");
    Ok(spec)
}
