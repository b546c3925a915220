//! llama.cpp's architectures: how each writes what transformers has in its `config.json`, and what it does to weights.

use serde_json::{Value, json};

use super::config::{Header, Heads, decimal};
use crate::base::Result;

/// An architecture of llama.cpp.
pub(super) struct Architecture {
    /// `general.architecture`, which begins the names of its metadata.
    pub(super) name: &'static str,
    /// The family in transformers.
    pub(super) model_type: &'static str,
    /// Its model class there.
    pub(super) class: &'static str,
    pub(super) activation: &'static str,
    /// The metadata entry of the norms' epsilon.
    pub(super) epsilon: &'static str,
    /// Whether rows of queries and keys are stored in the order of neighbouring pairs, where transformers has halves.
    pub(super) permuted: bool,
    /// What was added to the weights of norms.
    pub(super) norm_offset: f64,
    /// Writes the fields that no other architecture has.
    pub(super) own: fn(&Header, &Heads, &mut Value) -> Result<()>,
}

const RMS: &str = "attention.layer_norm_rms_epsilon";
const LAYER_NORM: &str = "attention.layer_norm_epsilon";

const LLAMA: Architecture = Architecture {
    name: "llama",
    model_type: "llama",
    class: "LlamaForCausalLM",
    activation: "silu",
    epsilon: RMS,
    permuted: true,
    norm_offset: 0.0,
    own: llama,
};

pub(super) const ALL: &[Architecture] = &[
    LLAMA,
    Architecture { name: "qwen2", model_type: "qwen2", class: "Qwen2ForCausalLM", own: nothing, ..PLAIN },
    Architecture { name: "qwen3", model_type: "qwen3", class: "Qwen3ForCausalLM", own: biases, ..PLAIN },
    Architecture {
        name: "gpt2",
        model_type: "gpt2",
        class: "GPT2LMHeadModel",
        activation: "gelu_new",
        epsilon: LAYER_NORM,
        own: nothing,
        ..PLAIN
    },
    Architecture {
        name: "gptneox",
        model_type: "gpt_neox",
        class: "GPTNeoXForCausalLM",
        activation: "gelu",
        epsilon: LAYER_NORM,
        own: gpt_neox,
        ..PLAIN
    },
    Architecture {
        name: "phi2",
        model_type: "phi",
        class: "PhiForCausalLM",
        activation: "gelu_new",
        epsilon: LAYER_NORM,
        own: nothing,
        ..PLAIN
    },
    Architecture { name: "phi3", model_type: "phi3", class: "Phi3ForCausalLM", own: phi3, ..PLAIN },
    Architecture {
        name: "gemma2",
        model_type: "gemma2",
        class: "Gemma2ForCausalLM",
        activation: "gelu_pytorch_tanh",
        norm_offset: 1.0,
        own: gemma2,
        ..PLAIN
    },
    Architecture {
        name: "gemma3",
        model_type: "gemma3_text",
        class: "Gemma3ForCausalLM",
        activation: "gelu_pytorch_tanh",
        norm_offset: 1.0,
        own: gemma3,
        ..PLAIN
    },
    Architecture { name: "smollm3", model_type: "smollm3", class: "SmolLM3ForCausalLM", own: smollm3, ..LLAMA },
    Architecture { name: "granite", model_type: "granite", class: "GraniteForCausalLM", own: granite, ..LLAMA },
    Architecture { name: "olmo2", model_type: "olmo2", class: "Olmo2ForCausalLM", own: olmo2, ..PLAIN },
    Architecture {
        name: "stablelm",
        model_type: "stablelm",
        class: "StableLmForCausalLM",
        epsilon: LAYER_NORM,
        own: stablelm,
        ..PLAIN
    },
    Architecture {
        name: "command-r",
        model_type: "cohere",
        class: "CohereForCausalLM",
        epsilon: LAYER_NORM,
        own: cohere,
        ..PLAIN
    },
];

/// Llama with rows as transformers has them.
const PLAIN: Architecture = Architecture { permuted: false, ..LLAMA };

fn nothing(_: &Header, _: &Heads, _: &mut Value) -> Result<()> {
    Ok(())
}

fn biases(header: &Header, _: &Heads, config: &mut Value) -> Result<()> {
    config["attention_bias"] = json!(header.gguf.contains("model.layers.0.self_attn.o_proj.bias"));
    Ok(())
}

/// `llama` also holds Mistral models, without a window where llama.cpp's converter wrote them.
fn llama(header: &Header, _: &Heads, config: &mut Value) -> Result<()> {
    if let Some(window) = header.u64("attention.sliding_window")?.filter(|window| *window > 0) {
        (config["model_type"], config["sliding_window"]) = (json!("mistral"), json!(window));
        return Ok(());
    }
    config["attention_bias"] = json!(header.gguf.contains("model.layers.0.self_attn.q_proj.bias"));
    config["mlp_bias"] = json!(header.gguf.contains("model.layers.0.mlp.up_proj.bias"));
    Ok(())
}

fn gpt_neox(header: &Header, _: &Heads, config: &mut Value) -> Result<()> {
    config["use_parallel_residual"] = json!(header.bool("use_parallel_residual")?.unwrap_or(true));
    config["attention_bias"] = json!(header.gguf.contains("model.layers.0.self_attn.o_proj.bias"));
    Ok(())
}

fn phi3(header: &Header, _: &Heads, config: &mut Value) -> Result<()> {
    // the family's own field, which transformers takes before that of the rotary embedding
    let original = header.u64("rope.scaling.original_context_length")?;
    config["original_max_position_embeddings"] = json!(original);
    config["sliding_window"] = json!(header.u64("attention.sliding_window")?.filter(|window| *window > 0));
    Ok(())
}

fn gemma2(header: &Header, heads: &Heads, config: &mut Value) -> Result<()> {
    const LARGEST: u64 = 46;
    config["query_pre_attn_scalar"] = json!(gemma_scale(header, heads, LARGEST)?);
    config["sliding_window"] = json!(header.u64("attention.sliding_window")?.unwrap_or(4096));
    for cap in ["attn_logit_softcapping", "final_logit_softcapping"] {
        if let Some(number) = header.f32(cap)? {
            config[cap] = json!(Some(decimal(number)).filter(|number| *number > 0.0));
        }
    }
    sliding_pattern(header, config)
}

fn gemma3(header: &Header, heads: &Heads, config: &mut Value) -> Result<()> {
    const LARGEST: u64 = 62;
    config["query_pre_attn_scalar"] = json!(gemma_scale(header, heads, LARGEST)?);
    config["final_logit_softcapping"] =
        json!(header.f32("final_logit_softcapping")?.map(decimal).filter(|cap| *cap > 0.0));
    config["rope_local_base_freq"] = json!(decimal(header.f32("rope.freq_base_swa")?.unwrap_or(10_000.0)));
    match header.u64("attention.sliding_window")?.filter(|window| *window > 0) {
        Some(window) => config["sliding_window"] = json!(window),
        None => {
            let layers = header.u64("block_count")?.unwrap_or(0).min(10_000);
            config["layer_types"] = (0..layers).map(|_| "full_attention").collect();
            return Ok(());
        }
    }
    sliding_pattern(header, config)
}

/// Which layers have the window, where a file says so.
fn sliding_pattern(header: &Header, config: &mut Value) -> Result<()> {
    const PATTERN: &str = "attention.sliding_window_pattern";
    if let Some(sliding) = header.bools(PATTERN)? {
        let kind = |sliding: &bool| if *sliding { "sliding_attention" } else { "full_attention" };
        config["layer_types"] = sliding.iter().map(kind).collect();
    } else if let Some(pattern) = header.u64(PATTERN)? {
        config["sliding_window_pattern"] = json!(pattern);
    }
    Ok(())
}

/// Not in the file: llama.cpp knows the largest model by its number of layers, and divides scores by the root of its
/// stream's width for each head; those of the others by the root of a head's own.
fn gemma_scale(header: &Header, heads: &Heads, largest: u64) -> Result<u64> {
    let is_largest = header.u64("block_count")? == Some(largest);
    Ok(if is_largest { heads.hidden_size / heads.query } else { heads.head_dim })
}

/// Which layers turn is not in the file.
fn smollm3(header: &Header, heads: &Heads, config: &mut Value) -> Result<()> {
    config["no_rope_layer_interval"] = json!(4);
    llama(header, heads, config)
}

fn granite(header: &Header, heads: &Heads, config: &mut Value) -> Result<()> {
    if header.bool("rope.scaling.finetuned")? == Some(false) {
        return header.fail("rope.scaling.finetuned", "is false: Granite without rotary positions is not supported");
    }
    let factor = |key: &str, default: f64| -> Result<f64> {
        Ok(header.f32(key)?.map(decimal).filter(|factor| *factor != 0.0).unwrap_or(default))
    };
    config["attention_multiplier"] = json!(factor("attention.scale", (heads.head_dim as f64).powf(-0.5))?);
    config["embedding_multiplier"] = json!(factor("embedding_scale", 1.0)?);
    config["residual_multiplier"] = json!(factor("residual_scale", 1.0)?);
    config["logits_scaling"] = json!(factor("logit_scale", 1.0)?);
    llama(header, heads, config)
}

fn olmo2(header: &Header, heads: &Heads, config: &mut Value) -> Result<()> {
    if let Some(window) = header.u64("attention.sliding_window")?.filter(|window| *window > 0) {
        return header.fail("attention.sliding_window", format!("is {window}: OLMo 3 is not supported"));
    }
    biases(header, heads, config)
}

fn stablelm(header: &Header, _: &Heads, config: &mut Value) -> Result<()> {
    config["use_parallel_residual"] = json!(header.bool("use_parallel_residual")?.unwrap_or(false));
    config["use_qkv_bias"] = json!(header.gguf.contains("model.layers.0.self_attn.q_proj.bias"));
    config["qk_layernorm"] = json!(header.gguf.contains("model.layers.0.self_attn.q_norm.weight"));
    Ok(())
}

fn cohere(header: &Header, heads: &Heads, config: &mut Value) -> Result<()> {
    config["logit_scale"] = json!(header.f32("logit_scale")?.map(decimal));
    config["use_qk_norm"] = json!(header.gguf.contains("model.layers.0.self_attn.q_norm.weight"));
    biases(header, heads, config)
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::GgmlDType;
    use candle_core::quantized::gguf_file::Value as Entry;
    use candle_core::{DType, Device, Tensor};

    use super::super::{Gguf, testing};
    use super::*;

    /// The configuration of a file of an architecture that holds only an embedding.
    fn config(architecture: &str, extra: &[(&str, Entry)]) -> Result<Value> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        let sizes = [
            ("block_count", 2),
            ("context_length", 128),
            ("embedding_length", 96),
            ("feed_forward_length", 64),
            ("attention.head_count", 4),
        ];
        let mut entries: Vec<(String, Entry)> =
            vec![("general.architecture".into(), Entry::String(architecture.into()))];
        entries.extend(sizes.map(|(key, size)| (format!("{architecture}.{key}"), Entry::U32(size))));
        entries.extend([RMS, LAYER_NORM].map(|key| (format!("{architecture}.{key}"), Entry::F32(1e-5))));
        for (key, value) in extra {
            entries.retain(|(known, _)| !known.ends_with(&format!(".{key}")));
            entries.push((format!("{architecture}.{key}"), value.clone()));
        }
        let entries: Vec<(&str, Entry)> = entries.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
        let embedding = Tensor::zeros((48, 96), DType::F32, &Device::Cpu).unwrap();
        testing::write(&path, &entries, &[("token_embd.weight", embedding, GgmlDType::F32)]);
        Gguf::open(&path).unwrap().config_json()
    }

    #[test]
    fn what_cannot_be_read_is_refused_by_entry() {
        let refused = [
            ("llama", ("expert_count", Entry::U32(8))),
            ("llama", ("rope.dimension_count", Entry::U32(12))),
            ("llama", ("attention.head_count", Entry::U32(0))),
            ("gemma2", ("attention.sliding_window_pattern", Entry::String("6".into()))),
            ("granite", ("rope.scaling.finetuned", Entry::Bool(false))),
            ("olmo2", ("attention.sliding_window", Entry::U32(4096))),
            ("stablelm", ("use_parallel_residual", Entry::U32(1))),
        ];
        let messages = refused.map(|(architecture, entry)| {
            let message = config(architecture, &[entry]).unwrap_err().to_string();
            message.split_once("m.gguf: ").unwrap().1.to_owned()
        });
        insta::assert_snapshot!(messages.join("\n"), @"
        the metadata entry `llama.expert_count` is 8: mixtures of experts are not supported
        the metadata entry `llama.rope.dimension_count` is 12, but a head has 24 dimensions: partial rotary is not supported
        the metadata entry `llama.attention.head_count` is 0
        the metadata entry `gemma2.attention.sliding_window_pattern` must be a non-negative integer; it is a string
        the metadata entry `granite.rope.scaling.finetuned` is false: Granite without rotary positions is not supported
        the metadata entry `olmo2.attention.sliding_window` is 4096: OLMo 3 is not supported
        the metadata entry `stablelm.use_parallel_residual` must be a boolean; it is U32(1)
        ");
    }

    #[test]
    fn every_architecture_is_of_a_family_and_reads_back_its_part_of_a_head() {
        for architecture in ALL {
            for dim in [2, 4, 6, 8, 14, 24] {
                let dim = if crate::base::family::fields(architecture.model_type)
                    .rope
                    .is_some_and(|rope| rope.partial.is_some())
                {
                    dim
                } else {
                    24
                };
                let config = config(
                    architecture.name,
                    &[("rope.dimension_count", Entry::U32(dim)), ("logit_scale", Entry::F32(0.5))],
                )
                .unwrap();
                let spec = crate::base::family::spec_from_config(std::path::Path::new("c"), &config).unwrap();
                assert_eq!(spec.family, architecture.model_type);
                assert!(spec.attention.rotary.iter().all(|rotary| rotary.dim == dim as usize), "{}", architecture.name);
            }
        }
    }

    #[test]
    fn gemma_s_scale_and_windows_follow_the_file() {
        let scale = |architecture, layers| {
            let key_length = ("attention.key_length", Entry::U32(16));
            config(architecture, &[key_length, ("block_count", Entry::U32(layers))]).unwrap()["query_pre_attn_scalar"]
                .clone()
        };
        let scales = [scale("gemma2", 26), scale("gemma2", 46), scale("gemma3", 26), scale("gemma3", 62)];
        assert_eq!(scales, [json!(16), json!(24), json!(16), json!(24)]);
        let window = ("attention.sliding_window", Entry::U32(8));
        let kinds = |pattern: Option<Entry>| {
            let pattern = pattern.map(|pattern| ("attention.sliding_window_pattern", pattern));
            let entries: Vec<(&str, Entry)> = std::iter::once(window.clone()).chain(pattern).collect();
            let config = config("gemma3", &entries).unwrap();
            (config["layer_types"].clone(), config["sliding_window_pattern"].clone())
        };
        let listed = Entry::Array(vec![Entry::Bool(false), Entry::Bool(true)]);
        assert_eq!(kinds(Some(listed)), (json!(["full_attention", "sliding_attention"]), Value::Null));
        assert_eq!(kinds(Some(Entry::U32(3))), (Value::Null, json!(3)));
        assert_eq!(kinds(None), (Value::Null, Value::Null));
        let without = config("gemma3", &[]).unwrap();
        assert_eq!(without["layer_types"], json!(["full_attention", "full_attention"]));
        assert_eq!(config("llama", &[window]).unwrap()["model_type"], "mistral");
    }
}
