//! `qwen2`: Qwen 1.5 to 2.5, Llama with biases on queries, keys and values, and windows in the upper layers where asked for.

use serde_json::{Value, json};

use super::super::{DecoderSpec, Result};
use super::{Config, Fields, llama};

pub(super) fn defaults() -> Value {
    json!({
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu", "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 4096, "max_window_layers": 28,
    })
}

pub(super) fn spec(config: &Config) -> Result<DecoderSpec> {
    let mut spec = windowed(config)?;
    spec.attention.qkv_bias = true;
    Ok(spec)
}

/// Llama whose layers from `max_window_layers` on have windows, where `use_sliding_window` is set.
pub(super) fn windowed(config: &Config) -> Result<DecoderSpec> {
    let mut spec = llama::like(config, &Fields::LLAMA)?;
    let window = config.optional_window()?;
    let first = if window.is_some() { config.count("max_window_layers")? } else { 0 };
    let sliding = config.sliding_layers(spec.num_layers, |layer| window.is_some() && layer >= first)?;
    spec.set_windows(&config.windows(&sliding, window)?);
    Ok(spec)
}
