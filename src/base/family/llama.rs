//! `llama`: Llama 1 to 3 and the many models in its shape (SmolLM 1 and 2, TinyLlama, Vicuna, …).

use super::super::rotary::Scaling;
use super::super::{
    Attention, DecoderSpec, Embedding, Head, Layer, Mlp, Norm, NormKind, Result, Rotary, WeightNames, Wiring,
};
use super::Config;

pub(super) fn spec(config: &Config) -> Result<DecoderSpec> {
    let hidden_size = config.size("hidden_size")?;
    let num_heads = config.size("num_attention_heads")?;
    let num_kv_heads = config.size_or("num_key_value_heads", Some(num_heads))?;
    if !num_heads.is_multiple_of(num_kv_heads) {
        return config.fail(
            "num_key_value_heads",
            format!("is {num_kv_heads}, which does not divide num_attention_heads ({num_heads})"),
            "every key-value head serves the same number of query heads",
        );
    }
    if config.get("head_dim").is_none() && !hidden_size.is_multiple_of(num_heads) {
        return config.fail(
            "num_attention_heads",
            format!("is {num_heads}, which does not divide hidden_size ({hidden_size})"),
            "give head_dim where heads × head_dim is not the hidden size",
        );
    }
    let head_dim = config.size_up_to("head_dim", Some(hidden_size / num_heads), 1 << 16)?;
    if !head_dim.is_multiple_of(2) {
        return config.fail("head_dim", format!("is {head_dim}, an odd number"), "rotary positions turn pairs");
    }
    let (theta, scaling) = config.rope(10_000.0)?;
    if let Scaling::Factors(factors) = &scaling
        && factors.len() != head_dim / 2
    {
        return config.fail(
            "rope_scaling.factors",
            format!("has {} entries for {} frequencies", factors.len(), head_dim / 2),
            "one factor for each pair of a head",
        );
    }
    let bias = config.bool_or("attention_bias", false)?;
    let num_layers = config.size_up_to("num_hidden_layers", None, 10_000)?;
    Ok(DecoderSpec {
        family: config.string("model_type")?.into(),
        vocab_size: config.size("vocab_size")?,
        hidden_size,
        num_layers,
        max_positions: config.size_up_to("max_position_embeddings", Some(2048), 1 << 24)?,
        embedding: Embedding::default(),
        norm: Norm {
            kind: NormKind::Rms,
            epsilon: config.positive_or("rms_norm_eps", 1e-6)?,
            weight_offset: 0.0,
            bias: false,
        },
        wiring: Wiring::PreNorm,
        residual_scale: 1.0,
        attention: Attention {
            num_heads,
            num_kv_heads,
            head_dim,
            scale: (head_dim as f64).powf(-0.5),
            softcap: None,
            qkv_bias: bias,
            output_bias: bias,
            qk_norm: None,
            rotary: vec![Rotary::new(head_dim, theta, &scaling)],
        },
        mlp: Mlp {
            intermediate_size: config.size("intermediate_size")?,
            activation: config.activation("hidden_act")?,
            gated: true,
            bias: config.bool_or("mlp_bias", false)?,
        },
        layers: vec![Layer { rotary: Some(0), window: None }; num_layers],
        final_norm: true,
        head: Head { tied: config.bool_or("tie_word_embeddings", false)?, bias: false, scale: 1.0, softcap: None },
        names: WeightNames::llama(),
    })
}
