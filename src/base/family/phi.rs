//! `phi`: Phi 1 and 2. One norm feeds attention and a plain MLP; half of a head is turned; everything has a bias.

use serde_json::{Value, json};

use super::super::{DecoderSpec, Linear, NormSite, Part, QkNorm, QkNormOver, Result, WeightNames, WeightRole, Wiring};
use super::{Config, Fields, llama};

pub(super) fn defaults() -> Value {
    json!({
        "vocab_size": 51200, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
        "num_attention_heads": 32, "hidden_act": "gelu_new", "max_position_embeddings": 2048, "layer_norm_eps": 1e-5,
        "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
    })
}

pub(super) fn spec(config: &Config) -> Result<DecoderSpec> {
    let mut spec = llama::with_layer_norm(config, &Fields::LAYER_NORM)?;
    spec.wiring = Wiring::ParallelSharedNorm;
    if config.bool("qk_layernorm")? {
        spec.attention.qk_norm = Some(QkNorm { norm: spec.norm, over: QkNormOver::Head });
    }
    (spec.attention.qkv_bias, spec.attention.output_bias) = (true, true);
    (spec.mlp.gated, spec.mlp.bias, spec.head.bias) = (false, true, true);
    spec.names = WeightNames::llama()
        .with_norm(NormSite::Query, "model.layers.{}.self_attn.q_layernorm")
        .with_norm(NormSite::Key, "model.layers.{}.self_attn.k_layernorm")
        .with_linear(Linear::AttentionOutput, "model.layers.{}.self_attn.dense", Part::Whole, false)
        .with_linear(Linear::Up, "model.layers.{}.mlp.fc1", Part::Whole, false)
        .with_linear(Linear::Down, "model.layers.{}.mlp.fc2", Part::Whole, false)
        .with(WeightRole::FinalNorm, "model.final_layernorm.weight")
        .with(WeightRole::FinalNormBias, "model.final_layernorm.bias");
    Ok(spec)
}
