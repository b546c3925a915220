//! `gpt2`: learned positions, LayerNorm, a plain MLP; matrices kept as `[in, out]`, queries, keys and values in one.

use serde_json::{Value, json};

use super::super::{DecoderSpec, Embedding, LearnedPositions, Linear, NormSite, Part, Result, WeightNames, WeightRole};
use super::{Config, Fields, llama};

pub(super) const FIELDS: Fields = Fields {
    hidden_size: "n_embd",
    intermediate_size: "n_inner",
    num_layers: "n_layer",
    num_heads: "n_head",
    max_positions: "n_positions",
    activation: "activation_function",
    epsilon: "layer_norm_epsilon",
    rope: None,
};

pub(super) fn defaults() -> Value {
    json!({
        "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": true,
        "tie_word_embeddings": true,
    })
}

pub(super) fn spec(config: &Config) -> Result<DecoderSpec> {
    config.refuse("scale_attn_by_inverse_layer_idx", false, "scores are scaled by layer")?;
    config.refuse("add_cross_attention", false, "layers attend to an encoder")?;
    let own_width = config.optional_size("n_inner")?.is_some();
    let fields = if own_width { FIELDS } else { Fields { intermediate_size: "n_embd", ..FIELDS } };
    let mut spec = llama::with_layer_norm(config, &fields)?;
    if !own_width {
        spec.mlp.intermediate_size = spec.hidden_size.saturating_mul(4);
    }
    (spec.mlp.gated, spec.mlp.bias) = (false, true);
    (spec.attention.qkv_bias, spec.attention.output_bias) = (true, true);
    if !config.bool("scale_attn_weights")? {
        spec.attention.scale = 1.0;
    }
    let positions = LearnedPositions { rows: spec.max_positions, offset: 0 };
    spec.embedding = Embedding { positions: Some(positions), ..Embedding::default() };
    spec.names = names(spec.hidden_size);
    Ok(spec)
}

fn names(width: usize) -> WeightNames {
    let third = |index: usize| Part::Rows { start: index * width, count: width, of: 3 * width };
    WeightNames::llama()
        .with(WeightRole::Embedding, "transformer.wte.weight")
        .with(WeightRole::Positions, "transformer.wpe.weight")
        .with_norm(NormSite::Attention, "transformer.h.{}.ln_1")
        .with_norm(NormSite::Mlp, "transformer.h.{}.ln_2")
        .with_linear(Linear::Query, "transformer.h.{}.attn.c_attn", third(0), true)
        .with_linear(Linear::Key, "transformer.h.{}.attn.c_attn", third(1), true)
        .with_linear(Linear::Value, "transformer.h.{}.attn.c_attn", third(2), true)
        .with_linear(Linear::AttentionOutput, "transformer.h.{}.attn.c_proj", Part::Whole, true)
        .with_linear(Linear::Up, "transformer.h.{}.mlp.c_fc", Part::Whole, true)
        .with_linear(Linear::Down, "transformer.h.{}.mlp.c_proj", Part::Whole, true)
        .with(WeightRole::FinalNorm, "transformer.ln_f.weight")
        .with(WeightRole::FinalNormBias, "transformer.ln_f.bias")
        .or_under("transformer.", "")
}
