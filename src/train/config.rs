//! How to train.

use candle_core::DType;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{AdamWConfig, DpoConfig, Error, EvalBy, LrScheduler, ObjectiveKind, Result, Schedule, SimpoConfig};
use crate::base::DeviceChoice;

/// The options of a training run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// What is minimised.
    pub objective: ObjectiveKind,
    /// Constants of `objective = "dpo"`.
    pub dpo: DpoConfig,
    /// Constants of `objective = "simpo"`.
    pub simpo: SimpoConfig,
    /// Highest learning rate. Prefix-Tuning+ wants lower rates than LoRA: too high a rate stalls without a NaN.
    pub learning_rate: f64,
    /// Passes over the training data.
    pub epochs: usize,
    /// Optimizer steps, in place of `epochs`.
    pub max_steps: Option<usize>,
    /// Examples in a forward pass: sequences, or pairs of sequences with `dpo` and `simpo`.
    pub batch_size: usize,
    /// Forward passes in an optimizer step; in each process where there are several.
    pub gradient_accumulation: usize,
    /// Global L2 norm above which gradients are scaled down; 0 for never.
    pub max_grad_norm: f64,
    /// Part of all steps in which the rate rises from zero.
    pub warmup_fraction: f64,
    /// Steps in which the rate rises from zero, in place of `warmup_fraction`.
    pub warmup_steps: Option<usize>,
    /// How the rate goes on after the warm-up.
    pub lr_scheduler: LrScheduler,
    /// The rate after the last step, as a fraction of the highest; not with `constant`.
    pub final_rate_fraction: f64,
    /// The optimizer's constants.
    pub adamw: AdamWConfig,
    /// Orders the data.
    pub seed: u64,
    /// Steps between evaluations on the held-out part; 0 for one at the end.
    pub eval_every: usize,
    /// How classes are predicted when held-out classification records are evaluated.
    pub eval_by: EvalBy,
    /// Steps between checkpoints; 0 for none.
    pub save_every: usize,
    /// Keep only the inputs of layers for the backward pass and compute the rest again: less memory, a third more time.
    pub checkpoint_activations: bool,
    /// Keep the optimizer's moments in a file of the run folder, which every step reads and writes, and not in memory: eight bytes less
    /// for each trained number, the same result.
    pub offload_optimizer: bool,
    /// How many checkpoints are kept, the newest ones; all where not given. The best one is kept apart.
    pub save_limit: Option<usize>,
    /// Which held-out figure says what the best adapter is; it is kept in `best/`. The loss where `patience` or
    /// `load_best_at_end` needs one and none is given.
    pub best_by: Option<BestBy>,
    /// Whether the run ends with the best adapter in place of the last.
    pub load_best_at_end: bool,
    /// Evaluations in a row without a better figure after which training stops; never where not given.
    pub patience: Option<usize>,
    /// By how much a figure must be better to count.
    pub min_delta: f64,
    /// Whether TensorBoard event files are written, to `tensorboard/` in the run folder.
    pub tensorboard: bool,
    /// The type that the frozen model computes in. The adapter and the optimizer are float32.
    pub dtype: ComputeType,
    /// Where it is computed: `auto`, `cpu`, `cuda` or `cuda:N`. `auto` takes a GPU where this program can use one.
    pub device: DeviceChoice,
    /// Whether a GPU rounds the factors of float32 matrix products to TF32: faster, three decimal digits.
    pub tf32: bool,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            objective: ObjectiveKind::Sft,
            dpo: DpoConfig::default(),
            simpo: SimpoConfig::default(),
            learning_rate: 3e-4,
            epochs: 3,
            max_steps: None,
            batch_size: 8,
            gradient_accumulation: 1,
            max_grad_norm: 1.0,
            warmup_fraction: 0.1,
            warmup_steps: None,
            lr_scheduler: LrScheduler::Cosine,
            final_rate_fraction: 0.0,
            adamw: AdamWConfig::default(),
            seed: 0,
            eval_every: 0,
            eval_by: EvalBy::Text,
            save_every: 100,
            checkpoint_activations: false,
            offload_optimizer: false,
            save_limit: None,
            best_by: None,
            load_best_at_end: false,
            patience: None,
            min_delta: 0.0,
            tensorboard: false,
            dtype: ComputeType::F32,
            device: DeviceChoice::Auto,
            tf32: false,
        }
    }
}

/// Largest batch and largest number of batches in a step.
const MOST: usize = 1 << 20;

/// The held-out figure that tells a better adapter from a worse one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum BestBy {
    /// The lowest loss.
    Loss,
    /// The highest accuracy: of classes or whole completions, or of preferences.
    Accuracy,
}

impl std::str::FromStr for BestBy {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "loss" => Ok(Self::Loss),
            "accuracy" => Ok(Self::Accuracy),
            other => Err(format!("`{other}` is neither loss nor accuracy")),
        }
    }
}

/// A float type to compute in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ComputeType {
    /// IEEE binary64.
    F64,
    /// IEEE binary32.
    #[default]
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE binary16.
    F16,
}

impl ComputeType {
    /// candle's name of it.
    pub fn dtype(self) -> DType {
        match self {
            Self::F64 => DType::F64,
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
        }
    }
}

impl std::str::FromStr for ComputeType {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "f64" => Ok(Self::F64),
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            "f16" => Ok(Self::F16),
            other => Err(format!("`{other}` is none of f64, f32, bf16, f16")),
        }
    }
}

impl TrainConfig {
    /// Whether the numbers make sense.
    ///
    /// # Errors
    /// Names the field that does not.
    pub fn check(&self) -> Result<()> {
        let fail = |field: &'static str, why: String| Err(Error::Config { field, why });
        for (field, value) in [("batch_size", self.batch_size), ("gradient_accumulation", self.gradient_accumulation)] {
            if value == 0 || value > MOST {
                return fail(field, format!("is {value}, but must be between 1 and {MOST}"));
            }
        }
        for (field, value) in [("epochs", self.epochs), ("max_steps", self.max_steps.unwrap_or(1))] {
            if value == 0 || value > 1 << 31 {
                return fail(field, format!("is {value}, but must be at least 1 and below 2³¹"));
            }
        }
        let adamw = &self.adamw;
        for (field, value) in [("adamw.beta1", adamw.beta1), ("adamw.beta2", adamw.beta2)] {
            if !(0.0..1.0).contains(&value) {
                return fail(field, format!("is {value}, but must be at least 0 and below 1"));
            }
        }
        for (field, value) in [("adamw.epsilon", adamw.epsilon), ("adamw.weight_decay", adamw.weight_decay)] {
            if !(value.is_finite() && value >= 0.0) {
                return fail(field, format!("is {value}, but must be 0 or more"));
            }
        }
        if !(self.learning_rate.is_finite() && self.learning_rate > 0.0) {
            return fail("learning_rate", format!("is {}, but must be positive", self.learning_rate));
        }
        for (field, value) in
            [("warmup_fraction", self.warmup_fraction), ("final_rate_fraction", self.final_rate_fraction)]
        {
            if !(0.0..=1.0).contains(&value) {
                return fail(field, format!("is {value}, but must be between 0 and 1"));
            }
        }
        for (field, value) in
            [("max_grad_norm", self.max_grad_norm), ("min_delta", self.min_delta), ("simpo.gamma", self.simpo.gamma)]
        {
            if !(value.is_finite() && value >= 0.0) {
                return fail(field, format!("is {value}, but must be 0 or more"));
            }
        }
        for (field, value) in [("dpo.beta", self.dpo.beta), ("simpo.beta", self.simpo.beta)] {
            if !(value.is_finite() && value > 0.0) {
                return fail(field, format!("is {value}, but must be positive"));
            }
        }
        if !(0.0..0.5).contains(&self.dpo.label_smoothing) {
            let why = format!("is {}, but must be at least 0 and below 0.5", self.dpo.label_smoothing);
            return fail("dpo.label_smoothing", why);
        }
        for (field, value) in [("patience", self.patience), ("save_limit", self.save_limit)] {
            if value == Some(0) {
                return fail(field, "is 0, but must be at least 1".into());
            }
        }
        match self.needs_best() {
            Some(field) if self.eval_every == 0 => fail(field, "needs `eval_every`, which is 0".into()),
            _ => Ok(()),
        }
    }

    /// The figure that is watched, if any is.
    pub fn watched(&self) -> Option<BestBy> {
        self.needs_best().map(|_| self.best_by.unwrap_or(BestBy::Loss))
    }

    /// The option, if any, that asks for the best adapter.
    pub(super) fn needs_best(&self) -> Option<&'static str> {
        let asking = [
            ("patience", self.patience.is_some()),
            ("load_best_at_end", self.load_best_at_end),
            ("best_by", self.best_by.is_some()),
        ];
        asking.into_iter().find(|(_, asks)| *asks).map(|(field, _)| field)
    }

    /// Batches in a pass over `examples` examples, or pairs; the last may be smaller.
    pub fn batches_per_epoch(&self, examples: usize) -> usize {
        examples.div_ceil(self.batch_size)
    }

    /// Optimizer steps over `examples` examples, or pairs, in `processes` processes.
    pub fn total_steps(&self, examples: usize, processes: usize) -> usize {
        let batches = self.batches_per_epoch(examples) * self.epochs;
        self.max_steps.unwrap_or_else(|| batches.div_ceil(self.gradient_accumulation.saturating_mul(processes)))
    }

    /// The learning rate over `total_steps` steps.
    pub fn schedule(&self, total_steps: usize) -> Schedule {
        let fraction = (self.warmup_fraction * total_steps as f64).ceil() as usize;
        Schedule {
            kind: self.lr_scheduler,
            peak: self.learning_rate,
            warmup_steps: self.warmup_steps.unwrap_or(fraction),
            total_steps,
            final_fraction: self.final_rate_fraction,
        }
    }
}
