//! `cohere`: Command R. One LayerNorm without bias feeds attention and MLP, neighbouring elements are turned, logits are
//! scaled.

use serde_json::{Value, json};

use super::super::{DecoderSpec, QkNorm, QkNormOver, Result, Wiring};
use super::{Config, Fields, RopeFields, llama};

pub(super) const FIELDS: Fields = Fields { rope: Some(RopeFields::WHOLE), ..Fields::LAYER_NORM };

pub(super) fn defaults() -> Value {
    json!({
        "vocab_size": 256_000, "hidden_size": 8192, "intermediate_size": 22528, "logit_scale": 0.0625,
        "num_hidden_layers": 40, "num_attention_heads": 64, "hidden_act": "silu", "max_position_embeddings": 8192,
        "layer_norm_eps": 1e-5, "rope_theta": 500_000.0, "tie_word_embeddings": true,
    })
}

pub(super) fn spec(config: &Config) -> Result<DecoderSpec> {
    let mut spec = llama::with_layer_norm(config, &FIELDS)?;
    spec.norm.bias = false;
    spec.wiring = Wiring::ParallelSharedNorm;
    for rotary in &mut spec.attention.rotary {
        rotary.interleaved = true;
    }
    let bias = config.bool("attention_bias")?;
    (spec.attention.qkv_bias, spec.attention.output_bias) = (bias, bias);
    if config.bool("use_qk_norm")? {
        spec.attention.qk_norm = Some(QkNorm { norm: spec.norm, over: QkNormOver::HeadOwnWeight });
    }
    spec.head.scale = config.positive("logit_scale")?;
    Ok(spec)
}
