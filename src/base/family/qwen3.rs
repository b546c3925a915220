//! `qwen3`: Qwen 2 without biases, unless asked for, and with every query and key head normalised.

use serde_json::{Value, json};

use super::super::{DecoderSpec, QkNorm, QkNormOver, Result};
use super::{Config, qwen2};

pub(super) fn defaults() -> Value {
    let mut defaults = qwen2::defaults();
    defaults["head_dim"] = json!(128);
    defaults
}

pub(super) fn spec(config: &Config) -> Result<DecoderSpec> {
    let mut spec = qwen2::windowed(config)?;
    let bias = config.bool("attention_bias")?;
    (spec.attention.qkv_bias, spec.attention.output_bias) = (bias, bias);
    spec.attention.qk_norm = Some(QkNorm { norm: spec.norm, over: QkNormOver::Head });
    Ok(spec)
}
