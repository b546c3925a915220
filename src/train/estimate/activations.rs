//! The memory of passes through a decoder.
//!
//! A tensor that an operation with a gradient has read or made stays until the backward pass. Counted in numbers a position,
//! with hidden width `h`, query width `q`, key width `k` and MLP width `m`, a layer of a Llama with frozen weights keeps
//!
//! ```text
//!                                                                      composed   fused
//! two norms, attention's output projection, the MLP's output           4h         0
//! the residual stream after attention and after the MLP                2h         2h
//! query: projected, rotated, attended                                  3q         2q
//! keys projected and rotated, values                                   3k         2k
//! gate and up                                                          4m         2m
//! ```
//!
//! and an adapter adds what its own operations make; LoRA without dropout and magnitudes, and weights that are trained, are
//! parts of these operations and add nothing. What gate and up made is given up as the backward pass goes, and is not kept at all
//! where their weights are trained; there a layer gives up all that it kept. Attention keeps no scores, the loss of float weights no logits.

use super::Workload;
use crate::adapter::term::{Map, Step};
use crate::adapter::{AdapterConfig, Lora, Method, Query, module_name};
use crate::base::{Activation, DecoderSpec, Linear, NormSite, WeightRole, Wiring};
use crate::train::{ComputeType, ObjectiveKind, TrainConfig};

/// Elements of logits that the fused loss holds at a time.
const LOGITS: u64 = 1 << 24;

pub(super) struct Activations<'a> {
    spec: &'a DecoderSpec,
    adapter: &'a AdapterConfig,
    config: &'a TrainConfig,
    /// Bytes of a number.
    number: u64,
    /// Whether the base model's own weights are trained.
    is_full: bool,
    h: u64,
    q: u64,
    k: u64,
    m: u64,
}

impl<'a> Activations<'a> {
    pub(super) fn new(spec: &'a DecoderSpec, adapter: &'a AdapterConfig, config: &'a TrainConfig) -> Self {
        Self {
            spec,
            adapter,
            config,
            number: config.dtype.bytes(),
            is_full: matches!(adapter.method, Method::Full(_)),
            h: spec.hidden_size as u64,
            q: spec.attention.query_width() as u64,
            k: spec.attention.kv_width() as u64,
            m: spec.mlp.intermediate_size as u64,
        }
    }

    /// Bytes of a training step at its largest.
    pub(super) fn training(&self, work: &Workload) -> u64 {
        let positions = (work.rows * work.seq) as u64 * self.number;
        let lowest = if self.is_full { 0 } else { self.adapter.adapted_layers().first().copied().unwrap_or(0) };
        let layers: Vec<u64> = (lowest..self.spec.num_layers).map(|layer| self.layer(layer)).collect();
        let largest = layers.iter().max().copied().unwrap_or(0);
        let kept = if self.config.checkpoint_activations {
            self.spec.num_layers as u64 * self.h + largest
        } else {
            // nothing before the adapter's term needs a gradient in the lowest layer
            let spared = if self.has_term() { self.h + 2 * self.q + 3 * self.k } else { 0 };
            layers.iter().sum::<u64>().saturating_sub(spared)
        };
        let ends = 2 * self.h + self.angles();
        let labelled = work.labelled as u64;
        let selected = 2 * labelled * self.h * self.number;
        let (logits_kept, logits) = self.logits(labelled, true);
        let reference = if self.config.objective == ObjectiveKind::Dpo { self.forward() * positions } else { 0 };
        let prefix = self.prefix_positions() * work.rows as u64 * 4 * self.k * self.number;
        let gradient = self.adapter.num_parameters(self.spec) as u64 * 4;
        let kept = positions * (kept + ends) + prefix * layers.len() as u64 + selected + logits_kept;
        // with the logits, at the highest layer, and at the lowest
        let above = kept + self.head_gradient() + logits.max(reference).max(self.backward() * positions);
        let below = kept - self.given_up(&layers, lowest) * positions + gradient + self.backward() * positions;
        above.max(below)
    }

    /// Bytes of an evaluation's largest batch.
    pub(super) fn evaluation(&self, work: &Workload) -> u64 {
        let positions = (work.rows * work.seq) as u64 * self.number;
        let (kept, passing) = self.logits(work.labelled as u64, false);
        let selected = work.labelled as u64 * self.h * self.number;
        (positions * (self.forward() + self.angles())).max(positions * self.h * 2 + selected + kept + passing)
    }

    fn is_wide(&self) -> bool {
        matches!(self.config.dtype, ComputeType::F32 | ComputeType::F64)
    }

    fn has_term(&self) -> bool {
        let layer = self.adapter.adapted_layers().first().copied().unwrap_or(0);
        self.adapter.method.as_method().term(self.adapter, layer).is_some()
    }

    fn prefix_positions(&self) -> u64 {
        match &self.adapter.method {
            Method::Prefix(prefix) => prefix.num_virtual_tokens as u64,
            _ => 0,
        }
    }

    fn angles(&self) -> u64 {
        self.spec.attention.rotary.iter().map(|rotary| rotary.dim as u64).sum()
    }

    /// What a layer keeps for its backward pass, in numbers a position.
    fn layer(&self, index: usize) -> u64 {
        let Self { spec, h, q, k, m, .. } = *self;
        let adapts = self.adapter.adapts(index);
        // a bias is a part of a trained norm or map
        let norm = |bias: bool| 1 + u64::from(bias && !self.is_full);
        let (qkv, output, mlp) = self.fused(index);
        let is_inside = |site: NormSite| match site {
            NormSite::Attention => qkv,
            NormSite::Mlp => mlp && spec.wiring == Wiring::PreNorm,
            _ => false,
        };
        let norms: u64 = spec
            .norms()
            .iter()
            .filter(|(site, _)| !is_inside(*site))
            .map(|(site, kind)| {
                let width = match site {
                    NormSite::Query => q,
                    NormSite::Key => k,
                    _ => h,
                };
                width * norm(kind.bias)
            })
            .sum();
        let rotated = spec.layers.get(index).is_some_and(|layer| layer.rotary.is_some());
        let rotated = if rotated && !qkv { q + k } else { 0 };
        let bias = |linear| 1 + u64::from(spec.has_bias(linear) && !self.is_full);
        let projected = match qkv {
            true => q + 2 * k,
            false => q * bias(Linear::Query) + k * (bias(Linear::Key) + bias(Linear::Value)) + rotated,
        };
        // half types attend in float32
        let attended = if self.is_wide() { q } else { q + 2 * (q + q + 2 * k) };
        let attention_output = if output { 0 } else { h * bias(Linear::AttentionOutput) };
        let scaled = u64::from(spec.residual_scale != 1.0);
        let is_block = mlp && spec.wiring == Wiring::PreNorm;
        let residual = h * (2 + scaled * (u64::from(!output) + u64::from(!is_block)));
        let inner = if mlp {
            if self.is_full { 0 } else { 2 * m }
        } else if spec.mlp.gated {
            m * (2 + bias(Linear::Gate) + bias(Linear::Up))
        } else {
            m * (1 + bias(Linear::Up))
        };
        let outer = if is_block { 0 } else { h * bias(Linear::Down) };
        let adapter = if adapts { self.adapter_width(index) } else { 0 };
        norms + projected + attended + attention_output + residual + inner + outer + adapter
    }

    /// Whether projections, output map and MLP of a layer run as one operation each.
    fn fused(&self, index: usize) -> (bool, bool, bool) {
        let changed = |linears: &[Linear]| match &self.adapter.method {
            Method::Lora(lora) if self.is_composed(lora) => {
                lora.sites(self.adapter).iter().any(|(layer, linear)| *layer == index && linears.contains(linear))
            }
            _ => false,
        };
        let unrotated = match &self.adapter.method {
            Method::PrefixPlus(method) => method.query == Query::PreRope,
            _ => false,
        };
        let is_pre_norm = self.spec.wiring == Wiring::PreNorm && self.is_wide();
        let qkv = is_pre_norm && self.spec.attention.qk_norm.is_none() && !unrotated;
        let mlp = &self.spec.mlp;
        let mlp = mlp.gated && !mlp.bias && mlp.activation != Activation::Gelu && self.is_wide();
        (
            qkv && !changed(&[Linear::Query, Linear::Key, Linear::Value]),
            is_pre_norm && !changed(&[Linear::AttentionOutput]),
            mlp && !changed(&[Linear::Gate, Linear::Up, Linear::Down]),
        )
    }

    /// Whether LoRA's products are operations of their own.
    fn is_composed(&self, lora: &Lora) -> bool {
        lora.dora || lora.dropout > 0.0 || !self.is_wide()
    }

    /// What the layers give up before the backward pass has reached the lowest, in numbers a position; `layers` is what each keeps.
    fn given_up(&self, layers: &[u64], lowest: usize) -> u64 {
        let above = layers.len().saturating_sub(1) as u64;
        if self.config.checkpoint_activations {
            return above * self.h;
        }
        if self.is_full {
            return layers.iter().skip(1).sum();
        }
        let fused = (lowest + 1..self.spec.num_layers).filter(|layer| self.fused(*layer).2).count();
        fused as u64 * 2 * self.m
    }

    /// What the adapter keeps in a layer, in numbers a position.
    fn adapter_width(&self, index: usize) -> u64 {
        match &self.adapter.method {
            Method::Lora(lora) if !self.is_composed(lora) => 0,
            Method::Lora(lora) => {
                let of_layer = lora.sites(self.adapter).into_iter().filter(|(layer, _)| *layer == index);
                of_layer
                    .map(|(_, linear)| {
                        let out = self.spec.linear_shape(linear)[0] as u64;
                        let scaled = match (lora.dora, self.spec.has_bias(linear)) {
                            (false, _) => 0,
                            (true, _) if lora.dropout > 0.0 => 4,
                            (true, false) => 1,
                            (true, true) => 3,
                        };
                        let dropped = if lora.dropout > 0.0 { self.spec.linear_shape(linear)[1] as u64 } else { 0 };
                        dropped + 2 * lora.rank_of(&module_name(index, linear)) as u64 + out * (2 + scaled)
                    })
                    .sum()
            }
            Method::Prefix(_) => 2 * self.k,
            Method::Full(_) => 0,
            Method::PrefixPlus(_) => self.term_width(index),
        }
    }

    /// What the steps of a term make that depends on the query, and the sum with attention's output.
    fn term_width(&self, index: usize) -> u64 {
        let method = self.adapter.method.as_method();
        let Some(term) = method.term(self.adapter, index) else { return 0 };
        let tensors = method.tensors(self.adapter).unwrap_or_default();
        let heads = self.spec.attention.num_heads as u64;
        let depends = term.depends_on_query();
        let fused = term.fused_features(|name| tensors.get(name).map(|spec| spec.shape.clone()), heads as usize);
        // by step: groups and columns
        let mut shapes: Vec<(usize, u64)> = Vec::new();
        let mut kept = 0;
        for (at, (step, depends)) in term.steps().iter().zip(depends).enumerate() {
            let of = |value: &crate::adapter::term::Value| shapes.get(value.index()).copied().unwrap_or((1, 1));
            let (shape, made) = match step {
                Step::Query(_) => ((self.spec.attention.num_heads, self.spec.attention.head_dim as u64), 0),
                Step::Tensor(name) => {
                    let shape = tensors.get(name).map(|spec| spec.shape.clone()).unwrap_or_default();
                    ((shape.first().copied().unwrap_or(1), shape.last().copied().unwrap_or(1) as u64), 0)
                }
                Step::Number(_) => ((1, 1), 0),
                // inside the product with one matrix for each head
                Step::Map(_, x) if fused.contains(&at) && self.is_wide() => (of(x), 0),
                Step::Map(map, x) => (of(x), operations(*map)),
                // rows are copied where heads share a matrix
                Step::MatMul(left, right) => {
                    let ((_, width), (groups, columns)) = (of(left), of(right));
                    let copied = if groups as u64 == heads { 0 } else { width / columns.max(1) + 1 };
                    ((groups, columns), 1 + copied)
                }
                Step::Binary(_, left, right) => {
                    let (left, right) = (of(left), of(right));
                    ((left.0.max(right.0), left.1.max(right.1)), 1)
                }
            };
            shapes.push(shape);
            kept += if depends { made * shape.1 * heads } else { 0 };
        }
        let half = if self.is_wide() { 0 } else { 4 * self.q };
        let sum = if self.fused(index).1 { 0 } else { self.q };
        kept + sum + half
    }

    /// Temporaries of a layer's forward pass without gradients.
    fn forward(&self) -> u64 {
        let attention = 3 * self.h + 4 * self.q + 3 * self.k;
        let attention = if self.is_wide() { attention } else { attention + 4 * self.q + 4 * self.k };
        attention.max(4 * self.h + if self.spec.mlp.gated { 3 } else { 2 } * self.m)
    }

    /// Temporaries of a layer's backward pass.
    fn backward(&self) -> u64 {
        let attention = 3 * self.h + 4 * self.q + 3 * self.k;
        // composed operations make a gradient of every step, each three tensors for a moment
        let fused = (0..self.spec.num_layers).all(|layer| self.fused(layer).2);
        attention.max(4 * self.h + if fused { 3 } else { 6 } * self.m)
    }

    /// Logits of the labelled positions in bytes: those that stay, and those that pass.
    fn logits(&self, labelled: u64, trains: bool) -> (u64, u64) {
        let vocab = self.spec.vocab_size as u64;
        let head = &self.spec.head;
        if self.is_wide() {
            let rows = (LOGITS / vocab.max(1)).clamp(1, labelled.max(1));
            return (0, rows * vocab * self.number);
        }
        let copies = 1 + u64::from(head.bias) + u64::from(head.scale != 1.0) + 3 * u64::from(head.softcap.is_some());
        let cast = if self.is_wide() { 0 } else { 4 };
        let kept = labelled * vocab * (copies * self.number + cast);
        // candle adds a gradient to zeros: three tensors for a moment
        (kept, if trains { labelled * vocab * 3 * 4 } else { 0 })
    }

    /// The gradient of the head's matrix in bytes, where it is trained.
    fn head_gradient(&self) -> u64 {
        let table = self.spec.weight_shape(WeightRole::Embedding).iter().product::<usize>() as u64;
        if self.is_full { table * self.number } else { 0 }
    }
}

/// Tensors that an elementwise function makes.
fn operations(map: Map) -> u64 {
    match map {
        Map::Identity => 0,
        Map::EluPlusOne => 2,
        Map::Softplus => 7,
        Map::Elu | Map::Gelu | Map::Relu | Map::Silu | Map::Abs => 1,
    }
}
