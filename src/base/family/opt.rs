//! `opt`: learned positions from row 2 on, a plain MLP, norms before the blocks or after the sums, and a token embedding that
//! may be narrower than the stream.

use serde_json::{Value, json};

use super::super::{
    DecoderSpec, Embedding, LearnedPositions, Linear, NormSite, Part, Result, WeightNames, WeightRole, Wiring,
};
use super::{Config, Fields, llama};

pub(super) const FIELDS: Fields = Fields {
    intermediate_size: "ffn_dim",
    activation: "activation_function",
    epsilon: "layer_norm_eps",
    rope: None,
    ..Fields::LLAMA
};
/// Rows of the position table before that of position 0.
const OFFSET: usize = 2;

pub(super) fn defaults() -> Value {
    json!({
        "vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072,
        "max_position_embeddings": 2048, "do_layer_norm_before": true, "num_attention_heads": 12,
        "activation_function": "relu", "enable_bias": true, "layer_norm_elementwise_affine": true,
        "tie_word_embeddings": true, "layer_norm_eps": 1e-5,
    })
}

pub(super) fn spec(config: &Config) -> Result<DecoderSpec> {
    config.refuse("layer_norm_elementwise_affine", true, "norms have no weights")?;
    let mut spec = llama::with_layer_norm(config, &FIELDS)?;
    let before = config.bool("do_layer_norm_before")?;
    if !before {
        spec.wiring = Wiring::SumNorm;
    }
    spec.final_norm = before && !config.bool("_remove_final_layer_norm")?;
    let bias = config.bool("enable_bias")?;
    (spec.attention.qkv_bias, spec.attention.output_bias) = (bias, bias);
    (spec.mlp.gated, spec.mlp.bias) = (false, bias);
    let width = config.optional_size("word_embed_proj_dim")?.filter(|width| *width != spec.hidden_size);
    let positions = LearnedPositions { rows: spec.max_positions + OFFSET, offset: OFFSET };
    spec.embedding = Embedding { width, positions: Some(positions), ..Embedding::default() };
    spec.names = names();
    Ok(spec)
}

fn names() -> WeightNames {
    let layer = "model.decoder.layers.{}";
    WeightNames::llama()
        .with(WeightRole::Embedding, "model.decoder.embed_tokens.weight")
        .with(WeightRole::EmbeddingProjection, "model.decoder.project_in.weight")
        .with(WeightRole::Positions, "model.decoder.embed_positions.weight")
        .with_norm(NormSite::Attention, &format!("{layer}.self_attn_layer_norm"))
        .with_norm(NormSite::Mlp, &format!("{layer}.final_layer_norm"))
        .with_linear(Linear::Query, &format!("{layer}.self_attn.q_proj"), Part::Whole, false)
        .with_linear(Linear::Key, &format!("{layer}.self_attn.k_proj"), Part::Whole, false)
        .with_linear(Linear::Value, &format!("{layer}.self_attn.v_proj"), Part::Whole, false)
        .with_linear(Linear::AttentionOutput, &format!("{layer}.self_attn.out_proj"), Part::Whole, false)
        .with_linear(Linear::Up, &format!("{layer}.fc1"), Part::Whole, false)
        .with_linear(Linear::Down, &format!("{layer}.fc2"), Part::Whole, false)
        .with(WeightRole::FinalNorm, "model.decoder.final_layer_norm.weight")
        .with(WeightRole::FinalNormBias, "model.decoder.final_layer_norm.bias")
        .with(WeightRole::HeadProjection, "model.decoder.project_out.weight")
        .or_under("model.", "")
}
