//! `gemma2`: norms before and after both blocks, scores and logits with a soft cap, a window in every other layer.

use serde_json::{Value, json};

use super::super::{DecoderSpec, NormSite, Result, Wiring};
use super::{Config, Fields, llama};

pub(super) const FIELDS: Fields = Fields { activation: "hidden_activation", ..Fields::LLAMA };

pub(super) fn defaults() -> Value {
    json!({
        "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": true,
        "query_pre_attn_scalar": 256, "sliding_window": 4096, "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    })
}

pub(super) fn spec(config: &Config) -> Result<DecoderSpec> {
    let mut spec = like(config, &FIELDS)?;
    spec.attention.softcap = config.optional_positive("attn_logit_softcapping")?;
    let sliding = config.sliding_layers(spec.num_layers, |layer| layer.is_multiple_of(2))?;
    spec.set_windows(&config.windows(&sliding, config.optional_size("sliding_window")?)?);
    Ok(spec)
}

/// What Gemma 2 and 3 share.
pub(super) fn like(config: &Config, fields: &Fields) -> Result<DecoderSpec> {
    config.refuse("use_bidirectional_attention", false, "tokens see those that follow them")?;
    let mut spec = llama::like(config, fields)?;
    spec.norm.weight_offset = 1.0;
    spec.wiring = Wiring::SandwichNorm;
    spec.embedding.scale = Some((spec.hidden_size as f64).sqrt());
    spec.attention.scale = config.positive("query_pre_attn_scalar")?.powf(-0.5);
    let bias = config.bool("attention_bias")?;
    (spec.attention.qkv_bias, spec.attention.output_bias) = (bias, bias);
    spec.head.softcap = config.optional_positive("final_logit_softcapping")?;
    spec.names = spec
        .names
        .with_norm(NormSite::AttentionOutput, "model.layers.{}.post_attention_layernorm")
        .with_norm(NormSite::Mlp, "model.layers.{}.pre_feedforward_layernorm")
        .with_norm(NormSite::MlpOutput, "model.layers.{}.post_feedforward_layernorm");
    Ok(spec)
}
