//! Prefix-Tuning+ (arXiv 2506.13674; PrefixMemory-Tuning from its third version on), Eq. 7:
//! `o_i = softmax_attention(q_i, K, V) + φ(q_i)ᵀ · M_h`.
//!
//! With every option,
//!
//! ```text
//! term = φ(q)ᵀ · (gate · scale · M) / (1 + |φ(q)ᵀ · (scale · k)|)        M = A · B with `rank`
//! ```
//!
//! | tensor of layer i | shape | start | with |
//! |---|---|---|---|
//! | `layers.{i}.M` | `[groups, head_dim (contracted with φ(q)), head_dim]` | zero | no `rank` |
//! | `layers.{i}.A`, `.B` | `[groups, head_dim, rank]`, `[groups, rank, head_dim]` | normal of variance `1/head_dim`, zero | `rank` |
//! | `layers.{i}.W`, `.b` | `[groups, head_dim, head_dim]`, `[groups, 1, head_dim]` | identity, zero | `feature_map` = `mlp`: `φ(q)ᵀ = relu(qᵀW + b)` |
//! | `layers.{i}.gate` | `[1, 1, 1]` or `[num_heads, 1, 1]` | one | `gate` = `scalar` or `head` |
//! | `layers.{i}.k` | `[groups, head_dim, 1]` | uniform within `±1/head_dim` | `normalizer` |
//! | `layers.{i}.scale` | `[1, 1, 1]` | `prompt_scale` | `init` = `prompt` |
//!
//! `groups` is `num_heads`, `num_kv_heads` or 1 by `sharing`. M or B is zero at the start, so the first step is the base
//! model, and its gradient is not zero.
//!
//! The normaliser is NTK-Attention's (arXiv 2406.14036). There one sum divides both the softmax's values and the term,
//! `(Σ_j exp(s_j) v_j + φ(q)ᵀM) / (Σ_j exp(s_j) + φ(q)ᵀk)`. At a site the softmax has been divided by its own sum already,
//! which therefore counts as 1; the absolute value keeps the divisor away from zero for a φ that takes either sign.

use std::collections::BTreeMap;

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::method::{Base, Start, TensorSpec, Tensors};
use super::prompt::{self, Captured};
use super::term::{Binary, Map, Term, Value};
use super::{AdapterConfig, AdapterMethod, Error, Result};

/// Prefix-Tuning+ (arXiv 2506.13674, Eq. 7).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct PrefixPlus {
    /// φ in `φ(q)ᵀ M`.
    pub feature_map: FeatureMap,
    /// Which query φ sees.
    pub query: Query,
    /// What shares an M.
    pub sharing: Sharing,
    /// The rank of M where it is a product of two factors; full where not given.
    pub rank: Option<usize>,
    /// A learned factor on the term.
    pub gate: Gate,
    /// Whether the term is divided by `1 + |φ(q)ᵀ k|` with a learned k (after NTK-Attention, arXiv 2406.14036).
    pub normalizer: bool,
    /// What M starts from.
    pub init: Init,
    /// The start of the learned factor on a prompt's M; one over the prompt's tokens where not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_scale: Option<f64>,
}

/// φ in `φ(q)ᵀ M`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FeatureMap {
    /// `x` where positive, else `exp(x) − 1`.
    #[default]
    Elu,
    /// `elu(x) + 1`.
    EluPlusOne,
    /// `x · Φ(x)` with the Gaussian error function.
    Gelu,
    /// `max(x, 0)`.
    Relu,
    /// `x · sigmoid(x)`.
    Silu,
    /// `ln(1 + exp(x))`.
    Softplus,
    /// `x` itself.
    Identity,
    /// A learned `relu(xᵀW + b)`.
    Mlp,
}

/// Which query φ sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Query {
    /// The query that meets the keys: after QK-norm and RoPE, before the scaling.
    #[default]
    PostRope,
    /// The same before RoPE.
    PreRope,
}

/// What shares an M.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Sharing {
    /// Every query head has its own.
    #[default]
    Head,
    /// The query heads of one key-value head share one.
    KvGroup,
    /// All heads of a layer share one.
    Layer,
}

/// A learned factor on the term.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Gate {
    /// The term is added as it is.
    #[default]
    None,
    /// One factor for a layer.
    Scalar,
    /// One factor for every query head.
    Head,
}

/// What M starts from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    /// Zero: the first step is the base model.
    #[default]
    Zeros,
    /// `Σ_j φ(k_j) v_jᵀ` over the keys and values of a prompt, times a learned factor: exact for linear attention (arXiv
    /// 2406.02847).
    Prompt,
}

impl FeatureMap {
    /// The function at the start; of a learned one that with W the identity and b zero.
    fn map(self) -> Map {
        match self {
            Self::Elu => Map::Elu,
            Self::EluPlusOne => Map::EluPlusOne,
            Self::Gelu => Map::Gelu,
            Self::Relu | Self::Mlp => Map::Relu,
            Self::Silu => Map::Silu,
            Self::Softplus => Map::Softplus,
            Self::Identity => Map::Identity,
        }
    }
}

impl PrefixPlus {
    fn groups(&self, config: &AdapterConfig) -> usize {
        match self.sharing {
            Sharing::Head => config.num_heads,
            Sharing::KvGroup => config.kv_heads(),
            Sharing::Layer => 1,
        }
    }

    /// M of a prompt's keys and values, `[groups, head_dim, head_dim]`, and `Σ_j φ(k_j)`, `[groups, head_dim, 1]`. Query
    /// heads share what their key-value head has seen; a layer's M is the mean over its heads.
    pub(super) fn memory(&self, config: &AdapterConfig, seen: &Captured) -> candle_core::Result<(Tensor, Tensor)> {
        let key = match self.query {
            Query::PostRope => &seen.key,
            Query::PreRope => &seen.unrotated_key,
        };
        let features = self.feature_map.map().apply(key)?;
        let memory = features.transpose(1, 2)?.contiguous()?.matmul(&seen.value)?;
        let sum = features.sum(1)?.unsqueeze(2)?;
        let share = |x: Tensor| match self.sharing {
            Sharing::Head => super::term::spread(&x, config.num_heads),
            Sharing::KvGroup => Ok(x),
            Sharing::Layer => x.mean_keepdim(0),
        };
        Ok((share(memory)?, share(sum)?))
    }
}

impl AdapterMethod for PrefixPlus {
    fn check(&self, config: &AdapterConfig) -> Result<()> {
        let fail = |field, why: String, help| Err(Error::Config { field, why, help });
        match self.rank {
            Some(rank) if rank == 0 || rank >= config.head_dim => {
                return fail(
                    "rank",
                    format!("is {rank}"),
                    "it is at least 1 and below head_dim; leave it out for full",
                );
            }
            Some(_) if self.init == Init::Prompt => {
                return fail("rank", "is given with init = prompt".into(), "a prompt's M has full rank: leave it out");
            }
            _ => {}
        }
        if let Some(scale) = self.prompt_scale.filter(|scale| !scale.is_finite()) {
            return fail("prompt_scale", format!("is {scale}"), "it is a finite number");
        }
        Ok(())
    }

    fn tensors(&self, config: &AdapterConfig) -> Option<BTreeMap<String, TensorSpec>> {
        let (groups, width) = (self.groups(config), config.head_dim);
        let mut tensors = BTreeMap::new();
        for layer in config.adapted_layers() {
            let mut add = |name: &str, shape: [usize; 3], start| {
                tensors.insert(format!("layers.{layer}.{name}"), TensorSpec::new(shape, start));
            };
            match self.rank {
                None => add("M", [groups, width, width], Start::Constant(0.0)),
                Some(rank) => {
                    add("A", [groups, width, rank], Start::Normal((width as f64).sqrt().recip()));
                    add("B", [groups, rank, width], Start::Constant(0.0));
                }
            }
            if self.feature_map == FeatureMap::Mlp {
                add("W", [groups, width, width], Start::Identity);
                add("b", [groups, 1, width], Start::Constant(0.0));
            }
            match self.gate {
                Gate::None => {}
                Gate::Scalar => add("gate", [1, 1, 1], Start::Constant(1.0)),
                Gate::Head => add("gate", [config.num_heads, 1, 1], Start::Constant(1.0)),
            }
            if self.normalizer {
                add("k", [groups, width, 1], Start::Uniform((width as f64).recip()));
            }
            if self.init == Init::Prompt {
                add("scale", [1, 1, 1], Start::Constant(self.prompt_scale.unwrap_or(1.0)));
            }
        }
        Some(tensors)
    }

    fn start(&self, config: &AdapterConfig, base: &Base, tensors: &mut Tensors) -> Result<()> {
        if self.init == Init::Zeros {
            return Ok(());
        }
        let prompt = base.prompt()?;
        let seen = prompt::capture(base.decoder, prompt)?;
        let action = Error::candle("starting from a prompt");
        for layer in config.adapted_layers() {
            let Some(seen) = seen.get(layer) else { continue };
            let (memory, sum) = self.memory(config, seen).map_err(&action)?;
            tensors.insert(format!("layers.{layer}.M"), memory);
            if self.normalizer {
                tensors.insert(format!("layers.{layer}.k"), sum);
            }
            if self.prompt_scale.is_none() {
                let scale = Tensor::full(1.0 / prompt.len() as f32, (1, 1, 1), &candle_core::Device::Cpu);
                tensors.insert(format!("layers.{layer}.scale"), scale.map_err(&action)?);
            }
        }
        Ok(())
    }

    fn term(&self, config: &AdapterConfig, layer: usize) -> Option<Term> {
        if !config.adapts(layer) {
            return None;
        }
        let name = |name: &str| format!("layers.{layer}.{name}");
        let mut term = Term::default();
        let scale = (self.init == Init::Prompt).then(|| term.tensor(name("scale")));
        let scaled = |term: &mut Term, x: Value| match scale {
            Some(scale) => term.binary(Binary::Mul, scale, x),
            None => x,
        };
        let memory = match self.rank {
            None => term.tensor(name("M")),
            Some(_) => {
                let (a, b) = (term.tensor(name("A")), term.tensor(name("B")));
                term.matmul(a, b)
            }
        };
        let mut memory = scaled(&mut term, memory);
        if self.gate != Gate::None {
            let gate = term.tensor(name("gate"));
            memory = term.binary(Binary::Mul, gate, memory);
        }
        term.label(memory, name("M"));
        let mut features = term.query(self.query);
        if self.feature_map == FeatureMap::Mlp {
            let (w, b) = (term.tensor(name("W")), term.tensor(name("b")));
            let product = term.matmul(features, w);
            features = term.binary(Binary::Add, product, b);
        }
        let features = match self.feature_map.map() {
            Map::Identity => features,
            map => term.map(map, features),
        };
        if !self.normalizer {
            term.matmul(features, memory);
            return Some(term);
        }
        let key = term.tensor(name("k"));
        let key = scaled(&mut term, key);
        term.label(key, name("k"));
        let divisor = term.matmul(features, key);
        let divisor = term.map(Map::Abs, divisor);
        let one = term.number(1.0);
        let divisor = term.binary(Binary::Add, divisor, one);
        let product = term.matmul(features, memory);
        term.binary(Binary::Div, product, divisor);
        Some(term)
    }
}
