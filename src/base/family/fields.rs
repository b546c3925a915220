//! What families call the fields that all of them have.

/// What a family calls the fields that all families have.
pub(in crate::base) struct Fields {
    pub(in crate::base) hidden_size: &'static str,
    pub(in crate::base) intermediate_size: &'static str,
    pub(in crate::base) num_layers: &'static str,
    pub(in crate::base) num_heads: &'static str,
    pub(in crate::base) max_positions: &'static str,
    pub(in crate::base) activation: &'static str,
    pub(in crate::base) epsilon: &'static str,
    /// None where positions are learned, or each kind of layer has a rotary embedding of its own.
    pub(in crate::base) rope: Option<RopeFields>,
}

impl Fields {
    pub(in crate::base) const LLAMA: Self = Self {
        hidden_size: "hidden_size",
        intermediate_size: "intermediate_size",
        num_layers: "num_hidden_layers",
        num_heads: "num_attention_heads",
        max_positions: "max_position_embeddings",
        activation: "hidden_act",
        epsilon: "rms_norm_eps",
        rope: Some(RopeFields::WHOLE),
    };
    /// With LayerNorm, and part of a head turned.
    pub(in crate::base) const LAYER_NORM: Self =
        Self { epsilon: "layer_norm_eps", rope: Some(RopeFields::PARTIAL), ..Self::LLAMA };
}

/// Where a family's configuration keeps its rotary embedding.
#[derive(Clone, Copy)]
pub(in crate::base) struct RopeFields {
    /// The base.
    pub(in crate::base) theta: &'static str,
    /// The part of a head that is turned, where a family can turn a part.
    pub(in crate::base) partial: Option<&'static str>,
    /// The scaling rules that the family knows, by their names.
    pub(in crate::base) rules: &'static [(&'static str, Rule)],
}

/// A scaling rule.
#[derive(Clone, Copy)]
pub(in crate::base) enum Rule {
    Default,
    Linear,
    Dynamic,
    Yarn,
    Longrope,
    Llama3,
    /// Divisors worked out already, as GGUF files store a rule.
    Factors,
}

impl RopeFields {
    pub(in crate::base) const WHOLE: Self = Self {
        theta: "rope_theta",
        partial: None,
        rules: &[
            ("default", Rule::Default),
            ("linear", Rule::Linear),
            ("dynamic", Rule::Dynamic),
            ("yarn", Rule::Yarn),
            ("longrope", Rule::Longrope),
            ("llama3", Rule::Llama3),
            ("factors", Rule::Factors),
        ],
    };
    pub(in crate::base) const PARTIAL: Self = Self { partial: Some("partial_rotary_factor"), ..Self::WHOLE };
}
