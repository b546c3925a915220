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
    pub(super) fields: Fields,
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

/// What the family calls fields in its `config.json`.
pub(super) struct Fields {
    pub(super) hidden_size: &'static str,
    pub(super) intermediate_size: &'static str,
    pub(super) num_layers: &'static str,
    pub(super) num_heads: &'static str,
    pub(super) max_positions: &'static str,
    pub(super) activation: &'static str,
    pub(super) epsilon: &'static str,
    /// The rotary base; none where positions are learned.
    pub(super) theta: Option<&'static str>,
    /// The part of a head that is turned, where it may be a part.
    pub(super) partial: Option<&'static str>,
    /// Whether key-value heads and the width of a head are fields.
    pub(super) own_heads: bool,
}

const LLAMA_FIELDS: Fields = Fields {
    hidden_size: "hidden_size",
    intermediate_size: "intermediate_size",
    num_layers: "num_hidden_layers",
    num_heads: "num_attention_heads",
    max_positions: "max_position_embeddings",
    activation: "hidden_act",
    epsilon: "rms_norm_eps",
    theta: Some("rope_theta"),
    partial: None,
    own_heads: true,
};
const GEMMA_FIELDS: Fields = Fields { activation: "hidden_activation", ..LLAMA_FIELDS };
const LAYER_NORM_FIELDS: Fields = Fields { epsilon: "layer_norm_eps", ..LLAMA_FIELDS };
const PARTIAL_FIELDS: Fields = Fields { partial: Some("partial_rotary_factor"), ..LAYER_NORM_FIELDS };

const RMS: &str = "attention.layer_norm_rms_epsilon";
const LAYER_NORM: &str = "attention.layer_norm_epsilon";

const LLAMA: Architecture = Architecture {
    name: "llama",
    model_type: "llama",
    class: "LlamaForCausalLM",
    fields: LLAMA_FIELDS,
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
        fields: Fields {
            hidden_size: "n_embd",
            intermediate_size: "n_inner",
            num_layers: "n_layer",
            num_heads: "n_head",
            max_positions: "n_positions",
            activation: "activation_function",
            epsilon: "layer_norm_epsilon",
            theta: None,
            partial: None,
            own_heads: false,
        },
        activation: "gelu_new",
        epsilon: LAYER_NORM,
        own: nothing,
        ..PLAIN
    },
    Architecture {
        name: "gptneox",
        model_type: "gpt_neox",
        class: "GPTNeoXForCausalLM",
        fields: Fields {
            theta: Some("rotary_emb_base"),
            partial: Some("rotary_pct"),
            own_heads: false,
            ..LAYER_NORM_FIELDS
        },
        activation: "gelu",
        epsilon: LAYER_NORM,
        own: gpt_neox,
        ..PLAIN
    },
    Architecture {
        name: "phi2",
        model_type: "phi",
        class: "PhiForCausalLM",
        fields: PARTIAL_FIELDS,
        activation: "gelu_new",
        epsilon: LAYER_NORM,
        own: nothing,
        ..PLAIN
    },
    Architecture {
        name: "phi3",
        model_type: "phi3",
        class: "Phi3ForCausalLM",
        fields: Fields { partial: Some("partial_rotary_factor"), ..LLAMA_FIELDS },
        own: phi3,
        ..PLAIN
    },
    Architecture {
        name: "gemma2",
        model_type: "gemma2",
        class: "Gemma2ForCausalLM",
        fields: GEMMA_FIELDS,
        activation: "gelu_pytorch_tanh",
        norm_offset: 1.0,
        own: gemma2,
        ..PLAIN
    },
    Architecture {
        name: "gemma3",
        model_type: "gemma3_text",
        class: "Gemma3ForCausalLM",
        fields: GEMMA_FIELDS,
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
        fields: PARTIAL_FIELDS,
        epsilon: LAYER_NORM,
        own: stablelm,
        ..PLAIN
    },
    Architecture {
        name: "command-r",
        model_type: "cohere",
        class: "CohereForCausalLM",
        fields: LAYER_NORM_FIELDS,
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
    let cap = |key: &str| header.f32(key).map(|cap| cap.map(decimal).filter(|cap| *cap > 0.0));
    config["attn_logit_softcapping"] = json!(cap("attn_logit_softcapping")?);
    config["final_logit_softcapping"] = json!(cap("final_logit_softcapping")?);
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
