//! `phi3`: Phi 3, 3.5 and 4. Llama with queries, keys and values in one matrix, gate and up in another, and frequencies that
//! change beyond the pretrained context.

use serde_json::{Value, json};

use super::super::{DecoderSpec, Linear, Part, Result};
use super::fields::Rule;
use super::{Config, Fields, RopeFields, llama};

pub(super) const FIELDS: Fields = Fields {
    rope: Some(RopeFields {
        rules: &[
            ("default", Rule::Default),
            ("longrope", Rule::Longrope),
            ("su", Rule::Longrope),
            ("yarn", Rule::Longrope), // so the first Phi 3 checkpoints call it
        ],
        ..RopeFields::PARTIAL
    }),
    ..Fields::LLAMA
};

pub(super) fn defaults() -> Value {
    json!({
        "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
    })
}

pub(super) fn spec(config: &Config) -> Result<DecoderSpec> {
    let mut spec = llama::like(config, &FIELDS)?;
    let window = config.common_window(spec.num_layers)?;
    spec.set_windows(&vec![window; spec.num_layers]);
    let (queries, keys) = (spec.attention.query_width(), spec.attention.kv_width());
    let (of, inner) = (queries + 2 * keys, spec.mlp.intermediate_size);
    let fused = "model.layers.{}.self_attn.qkv_proj";
    let gate_up = "model.layers.{}.mlp.gate_up_proj";
    spec.names = spec
        .names
        .with_linear(Linear::Query, fused, Part::Rows { start: 0, count: queries, of }, false)
        .with_linear(Linear::Key, fused, Part::Rows { start: queries, count: keys, of }, false)
        .with_linear(Linear::Value, fused, Part::Rows { start: queries + keys, count: keys, of }, false)
        .with_linear(Linear::Gate, gate_up, Part::Rows { start: 0, count: inner, of: 2 * inner }, false)
        .with_linear(Linear::Up, gate_up, Part::Rows { start: inner, count: inner, of: 2 * inner }, false);
    Ok(spec)
}
