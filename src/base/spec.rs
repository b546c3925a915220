//! What makes one decoder differ from another, as data.
//!
//! The candle decoder and the ONNX exporter are two interpreters of a [`DecoderSpec`]; a family is a file under
//! [`family`](super::family) that maps its `config.json` to one.

use serde::Serialize;

/// A decoder-only language model, described.
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
    /// Normalisation before attention, before the MLP, and at the end.
    pub norm: Norm,
    /// The attention block.
    pub attention: Attention,
    /// The feed-forward block.
    pub mlp: Mlp,
    /// Whether the output projection is the transposed token embedding.
    pub tied_embeddings: bool,
}

/// Root-mean-square normalisation, `x / sqrt(mean(x²) + epsilon) · weight`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Norm {
    /// Added to the mean square.
    pub epsilon: f64,
}

/// Self-attention with rotary positions and grouped key-value heads.
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
    /// Rotary position embedding.
    pub rotary: Rotary,
    /// Whether the query, key, value and output projections have a bias.
    pub bias: bool,
}

/// Rotary position embedding in the half-split layout: element `i` turns with element `i + head_dim/2`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Rotary {
    /// Angular frequency of each pair, in radians a position, scaling applied; `head_dim / 2` values in float32 as
    /// transformers computes them.
    pub inv_freq: Vec<f32>,
}

/// The gated feed-forward block, `down(activation(gate(x)) · up(x))`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Mlp {
    /// Width between the projections.
    pub intermediate_size: usize,
    /// The function on the gate.
    pub activation: Activation,
    /// Whether the three projections have a bias.
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

/// The linear maps of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Linear {
    /// `[num_heads · head_dim, hidden_size]`.
    Query,
    /// `[num_kv_heads · head_dim, hidden_size]`.
    Key,
    /// `[num_kv_heads · head_dim, hidden_size]`.
    Value,
    /// `[hidden_size, num_heads · head_dim]`.
    AttentionOutput,
    /// `[intermediate_size, hidden_size]`.
    Gate,
    /// `[intermediate_size, hidden_size]`.
    Up,
    /// `[hidden_size, intermediate_size]`.
    Down,
}

impl Linear {
    /// All of them, in the order in which a layer uses them.
    pub const ALL: [Self; 7] =
        [Self::Query, Self::Key, Self::Value, Self::AttentionOutput, Self::Gate, Self::Up, Self::Down];

    /// The module's path inside its layer, as transformers names it.
    pub fn module(self) -> &'static str {
        match self {
            Self::Query => "self_attn.q_proj",
            Self::Key => "self_attn.k_proj",
            Self::Value => "self_attn.v_proj",
            Self::AttentionOutput => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }
}

/// One weight tensor by what it does; [`DecoderSpec::weight_name`] gives its name in the checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightRole {
    /// Token embedding, `[vocab_size, hidden_size]`.
    Embedding,
    /// The norm before attention, `[hidden_size]`.
    AttentionNorm(usize),
    /// The norm before the MLP, `[hidden_size]`.
    MlpNorm(usize),
    /// A linear map's matrix, `[out, in]`.
    Weight(usize, Linear),
    /// A linear map's bias, `[out]`.
    Bias(usize, Linear),
    /// The norm after the last layer, `[hidden_size]`.
    FinalNorm,
    /// Output projection, `[vocab_size, hidden_size]`; the embedding itself where it is tied.
    Head,
}

/// A weight that a decoder needs: role, name in the checkpoint, shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightShape {
    /// What it does.
    pub role: WeightRole,
    /// Its name in the checkpoint.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl DecoderSpec {
    /// The most products that are summed to one number in a layer or the output projection.
    pub fn longest_dot_product(&self) -> usize {
        let queries = self.attention.num_heads.saturating_mul(self.attention.head_dim);
        self.hidden_size.max(self.mlp.intermediate_size).max(queries)
    }

    /// `[out, in]` of a linear map.
    pub fn linear_shape(&self, linear: Linear) -> [usize; 2] {
        let queries = self.attention.num_heads * self.attention.head_dim;
        let keys = self.attention.num_kv_heads * self.attention.head_dim;
        match linear {
            Linear::Query => [queries, self.hidden_size],
            Linear::Key | Linear::Value => [keys, self.hidden_size],
            Linear::AttentionOutput => [self.hidden_size, queries],
            Linear::Gate | Linear::Up => [self.mlp.intermediate_size, self.hidden_size],
            Linear::Down => [self.hidden_size, self.mlp.intermediate_size],
        }
    }

    /// Whether a linear map has a bias.
    pub fn has_bias(&self, linear: Linear) -> bool {
        match linear {
            Linear::Query | Linear::Key | Linear::Value | Linear::AttentionOutput => self.attention.bias,
            Linear::Gate | Linear::Up | Linear::Down => self.mlp.bias,
        }
    }

    /// The checkpoint's name of a weight.
    pub fn weight_name(&self, role: WeightRole) -> String {
        match role {
            WeightRole::Embedding => "model.embed_tokens.weight".into(),
            WeightRole::AttentionNorm(layer) => format!("model.layers.{layer}.input_layernorm.weight"),
            WeightRole::MlpNorm(layer) => format!("model.layers.{layer}.post_attention_layernorm.weight"),
            WeightRole::Weight(layer, linear) => format!("model.layers.{layer}.{}.weight", linear.module()),
            WeightRole::Bias(layer, linear) => format!("model.layers.{layer}.{}.bias", linear.module()),
            WeightRole::FinalNorm => "model.norm.weight".into(),
            WeightRole::Head if self.tied_embeddings => self.weight_name(WeightRole::Embedding),
            WeightRole::Head => "lm_head.weight".into(),
        }
    }

    /// The shape of a weight.
    pub fn weight_shape(&self, role: WeightRole) -> Vec<usize> {
        match role {
            WeightRole::Embedding | WeightRole::Head => vec![self.vocab_size, self.hidden_size],
            WeightRole::AttentionNorm(_) | WeightRole::MlpNorm(_) | WeightRole::FinalNorm => vec![self.hidden_size],
            WeightRole::Weight(_, linear) => self.linear_shape(linear).to_vec(),
            WeightRole::Bias(_, linear) => vec![self.linear_shape(linear)[0]],
        }
    }

    /// Every weight in the order of use; a tied head is not listed again.
    pub fn weights(&self) -> Vec<WeightShape> {
        let mut roles = vec![WeightRole::Embedding];
        for layer in 0..self.num_layers {
            roles.push(WeightRole::AttentionNorm(layer));
            for linear in Linear::ALL {
                if linear == Linear::Gate {
                    roles.push(WeightRole::MlpNorm(layer));
                }
                roles.push(WeightRole::Weight(layer, linear));
                if self.has_bias(linear) {
                    roles.push(WeightRole::Bias(layer, linear));
                }
            }
        }
        roles.push(WeightRole::FinalNorm);
        if !self.tied_embeddings {
            roles.push(WeightRole::Head);
        }
        roles
            .into_iter()
            .map(|role| WeightShape { role, name: self.weight_name(role), shape: self.weight_shape(role) })
            .collect()
    }

    /// Number of parameters; a tied head counts once.
    pub fn num_parameters(&self) -> usize {
        self.weights().iter().map(|w| w.shape.iter().product::<usize>()).sum()
    }
}
