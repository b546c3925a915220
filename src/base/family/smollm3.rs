//! `smollm3`: Llama with layers that turn nothing.

use serde_json::{Value, json};

use super::super::{DecoderSpec, Result};
use super::{Config, llama};

pub(super) fn defaults() -> Value {
    json!({
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 4, "hidden_act": "silu", "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "rope_theta": 2e6, "no_rope_layer_interval": 4, "tie_word_embeddings": true,
    })
}

pub(super) fn spec(config: &Config) -> Result<DecoderSpec> {
    let mut spec = llama::spec(config)?;
    let turned = turned_layers(config, spec.num_layers)?;
    let window = config.optional_window()?;
    let sliding = config.sliding_layers(spec.num_layers, |layer| window.is_some() && !turned[layer])?;
    spec.set_windows(&config.windows(&sliding, window)?);
    for (layer, turned) in spec.layers.iter_mut().zip(turned) {
        layer.rotary = turned.then_some(0);
    }
    Ok(spec)
}

/// `no_rope_layers`, which holds 1 where a layer does turn; otherwise all but each `no_rope_layer_interval`th.
fn turned_layers(config: &Config, layers: usize) -> Result<Vec<bool>> {
    let Some(values) = config.per_layer("no_rope_layers", layers)? else {
        let interval = config.size("no_rope_layer_interval")?;
        return Ok((0..layers).map(|layer| !(layer + 1).is_multiple_of(interval)).collect());
    };
    let flag = |value: &Value| value.as_u64().map(|n| n != 0).or_else(|| value.as_bool());
    let turned: Option<Vec<bool>> = values.iter().map(flag).collect();
    turned.map_or_else(|| config.mistyped("no_rope_layers", "a list of zeros and ones"), Ok)
}
