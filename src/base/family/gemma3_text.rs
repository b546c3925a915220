//! `gemma3_text`: Gemma 3. As Gemma 2, with every query and key head normalised instead of soft caps on scores, and a rotary
//! embedding of their own for layers with a window.

use serde_json::{Value, json};

use super::super::{DecoderSpec, QkNorm, QkNormOver, Result};
use super::{Config, Fields, RopeFields, gemma2};

const FULL: RopeFields = RopeFields::WHOLE;
const SLIDING: RopeFields = RopeFields { theta: "rope_local_base_freq", ..RopeFields::WHOLE };

pub(super) fn defaults() -> Value {
    json!({
        "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_local_base_freq": 10000.0,
        "tie_word_embeddings": true, "query_pre_attn_scalar": 256, "sliding_window": 4096, "sliding_window_pattern": 6,
    })
}

pub(super) fn spec(config: &Config) -> Result<DecoderSpec> {
    if config.get("attn_logit_softcapping").is_some() {
        return config.fail("attn_logit_softcapping", "is given", "transformers applies none in Gemma 3; remove it");
    }
    let mut spec = gemma2::like(config, &Fields { rope: None, ..gemma2::FIELDS })?;
    let (head_dim, positions) = (spec.attention.head_dim, spec.max_positions);
    spec.attention.rotary = vec![
        config.rotary_of_kind("full_attention", &FULL, head_dim, positions)?,
        config.rotary_of_kind("sliding_attention", &SLIDING, head_dim, positions)?,
    ];
    spec.attention.qk_norm = Some(QkNorm { norm: spec.norm, over: QkNormOver::Head });
    let sliding = config.sliding_but_each(spec.num_layers, "sliding_window_pattern")?;
    spec.set_windows(&config.windows(&sliding, config.optional_size("sliding_window")?)?);
    for (layer, sliding) in spec.layers.iter_mut().zip(sliding) {
        layer.rotary = Some(usize::from(sliding));
    }
    Ok(spec)
}
