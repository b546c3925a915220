//! `llama`: Llama 1 to 3 and the many models in its shape (SmolLM 1 and 2, TinyLlama, Vicuna, …). Most other families are
//! described as changes to [`like`].

use serde_json::{Value, json};

use super::super::{
    Attention, DecoderSpec, Embedding, Head, Layer, Mlp, Norm, NormKind, Result, Rotary, WeightNames, Wiring,
};
use super::{Config, Fields};

pub(super) fn defaults() -> Value {
    json!({
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    })
}

pub(super) fn spec(config: &Config) -> Result<DecoderSpec> {
    let mut spec = like(config, &Fields::LLAMA)?;
    let bias = config.bool("attention_bias")?;
    (spec.attention.qkv_bias, spec.attention.output_bias) = (bias, bias);
    spec.mlp.bias = config.bool("mlp_bias")?;
    Ok(spec)
}

/// The shape of Llama, without biases: each layer normalises by the root mean square before attention and before a gated
/// MLP, and all layers are alike.
pub(super) fn like(config: &Config, fields: &Fields) -> Result<DecoderSpec> {
    let hidden_size = config.size(fields.hidden_size)?;
    let num_heads = config.size(fields.num_heads)?;
    let num_kv_heads = config.optional_size("num_key_value_heads")?.unwrap_or(num_heads);
    if !num_heads.is_multiple_of(num_kv_heads) {
        return config.fail(
            "num_key_value_heads",
            format!("is {num_kv_heads}, which does not divide {} ({num_heads})", fields.num_heads),
            "every key-value head serves the same number of query heads",
        );
    }
    if config.get("head_dim").is_none() && !hidden_size.is_multiple_of(num_heads) {
        return config.fail(
            fields.num_heads,
            format!("is {num_heads}, which does not divide {} ({hidden_size})", fields.hidden_size),
            "give head_dim where heads × head_dim is not the hidden size",
        );
    }
    let head_dim = match config.get("head_dim") {
        Some(_) => config.size_up_to("head_dim", 1 << 16)?,
        None => hidden_size / num_heads,
    };
    let num_layers = config.size_up_to(fields.num_layers, 10_000)?;
    let max_positions = config.size_up_to(fields.max_positions, 1 << 24)?;
    let rotary = fields.rope.map(|rope| config.rotary(&rope, head_dim, max_positions)).transpose()?;
    Ok(DecoderSpec {
        family: config.string("model_type")?.into(),
        vocab_size: config.size("vocab_size")?,
        hidden_size,
        num_layers,
        max_positions,
        embedding: Embedding::default(),
        norm: Norm { kind: NormKind::Rms, epsilon: config.positive(fields.epsilon)?, weight_offset: 0.0, bias: false },
        wiring: Wiring::PreNorm,
        residual_scale: 1.0,
        attention: Attention {
            num_heads,
            num_kv_heads,
            head_dim,
            scale: (head_dim as f64).powf(-0.5),
            softcap: None,
            qkv_bias: false,
            output_bias: false,
            qk_norm: None,
            rotary: rotary.into_iter().collect::<Vec<Rotary>>(),
        },
        mlp: Mlp {
            intermediate_size: config.size(fields.intermediate_size)?,
            activation: config.activation(fields.activation)?,
            gated: true,
            bias: false,
        },
        layers: vec![Layer { rotary: fields.rope.map(|_| 0), window: None }; num_layers],
        final_norm: true,
        head: Head { tied: config.bool("tie_word_embeddings")?, bias: false, scale: 1.0, softcap: None },
        names: WeightNames::llama(),
    })
}

/// The same with LayerNorm, and biases in it.
pub(super) fn with_layer_norm(config: &Config, fields: &Fields) -> Result<DecoderSpec> {
    let mut spec = like(config, fields)?;
    (spec.norm.kind, spec.norm.bias) = (NormKind::Layer, true);
    Ok(spec)
}

impl DecoderSpec {
    /// Gives each layer its window.
    pub(super) fn set_windows(&mut self, windows: &[Option<usize>]) {
        for (layer, window) in self.layers.iter_mut().zip(windows) {
            layer.window = *window;
        }
    }
}
