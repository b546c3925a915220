//! A Hugging Face `config.json` for a GGUF file.

use serde_json::{Value, json};

use super::architecture::{self, Architecture};
use super::{Gguf, names};
use crate::base::family::{self, Fields};
use crate::base::{Error, Result};

/// Writes the configuration that transformers would have, so that one mapping to a decoder serves both formats.
pub(super) fn config_json(gguf: &Gguf) -> Result<Value> {
    let header = Header::read(gguf)?;
    if let Some(n) = header.u64("expert_count")?.filter(|n| *n > 0) {
        return header.fail("expert_count", format!("is {n}: mixtures of experts are not supported"));
    }
    let (architecture, heads) = (header.architecture, header.heads()?);
    let vocab_size = gguf.shape("model.embed_tokens.weight")?.first().copied().unwrap_or(0);
    let epsilon = |key: &str| header.f32(key).map(|number| number.map(decimal));
    let fields = header.fields;
    let mut config = json!({
        "architectures": [architecture.class],
        "model_type": architecture.model_type,
        "vocab_size": vocab_size,
        "tie_word_embeddings": !gguf.contains("lm_head.weight"),
        "bos_token_id": gguf.u64("tokenizer.ggml.bos_token_id")?,
        "eos_token_id": gguf.u64("tokenizer.ggml.eos_token_id")?,
        "torch_dtype": "float32",
    });
    config[fields.activation] = json!(architecture.activation);
    config[fields.hidden_size] = json!(heads.hidden_size);
    config[fields.intermediate_size] = json!(header.required_u64("feed_forward_length")?);
    config[fields.num_layers] = json!(header.required_u64("block_count")?);
    config[fields.num_heads] = json!(heads.query);
    config[fields.max_positions] = json!(header.required_u64("context_length")?);
    config["num_key_value_heads"] = json!(heads.key_value);
    config["head_dim"] = json!(heads.head_dim);
    match epsilon(architecture.epsilon)? {
        Some(number) => config[fields.epsilon] = json!(number),
        None => return header.fail(architecture.epsilon, "is missing"),
    }
    if let Some(rope) = fields.rope {
        config[rope.theta] = json!(decimal(header.f32("rope.freq_base")?.unwrap_or(10_000.0)));
        config["rope_scaling"] = rope_scaling(&header)?;
        set_rotary_part(&header, &heads, &mut config)?;
    }
    (architecture.own)(&header, &heads, &mut config)?;
    Ok(config)
}

/// The metadata under an architecture's name.
pub(super) struct Header<'a> {
    pub(super) gguf: &'a Gguf,
    pub(super) architecture: &'static Architecture,
    /// What the family calls the fields that all have.
    fields: &'static Fields,
}

/// Sizes of the attention heads.
pub(super) struct Heads {
    pub(super) hidden_size: u64,
    /// Query heads.
    pub(super) query: u64,
    /// Key and value heads.
    pub(super) key_value: u64,
    pub(super) head_dim: u64,
}

impl<'a> Header<'a> {
    pub(super) fn read(gguf: &'a Gguf) -> Result<Self> {
        let name = gguf.required("general.architecture", Gguf::string)?;
        match architecture::ALL.iter().find(|architecture| architecture.name == name) {
            Some(architecture) => Ok(Self { gguf, architecture, fields: family::fields(architecture.model_type) }),
            None => {
                let supported = architecture::ALL.iter().map(|architecture| architecture.name).collect();
                Err(Error::Architecture { path: gguf.path().into(), found: name.into(), supported })
            }
        }
    }

    /// The field of the part of a head that is turned, where the family can turn a part.
    fn partial(&self) -> Option<&'static str> {
        self.fields.rope.and_then(|rope| rope.partial)
    }

    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture.name)
    }

    pub(super) fn u64(&self, key: &str) -> Result<Option<u64>> {
        self.gguf.u64(&self.key(key))
    }

    fn required_u64(&self, key: &str) -> Result<u64> {
        self.gguf.required(&self.key(key), Gguf::u64)
    }

    pub(super) fn f32(&self, key: &str) -> Result<Option<f32>> {
        self.gguf.f32(&self.key(key))
    }

    pub(super) fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.gguf.bool(&self.key(key))
    }

    pub(super) fn string(&self, key: &str) -> Result<Option<&'a str>> {
        self.gguf.string(&self.key(key))
    }

    /// Whether an entry is a list.
    pub(super) fn bools(&self, key: &str) -> Result<Option<Vec<bool>>> {
        use candle_core::quantized::gguf_file::Value;
        let key = self.key(key);
        match self.gguf.content.metadata.get(&key) {
            Some(Value::Array(_)) => self.gguf.list(&key, "an array of booleans", |value| match value {
                Value::Bool(flag) => Some(*flag),
                _ => None,
            }),
            _ => Ok(None),
        }
    }

    pub(super) fn fail<T>(&self, key: &str, reason: impl Into<String>) -> Result<T> {
        Err(self.gguf.metadata_error(&self.key(key), reason))
    }

    fn positive(&self, key: &str, value: u64) -> Result<u64> {
        if value == 0 { self.fail(key, "is 0") } else { Ok(value) }
    }

    pub(super) fn heads(&self) -> Result<Heads> {
        let hidden_size = self.required_u64("embedding_length")?;
        let query = self.positive("attention.head_count", self.required_u64("attention.head_count")?)?;
        let key_value = match self.u64("attention.head_count_kv")? {
            Some(heads) => self.positive("attention.head_count_kv", heads)?,
            None => query,
        };
        let head_dim = self.u64("attention.key_length")?.unwrap_or(hidden_size / query);
        // The row order of q and k, and so `Gguf::tensor`, is known for full rotary embeddings only.
        let part = self.u64("rope.dimension_count")?.filter(|&dim| dim != head_dim);
        if let Some(dim) = part.filter(|_| self.partial().is_none()) {
            let reason = format!("is {dim}, but a head has {head_dim} dimensions: partial rotary is not supported");
            return self.fail("rope.dimension_count", reason);
        }
        Ok(Heads { hidden_size, query, key_value, head_dim })
    }
}

/// How much of a head is turned, as the part that transformers multiplies back and rounds down.
fn set_rotary_part(header: &Header, heads: &Heads, config: &mut Value) -> Result<()> {
    let (Some(field), Some(dim)) = (header.partial(), header.u64("rope.dimension_count")?) else {
        return Ok(());
    };
    let head_dim = heads.head_dim as f64;
    let part = dim as f64 / head_dim;
    config[field] = json!(if (part * head_dim) as u64 == dim { part } else { (dim as f64 + 0.5) / head_dim });
    Ok(())
}

/// llama.cpp stores Llama 3's scaling not as parameters but worked out, as one divisor per rotary frequency; a linear
/// factor divides every frequency. Longrope's divisors are tensors too.
fn rope_scaling(header: &Header) -> Result<Value> {
    let gguf = header.gguf;
    let kind = header.string("rope.scaling.type")?;
    let factor = match header.f32("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => header.f32("rope.scale_linear")?,
    };
    let original = header.u64("rope.scaling.original_context_length")?;
    if let (Some(short), Some(long)) = (factors(gguf, names::SHORT_FACTORS)?, factors(gguf, names::LONG_FACTORS)?) {
        return Ok(json!({
            "rope_type": "longrope",
            "short_factor": short.into_iter().map(decimal).collect::<Vec<_>>(),
            "long_factor": long.into_iter().map(decimal).collect::<Vec<_>>(),
            "attention_factor": header.f32("rope.scaling.attn_factor")?.map(decimal),
            "original_max_position_embeddings": original,
        }));
    }
    let linear = match kind {
        None | Some("linear") => factor,
        Some("none") => None,
        Some(other) => {
            return Ok(json!({
                "rope_type": other,
                "factor": factor.map(decimal),
                "original_max_position_embeddings": original,
                "attention_factor": header.f32("rope.scaling.yarn_attn_factor")?.map(decimal),
                "beta_fast": header.f32("rope.scaling.yarn_beta_fast")?.map(decimal),
                "beta_slow": header.f32("rope.scaling.yarn_beta_slow")?.map(decimal),
            }));
        }
    };
    if let Some(factors) = factors(gguf, names::ROPE_FACTORS)? {
        let linear = linear.unwrap_or(1.0);
        let factors: Vec<f64> = factors.into_iter().map(|f| f64::from(f) * decimal(linear)).collect();
        return Ok(json!({ "rope_type": "factors", "factors": factors }));
    }
    Ok(match linear {
        Some(factor) if factor != 1.0 => json!({ "rope_type": "linear", "factor": decimal(factor) }),
        _ => Value::Null,
    })
}

fn factors(gguf: &Gguf, name: &str) -> Result<Option<Vec<f32>>> {
    if !gguf.stores(name) {
        return Ok(None);
    }
    let read = || gguf.dequantise(name)?.flatten_all()?.to_vec1();
    read().map(Some).map_err(|error| gguf.tensor_error(name, error))
}

/// The number that was meant: metadata is 32-bit, so that 1e-5 would read 9.999999747378752e-6.
pub(super) fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or_else(|_| f64::from(value))
}
