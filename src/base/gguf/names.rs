//! llama.cpp's tensor names and prefold's, which are those of transformers' Llama.

use std::collections::BTreeMap;

use crate::base::{DecoderSpec, Linear, Part, WeightNames};

const TOP: [(&str, &str); 4] = [
    ("token_embd", "model.embed_tokens"),
    ("position_embd", "model.embed_positions"),
    ("output_norm", "model.norm"),
    ("output", "lm_head"),
];

const LAYER: [(&str, &str); 14] = [
    ("attn_norm", "input_layernorm"),
    ("attn_qkv", "self_attn.qkv_proj"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("attn_output", "self_attn.o_proj"),
    ("post_attention_norm", "attention_output_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("post_ffw_norm", "mlp_output_layernorm"),
];

/// Per-frequency divisors of the rotary embedding: part of the configuration, not a weight.
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";
/// Those of longrope within the pretrained context.
pub(super) const SHORT_FACTORS: &str = "rope_factors_short.weight";
/// Those of longrope beyond it.
pub(super) const LONG_FACTORS: &str = "rope_factors_long.weight";

/// The file's tensors by prefold's name. A tensor without one keeps its own, so that whoever loads the model sees that it
/// is left over.
pub(super) fn index<'a>(stored: impl Iterator<Item = &'a String>) -> BTreeMap<String, String> {
    stored
        .filter(|name| ![ROPE_FACTORS, SHORT_FACTORS, LONG_FACTORS].contains(&name.as_str()))
        .map(|name| (ours(name).unwrap_or_else(|| name.clone()), name.clone()))
        .collect()
}

fn ours(name: &str) -> Option<String> {
    let (stem, kind) = name.rsplit_once('.').filter(|(_, kind)| matches!(*kind, "weight" | "bias"))?;
    if let Some((_, module)) = TOP.iter().find(|(theirs, _)| *theirs == stem) {
        return Some(format!("{module}.{kind}"));
    }
    let (layer, part) = stem.strip_prefix("blk.")?.split_once('.')?;
    let layer: u32 = layer.parse().ok()?;
    let (_, module) = LAYER.iter().find(|(theirs, _)| *theirs == part)?;
    Some(format!("model.layers.{layer}.{module}.{kind}"))
}

/// Where the weights of a decoder are: by their own names, but for the matrices that a file has in one.
pub(super) fn weight_names(spec: &DecoderSpec, contains: impl Fn(&str) -> bool) -> WeightNames {
    let mut names = WeightNames::llama();
    if contains("model.layers.0.self_attn.qkv_proj.weight") {
        let module = "model.layers.{}.self_attn.qkv_proj";
        let (queries, keys) = (spec.attention.query_width(), spec.attention.kv_width());
        let of = queries + 2 * keys;
        names = names
            .with_linear(Linear::Query, module, Part::Rows { start: 0, count: queries, of }, false)
            .with_linear(Linear::Key, module, Part::Rows { start: queries, count: keys, of }, false)
            .with_linear(Linear::Value, module, Part::Rows { start: queries + keys, count: keys, of }, false);
    }
    if spec.mlp.gated && !contains("model.layers.0.mlp.gate_proj.weight") {
        let (module, inner) = ("model.layers.{}.mlp.up_proj", spec.mlp.intermediate_size);
        names = names
            .with_linear(Linear::Gate, module, Part::Rows { start: 0, count: inner, of: 2 * inner }, false)
            .with_linear(Linear::Up, module, Part::Rows { start: inner, count: inner, of: 2 * inner }, false);
    }
    names
}

#[cfg(test)]
mod tests {
    use super::ours;

    #[test]
    fn names_follow_transformers() {
        let pairs = [
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("output.weight", "lm_head.weight"),
            ("output.bias", "lm_head.bias"),
            ("blk.17.attn_k.bias", "model.layers.17.self_attn.k_proj.bias"),
            ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
        ];
        for (stored, name) in pairs {
            assert_eq!(ours(stored).as_deref(), Some(name));
        }
        for stored in ["blk.x.attn_k.weight", "blk.0.attn_k", "blk.0.ffn_gate_exps.weight", "output"] {
            assert_eq!(ours(stored), None, "{stored}");
        }
    }
}
