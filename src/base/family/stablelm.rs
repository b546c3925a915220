//! `stablelm`: Llama with LayerNorm and part of a head turned; attention and MLP in parallel and heads normalised where asked
//! for.

use serde_json::{Value, json};

use super::super::{
    DecoderSpec, Norm, NormSite, Part, QkNorm, QkNormOver, Result, Source, WeightNames, WeightRole, Wiring,
};
use super::{Config, Fields, llama};

pub(super) fn defaults() -> Value {
    json!({
        "vocab_size": 50304, "hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu", "max_position_embeddings": 4096,
        "layer_norm_eps": 1e-5, "rope_theta": 10000.0, "partial_rotary_factor": 0.25,
    })
}

pub(super) fn spec(config: &Config) -> Result<DecoderSpec> {
    let mut spec = llama::with_layer_norm(config, &Fields::LAYER_NORM)?;
    if config.bool("use_parallel_residual")? {
        spec.wiring = Wiring::ParallelSharedNorm;
    }
    spec.attention.qkv_bias = config.bool("use_qkv_bias")?;
    if config.bool("qk_layernorm")? {
        let norm = Norm { bias: false, ..spec.norm };
        spec.attention.qk_norm = Some(QkNorm { norm, over: QkNormOver::HeadOwnWeight });
    }
    let heads = |name: &str, count| Source {
        name: format!("model.layers.{{}}.self_attn.{name}.norms.{{}}.weight"),
        part: Part::Stacked { count },
        transposed: false,
    };
    spec.names = WeightNames::llama()
        .with_source(WeightRole::Norm(0, NormSite::Query), heads("q_layernorm", spec.attention.num_heads))
        .with_source(WeightRole::Norm(0, NormSite::Key), heads("k_layernorm", spec.attention.num_kv_heads));
    Ok(spec)
}
