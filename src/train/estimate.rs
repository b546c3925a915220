//! How much memory a run needs, before it starts.

use serde::Serialize;

use super::{ComputeType, TrainConfig};
use crate::adapter::Adapter;
use crate::base::DecoderSpec;

/// An estimate of a run's memory, in bytes.
///
/// With `T = rows · seq` positions of a micro-batch, `b` bytes a number of the compute type, `P` and `A` the parameters of
/// model and adapter, hidden width `h`, MLP width `m`, query width `q = heads · head_dim`, key width `k`:
///
/// ```text
/// weights      P · b
/// adapter      A · 4                     float32
/// optimizer    A · 4 · 4                 gradient, its sum over micro-batches, two moments
/// activations  per layer from the lowest adapted one   b · T · (6h + 6q + 3k + 2m)      3m for an MLP without a gate
///              of the layer being computed             one layer's again
///              of the labelled positions               2 · labelled · h · b
///              with checkpoint_activations             b · T · h a layer, and two layers' as above
/// ```
///
/// The coefficients count the tensors that the decoder keeps for the backward pass; attention and the loss keep no scores
/// and no logits. What is not in it: the process itself, temporaries of an evaluation, and pages of the checkpoint that the
/// system keeps mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryEstimate {
    /// The frozen model.
    pub weights: u64,
    /// The adapter in float32.
    pub adapter: u64,
    /// Gradients and moments.
    pub optimizer: u64,
    /// What the backward pass needs of the forward pass, logits included.
    pub activations: u64,
}

/// The largest micro-batch of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Workload {
    /// Sequences.
    pub rows: usize,
    /// Positions of each, padding included.
    pub seq: usize,
    /// Positions that carry a label, in all rows.
    pub labelled: usize,
}

impl MemoryEstimate {
    /// The estimate for a model, an adapter and the largest micro-batch.
    pub fn of(spec: &DecoderSpec, adapter: &Adapter, config: &TrainConfig, work: &Workload) -> Self {
        let number = match config.dtype {
            ComputeType::F64 => 8,
            ComputeType::F32 => 4,
            ComputeType::Bf16 | ComputeType::F16 => 2,
        };
        let wide = |n: usize| n as u64;
        let attention = &spec.attention;
        let (queries, keys) = (attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim);
        let mlp = spec.mlp.intermediate_size * if spec.mlp.gated { 2 } else { 3 };
        let positions = wide(work.rows) * wide(work.seq) * number;
        let residual = positions * wide(spec.hidden_size);
        let layer = positions * wide(6 * spec.hidden_size + 6 * queries + 3 * keys + mlp);
        let lowest = adapter.config().layers.iter().flatten().min().copied().unwrap_or(0);
        let layers = wide(spec.num_layers.saturating_sub(lowest));
        let kept = if config.checkpoint_activations { residual * layers + layer } else { layer * layers };
        let labelled = 2 * wide(work.labelled) * wide(spec.hidden_size) * number;
        let adapted = wide(adapter.num_parameters());
        Self {
            weights: wide(spec.num_parameters()) * number,
            adapter: adapted * 4,
            optimizer: adapted * 16,
            activations: kept + layer + labelled,
        }
    }

    /// All together.
    pub fn total(&self) -> u64 {
        self.weights + self.adapter + self.optimizer + self.activations
    }
}
