//! The places of a decoder that are compared, in the order of the data.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A place in a decoder. Those of a layer stand in the order in which a layer computes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// The residual stream before the first layer.
    Embedding,
    /// What queries, keys and values are made from: the layer's input, normalised where the layer does so.
    AttentionInput,
    /// The product of `q_proj`, bias included.
    QueryProjection,
    /// The product of `k_proj`, bias included.
    KeyProjection,
    /// The product of `v_proj`, bias included.
    ValueProjection,
    /// The query that meets the keys: normalised and rotated.
    Query,
    /// All keys so far: the cache.
    Keys,
    /// All values so far: the cache.
    Values,
    /// What the softmax reads: scores, scaled and capped, of the keys that a query sees.
    #[serde(rename = "attention_scores")]
    Scores,
    /// What the softmax gives.
    #[serde(rename = "attention_weights")]
    Weights,
    /// The attention output before the adapter's term.
    Attention,
    /// The adapter's term.
    Term,
    /// What `o_proj` reads: the attention output with the adapter's term.
    OutputInput,
    /// The product of `o_proj`, bias included.
    OutputProjection,
    /// The residual stream with the attention block's output.
    AttentionResidual,
    /// What the MLP reads.
    MlpInput,
    /// The product of `gate_proj`, bias included.
    GateProjection,
    /// The product of `up_proj`, bias included.
    UpProjection,
    /// What `down_proj` reads: after the activation.
    MlpInner,
    /// The product of `down_proj`, bias included.
    DownProjection,
    /// The residual stream after the layer.
    Stream,
    /// What the head reads.
    FinalNorm,
    /// The logits.
    Logits,
    /// A tensor that another graph has too, where that is the reference.
    Tensor,
}

impl Place {
    /// What it is, for a sentence.
    pub fn phrase(self) -> &'static str {
        match self {
            Self::Embedding => "the embedding",
            Self::AttentionInput => "the norm before attention",
            Self::QueryProjection => "the query projection",
            Self::KeyProjection => "the key projection",
            Self::ValueProjection => "the value projection",
            Self::Query => "the query after its rotation",
            Self::Keys => "the keys in the cache",
            Self::Values => "the values in the cache",
            Self::Scores => "the attention scores",
            Self::Weights => "the attention weights",
            Self::Attention => "the attention output",
            Self::Term => "the adapter's term",
            Self::OutputInput => "the sum of attention output and adapter's term",
            Self::OutputProjection => "the output projection",
            Self::AttentionResidual => "the residual stream after attention",
            Self::MlpInput => "the norm before the MLP",
            Self::GateProjection => "the gate projection",
            Self::UpProjection => "the up projection",
            Self::MlpInner => "the activation of the MLP",
            Self::DownProjection => "the down projection",
            Self::Stream => "the residual stream after the layer",
            Self::FinalNorm => "the final norm",
            Self::Logits => "the logits",
            Self::Tensor => "the tensor",
        }
    }
}

/// A place of a layer. Those before the first layer count to the first, those after the last to one more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct At {
    pub(super) layer: usize,
    pub(super) place: Place,
}

impl At {
    pub(super) fn new(layer: usize, place: Place) -> Self {
        Self { layer, place }
    }

    /// The layer, where it is one's.
    pub(super) fn decoder_layer(self) -> Option<usize> {
        let outside = matches!(self.place, Place::Embedding | Place::FinalNorm | Place::Logits | Place::Tensor);
        (!outside).then_some(self.layer)
    }
}
