//! `gpt_neox`: GPT-NeoX and Pythia. Attention and MLP run in parallel, part of a head is turned, and the rows of queries,
//! keys and values lie head by head in one matrix.

use serde_json::{Value, json};

use super::super::{DecoderSpec, Linear, NormSite, Part, Result, WeightNames, WeightRole, Wiring};
use super::{Config, Fields, RopeFields, llama};

pub(super) const FIELDS: Fields = Fields {
    rope: Some(RopeFields { theta: "rotary_emb_base", partial: Some("rotary_pct"), ..RopeFields::WHOLE }),
    ..Fields::LAYER_NORM
};

pub(super) fn defaults() -> Value {
    json!({
        "vocab_size": 50432, "hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64,
        "intermediate_size": 24576, "hidden_act": "gelu", "max_position_embeddings": 2048, "layer_norm_eps": 1e-5,
        "rotary_emb_base": 10000.0, "rotary_pct": 0.25, "use_parallel_residual": true, "attention_bias": true,
    })
}

pub(super) fn spec(config: &Config) -> Result<DecoderSpec> {
    let mut spec = llama::with_layer_norm(config, &FIELDS)?;
    if config.bool("use_parallel_residual")? {
        spec.wiring = Wiring::Parallel;
    }
    let bias = config.bool("attention_bias")?;
    (spec.attention.qkv_bias, spec.attention.output_bias) = (bias, bias);
    (spec.mlp.gated, spec.mlp.bias) = (false, true);
    spec.names = names(spec.attention.head_dim);
    Ok(spec)
}

fn names(head_dim: usize) -> WeightNames {
    let third = |index| Part::Interleaved { index, of: 3, width: head_dim };
    let fused = "gpt_neox.layers.{}.attention.query_key_value";
    WeightNames::llama()
        .with(WeightRole::Embedding, "gpt_neox.embed_in.weight")
        .with_norm(NormSite::Attention, "gpt_neox.layers.{}.input_layernorm")
        .with_norm(NormSite::Mlp, "gpt_neox.layers.{}.post_attention_layernorm")
        .with_linear(Linear::Query, fused, third(0), false)
        .with_linear(Linear::Key, fused, third(1), false)
        .with_linear(Linear::Value, fused, third(2), false)
        .with_linear(Linear::AttentionOutput, "gpt_neox.layers.{}.attention.dense", Part::Whole, false)
        .with_linear(Linear::Up, "gpt_neox.layers.{}.mlp.dense_h_to_4h", Part::Whole, false)
        .with_linear(Linear::Down, "gpt_neox.layers.{}.mlp.dense_4h_to_h", Part::Whole, false)
        .with(WeightRole::FinalNorm, "gpt_neox.final_layer_norm.weight")
        .with(WeightRole::FinalNormBias, "gpt_neox.final_layer_norm.bias")
        .or_under("lm_head.", "embed_out.")
}
