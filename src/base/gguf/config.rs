//! A Hugging Face `config.json` for a GGUF file.

use serde_json::{Value, json};

use super::{Gguf, SUPPORTED, names};
use crate::base::{Error, Result};

/// Writes the configuration that transformers would have, so that one mapping to a decoder serves both formats.
pub(super) fn config_json(gguf: &Gguf) -> Result<Value> {
    let architecture = gguf.required("general.architecture", Gguf::string)?;
    if !SUPPORTED.contains(&architecture) {
        return Err(Error::Architecture { path: gguf.path().into(), found: architecture.into(), supported: SUPPORTED });
    }
    reject_experts(gguf)?;
    let heads = Heads::read(gguf)?;
    let embedding = gguf.shape("model.embed_tokens.weight")?;
    let vocab_size = embedding.first().copied().unwrap_or(0);
    Ok(json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": heads.hidden_size,
        "intermediate_size": gguf.required("llama.feed_forward_length", Gguf::u64)?,
        "num_hidden_layers": gguf.required("llama.block_count", Gguf::u64)?,
        "num_attention_heads": heads.query,
        "num_key_value_heads": heads.key_value,
        "head_dim": heads.head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": gguf.required("llama.context_length", Gguf::u64)?,
        "rms_norm_eps": decimal(gguf.required("llama.attention.layer_norm_rms_epsilon", Gguf::f32)?),
        "rope_theta": decimal(gguf.f32("llama.rope.freq_base")?.unwrap_or(10_000.0)),
        "rope_scaling": rope_scaling(gguf)?,
        "tie_word_embeddings": !gguf.contains("lm_head.weight"),
        "attention_bias": gguf.contains("model.layers.0.self_attn.q_proj.bias"),
        "mlp_bias": gguf.contains("model.layers.0.mlp.up_proj.bias"),
        "bos_token_id": gguf.u64("tokenizer.ggml.bos_token_id")?,
        "eos_token_id": gguf.u64("tokenizer.ggml.eos_token_id")?,
        "torch_dtype": "float32",
    }))
}

/// Sizes of the attention heads.
pub(super) struct Heads {
    hidden_size: u64,
    /// Query heads.
    pub(super) query: u64,
    /// Key and value heads.
    pub(super) key_value: u64,
    head_dim: u64,
}

impl Heads {
    pub(super) fn read(gguf: &Gguf) -> Result<Self> {
        let hidden_size = gguf.required("llama.embedding_length", Gguf::u64)?;
        let query =
            positive(gguf, "llama.attention.head_count", gguf.required("llama.attention.head_count", Gguf::u64)?)?;
        let key_value = match gguf.u64("llama.attention.head_count_kv")? {
            Some(heads) => positive(gguf, "llama.attention.head_count_kv", heads)?,
            None => query,
        };
        let head_dim = match gguf.u64("llama.attention.key_length")? {
            Some(length) => length,
            None => hidden_size / query,
        };
        // The row order of q and k, and so `Gguf::tensor`, is known for full rotary embeddings only.
        if let Some(rotary) = gguf.u64("llama.rope.dimension_count")?.filter(|&rotary| rotary != head_dim) {
            let reason = format!("is {rotary}, but a head has {head_dim} dimensions: partial rotary is not supported");
            return Err(gguf.metadata_error("llama.rope.dimension_count", reason));
        }
        Ok(Self { hidden_size, query, key_value, head_dim })
    }
}

fn positive(gguf: &Gguf, key: &str, value: u64) -> Result<u64> {
    if value == 0 {
        return Err(gguf.metadata_error(key, "is 0"));
    }
    Ok(value)
}

fn reject_experts(gguf: &Gguf) -> Result<()> {
    match gguf.u64("llama.expert_count")? {
        None | Some(0) => Ok(()),
        Some(n) => {
            Err(gguf.metadata_error("llama.expert_count", format!("is {n}: mixtures of experts are not supported")))
        }
    }
}

/// llama.cpp stores Llama 3's scaling not as parameters but worked out, as one divisor per rotary frequency; a linear
/// factor divides every frequency.
fn rope_scaling(gguf: &Gguf) -> Result<Value> {
    let kind = gguf.string("llama.rope.scaling.type")?;
    let factor = match gguf.f32("llama.rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => gguf.f32("llama.rope.scale_linear")?,
    };
    let linear = match kind {
        None | Some("linear") => factor,
        Some("none") => None,
        Some(other) => {
            let original = gguf.u64("llama.rope.scaling.original_context_length")?;
            return Ok(json!({
                "rope_type": other,
                "factor": factor.map(decimal),
                "original_max_position_embeddings": original,
            }));
        }
    };
    if let Some(factors) = rope_factors(gguf)? {
        let linear = linear.unwrap_or(1.0);
        let factors: Vec<f64> = factors.into_iter().map(|f| f64::from(f) * decimal(linear)).collect();
        return Ok(json!({ "rope_type": "factors", "factors": factors }));
    }
    Ok(match linear {
        Some(factor) if factor != 1.0 => json!({ "rope_type": "linear", "factor": decimal(factor) }),
        _ => Value::Null,
    })
}

fn rope_factors(gguf: &Gguf) -> Result<Option<Vec<f32>>> {
    if !gguf.stores(names::ROPE_FACTORS) {
        return Ok(None);
    }
    let read = || gguf.dequantise(names::ROPE_FACTORS)?.flatten_all()?.to_vec1();
    read().map(Some).map_err(|error| gguf.tensor_error(names::ROPE_FACTORS, error))
}

/// The number that was meant: metadata is 32-bit, so that 1e-5 would read 9.999999747378752e-6.
fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or_else(|_| f64::from(value))
}
