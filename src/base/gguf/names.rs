//! llama.cpp's tensor names and those of transformers.

use std::collections::BTreeMap;

const TOP: [(&str, &str); 3] =
    [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

const LAYER: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Per-frequency divisors of the rotary embedding: part of the configuration, not a weight.
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// The file's tensors by their Hugging Face name. A tensor without one keeps its own, so that whoever loads the model
/// sees that it is left over.
pub(super) fn index<'a>(stored: impl Iterator<Item = &'a String>) -> BTreeMap<String, String> {
    stored
        .filter(|name| *name != ROPE_FACTORS)
        .map(|name| (hugging_face(name).unwrap_or_else(|| name.clone()), name.clone()))
        .collect()
}

fn hugging_face(name: &str) -> Option<String> {
    let (stem, kind) = name.rsplit_once('.').filter(|(_, kind)| matches!(*kind, "weight" | "bias"))?;
    if let Some((_, module)) = TOP.iter().find(|(ours, _)| *ours == stem) {
        return Some(format!("{module}.{kind}"));
    }
    let (layer, part) = stem.strip_prefix("blk.")?.split_once('.')?;
    let layer: u32 = layer.parse().ok()?;
    let (_, module) = LAYER.iter().find(|(ours, _)| *ours == part)?;
    Some(format!("model.layers.{layer}.{module}.{kind}"))
}

#[cfg(test)]
mod tests {
    use super::hugging_face;

    #[test]
    fn names_follow_transformers() {
        let pairs = [
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("output.weight", "lm_head.weight"),
            ("blk.17.attn_k.bias", "model.layers.17.self_attn.k_proj.bias"),
            ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
        ];
        for (stored, name) in pairs {
            assert_eq!(hugging_face(stored).as_deref(), Some(name));
        }
        for stored in ["blk.x.attn_k.weight", "blk.0.attn_k", "blk.0.ffn_gate_exps.weight", "output"] {
            assert_eq!(hugging_face(stored), None, "{stored}");
        }
    }
}
