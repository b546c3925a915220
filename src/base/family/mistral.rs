//! `mistral`: Llama with a sliding window in every layer.

use serde_json::{Value, json};

use super::super::{DecoderSpec, Result};
use super::{Config, Fields, llama};

pub(super) fn defaults() -> Value {
    json!({
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu", "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 4096,
    })
}

pub(super) fn spec(config: &Config) -> Result<DecoderSpec> {
    let mut spec = llama::like(config, &Fields::LLAMA)?;
    let window = config.common_window(spec.num_layers)?;
    spec.set_windows(&vec![window; spec.num_layers]);
    Ok(spec)
}
