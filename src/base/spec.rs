//! The description of a decoder: everything that makes one family differ from another, as data.

use serde::Serialize;

use super::weights::WeightNames;

/// A decoder-only language model.
///
/// Written by a family's mapping from `config.json`; read by the candle decoder and by the ONNX exporter.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DecoderSpec {
    /// The configuration's `model_type`. For display only: no code branches on it.
    pub family: String,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of decoder layers.
    pub num_layers: usize,
    /// The positions that the model was trained for.
    pub max_positions: usize,
    /// From token ids to the residual stream.
    pub embedding: Embedding,
    /// Normalisation of the residual stream.
    pub norm: Norm,
    /// How attention, MLP and norms are wired in a layer.
    pub wiring: Wiring,
    /// Factor on what a block adds to the stream.
    pub residual_scale: f64,
    /// The attention block.
    pub attention: Attention,
    /// The feed-forward block.
    pub mlp: Mlp,
    /// In what single layers differ, one entry a layer.
    pub layers: Vec<Layer>,
    /// Whether the stream is normalised after the last layer.
    pub final_norm: bool,
    /// From the residual stream to logits.
    pub head: Head,
    /// Where transformers keeps the weights, and so the modules that hold them.
    #[serde(skip)]
    pub names: WeightNames,
}

/// From token ids to the residual stream: `project(tokens[ids]) · scale + positions[position + offset]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Embedding {
    /// Factor on the token embedding, rounded to the type that the decoder computes in; 1 where not given.
    pub scale: Option<f64>,
    /// Width of the token embedding, where projections without bias lead from it to `hidden_size` and, before the head,
    /// back to it.
    pub width: Option<usize>,
    /// Learned absolute positions.
    pub positions: Option<LearnedPositions>,
}

/// A table of position embeddings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct LearnedPositions {
    /// Rows of the table.
    pub rows: usize,
    /// The row of position 0.
    pub offset: usize,
}

/// Normalisation over the last dimension.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Norm {
    /// Its formula.
    pub kind: NormKind,
    /// Added to the mean square or the variance.
    pub epsilon: f64,
    /// Added to the weight: 1 where the checkpoint keeps the distance from 1.
    pub weight_offset: f64,
    /// Whether a bias is added.
    pub bias: bool,
}

/// The formula of a norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// `x / sqrt(mean(x²) + epsilon) · weight`.
    Rms,
    /// `(x − mean(x)) / sqrt(var(x) + epsilon) · weight + bias`.
    Layer,
}

/// How attention `A`, MLP `M` and norms `N` make a layer out of the stream `x`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Wiring {
    /// `y = x + A(N x)`, `y + M(N y)`.
    PreNorm,
    /// `y = x + N A(x)`, `y + N M(y)`.
    PostNorm,
    /// `y = x + N A(N x)`, `y + N M(N y)`.
    SandwichNorm,
    /// `y = N(x + A(x))`, `N(y + M(y))`.
    SumNorm,
    /// `x + A(N x) + M(N' x)`.
    Parallel,
    /// `x + A(N x) + M(N x)`.
    ParallelSharedNorm,
}

/// Self-attention with grouped key-value heads.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Attention {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; each serves `num_heads / num_kv_heads` query heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Factor on the scores, `1/√head_dim` in most families.
    pub scale: f64,
    /// `cap · tanh(score / cap)` on the scaled scores.
    pub softcap: Option<f64>,
    /// Whether the query, key and value projections have a bias.
    pub qkv_bias: bool,
    /// Whether the output projection has a bias.
    pub output_bias: bool,
    /// Normalisation of queries and keys before the rotation.
    pub qk_norm: Option<QkNorm>,
    /// The rotary embeddings that layers choose from.
    pub rotary: Vec<Rotary>,
}

/// Normalisation of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct QkNorm {
    /// The norm.
    pub norm: Norm,
    /// Over what it is taken.
    pub over: QkNormOver,
}

/// Over what queries and keys are normalised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum QkNormOver {
    /// Each head by itself; all heads share a weight of `[head_dim]`.
    Head,
    /// Each head by itself with a weight of its own, `[heads, head_dim]`.
    HeadOwnWeight,
    /// The whole projection before it is split into heads, `[heads · head_dim]`.
    Projection,
}

/// Rotary position embedding (arXiv 2104.09864) of the first `dim` elements of a head.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Rotary {
    /// How many elements are turned: even, at most `head_dim`.
    pub dim: usize,
    /// Which elements make a pair: `2i` with `2i + 1`, or else `i` with `i + dim/2`.
    pub interleaved: bool,
    /// Angular frequency of each pair, in radians a position, scaling applied; `dim / 2` values in float32 as transformers
    /// computes them.
    pub inv_freq: Vec<f32>,
    /// Factor on cosine and sine.
    pub attention_factor: f64,
    /// How the frequencies change with the length of the sequence.
    pub long: LongContext,
}

/// Frequencies that depend on the number of positions in use, `length = max(position_ids) + 1`, in every pass anew.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LongContext {
    /// They do not.
    #[default]
    Same,
    /// Others where `length` exceeds `original`.
    Switched {
        /// The pretrained context.
        original: usize,
        /// `dim / 2` frequencies.
        inv_freq: Vec<f32>,
    },
    /// Where `length` exceeds `original`, those of the base `theta · (factor·length/original − factor + 1)^(dim/(dim−2))`.
    Ntk {
        /// The pretrained context.
        original: usize,
        /// The pretrained base.
        theta: f64,
        /// The scaling factor.
        factor: f64,
    },
}

/// The feed-forward block: `down(activation(gate(x)) · up(x))`, or without gate `down(activation(up(x)))`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Mlp {
    /// Width between the projections.
    pub intermediate_size: usize,
    /// The nonlinearity.
    pub activation: Activation,
    /// Whether there is a gate.
    pub gated: bool,
    /// Whether the projections have a bias.
    pub bias: bool,
}

/// An activation function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
    /// `x · Φ(x)` with the Gaussian error function.
    Gelu,
    /// The tanh approximation of GELU.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
}

/// In what one layer differs from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Layer {
    /// Which of the rotary embeddings; none for a layer without rotation.
    pub rotary: Option<usize>,
    /// How many keys a query sees, itself included; all where not given.
    pub window: Option<usize>,
}

/// From the residual stream to logits: `cap · tanh(scale · (x · Wᵀ + bias) / cap)`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Head {
    /// Whether its matrix is the token embedding.
    pub tied: bool,
    /// Whether it has a bias.
    pub bias: bool,
    /// Factor on the logits.
    pub scale: f64,
    /// Soft cap of the logits.
    pub softcap: Option<f64>,
}

impl Attention {
    /// Width of all query heads together.
    pub fn query_width(&self) -> usize {
        self.num_heads.saturating_mul(self.head_dim)
    }

    /// Width of all key heads together, and of all value heads.
    pub fn kv_width(&self) -> usize {
        self.num_kv_heads.saturating_mul(self.head_dim)
    }
}

impl DecoderSpec {
    /// The most products that are summed to one number in a layer or the output projection.
    pub fn longest_dot_product(&self) -> usize {
        self.hidden_size.max(self.mlp.intermediate_size).max(self.attention.query_width())
    }

    /// Width of the token embedding and of what the head reads.
    pub fn embedding_width(&self) -> usize {
        self.embedding.width.unwrap_or(self.hidden_size)
    }
}
