//! How much memory a run needs, before it starts.

mod activations;

use serde::Serialize;

use super::{ComputeType, ObjectiveKind, TrainConfig};
use crate::adapter::{AdapterConfig, Method};
use crate::base::DecoderSpec;
use activations::Activations;

/// An estimate of the largest memory of a run's process, in bytes.
///
/// With `P` and `A` the parameters of model and adapter and `b` bytes a number of the compute type:
///
/// ```text
/// weights      P · b                     none with full fine-tuning, whose weights are the adapter, unless by DPO
/// adapter      A · 4 · 2                 float32: at the start, and as it is trained; of full fine-tuning the latter
/// optimizer    A · 4 · 2                 two moments, none of them offloaded; A · 4 more for the sum over micro-batches
/// activations  see `activations.rs`: what the backward pass needs, its temporaries with the gradient, and logits
/// evaluation   the temporaries of one layer and the logits, at four times the rows
/// saving       A · 4                     a checkpoint's adapter before it is written
/// ```
///
/// The last three do not exist at the same time: the largest counts. To it is added what the allocator holds back, since freed
/// pages are kept for the next step: 3/10 of it, and 3/4 with `checkpoint_activations`, whose passes through one layer take
/// blocks of other sizes than those that stay. These two numbers and the 24 MiB for the rest of the program are fitted to measured
/// peaks of the demo's model in all methods, where they are off by 10 % at most with one thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryEstimate {
    /// The process before weights are read: program, tokenizer, examples.
    pub process: u64,
    /// The frozen model.
    pub weights: u64,
    /// The adapter in float32.
    pub adapter: u64,
    /// Gradients and moments.
    pub optimizer: u64,
    /// What the backward pass needs of the forward pass, and the temporaries of both.
    pub activations: u64,
    /// What an evaluation of the held-out part needs.
    pub evaluation: u64,
    /// What writing a checkpoint needs.
    pub saving: u64,
    /// The largest that exists at a time.
    pub peak: u64,
}

/// The largest batch of a kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Workload {
    /// Sequences.
    pub rows: usize,
    /// Positions of each, padding included.
    pub seq: usize,
    /// Positions that carry a label, in all rows.
    pub labelled: usize,
}

impl MemoryEstimate {
    /// The estimate for a model, an adapter, the largest micro-batch and the largest batch of an evaluation; `process` is
    /// what the process holds already.
    pub fn of(
        spec: &DecoderSpec,
        adapter: &AdapterConfig,
        config: &TrainConfig,
        [training, evaluation]: [&Workload; 2],
        process: u64,
    ) -> Self {
        let adapted = adapter.num_parameters(spec) as u64;
        let is_full = matches!(adapter.method, Method::Full(_));
        let holds_base = !is_full || config.objective == ObjectiveKind::Dpo;
        let number = config.dtype.bytes();
        let moments = if config.offload_optimizer { 0 } else { 2 };
        let sums = moments + u64::from(config.gradient_accumulation > 1);
        let activations = Activations::new(spec, adapter, config);
        let mut estimate = Self {
            process,
            weights: if holds_base { spec.num_parameters() as u64 * number } else { 0 },
            adapter: adapted * 4 * if is_full { 1 } else { 2 },
            optimizer: adapted * 4 * sums,
            activations: activations.training(training),
            evaluation: activations.evaluation(evaluation),
            saving: adapted * 4,
            peak: 0,
        };
        let passing = estimate.activations.max(estimate.evaluation).max(estimate.saving);
        let held_back = if config.checkpoint_activations { passing / 4 * 3 } else { passing / 10 * 3 };
        let lasting = estimate.weights + estimate.adapter + estimate.optimizer;
        estimate.peak = process + PROGRAM + lasting + passing + held_back;
        estimate
    }
}

/// What threads, their stacks and code not yet run take.
const PROGRAM: u64 = 24 << 20;

impl ComputeType {
    /// Bytes of a number.
    fn bytes(self) -> u64 {
        self.dtype().size_in_bytes() as u64
    }
}
