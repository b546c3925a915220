//! What is minimised: one file per objective.

mod dpo;
mod preference;
mod sft;
mod simpo;
#[cfg(test)]
mod tests;

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use dpo::DpoConfig;
pub use sft::{CompletionLoss, Sft, batch_input, completion_loss};
pub use simpo::SimpoConfig;

use super::TrainConfig;
use crate::base::Decoder;
use crate::data::Batch;

/// Which objective is minimised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ObjectiveKind {
    /// Supervised fine-tuning: cross-entropy of the completions.
    #[default]
    Sft,
    /// Direct preference optimisation (arXiv 2305.18290), on records `{prompt, chosen, rejected}`.
    Dpo,
    /// Simple preference optimisation (arXiv 2405.14734), on records `{prompt, chosen, rejected}`.
    Simpo,
}

impl ObjectiveKind {
    /// Its name in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sft => "sft",
            Self::Dpo => "dpo",
            Self::Simpo => "simpo",
        }
    }

    /// The objective with the constants of `config`.
    pub fn objective(self, config: &TrainConfig) -> Box<dyn Objective> {
        match self {
            Self::Sft => Box::new(Sft),
            Self::Dpo => Box::new(dpo::Dpo(config.dpo)),
            Self::Simpo => Box::new(simpo::Simpo(config.simpo)),
        }
    }
}

impl std::str::FromStr for ObjectiveKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = [Self::Sft, Self::Dpo, Self::Simpo].into_iter().find(|kind| kind.name() == text);
        known.ok_or_else(|| format!("`{text}` is none of sft, dpo, simpo"))
    }
}

/// The models that an objective sees: one and the same, unless the weights themselves are trained.
#[derive(Clone, Copy, Debug)]
pub struct Models<'a> {
    /// The one that an adapter acts on, or whose weights are trained.
    pub trained: &'a Decoder,
    /// The one that the training starts from.
    pub reference: &'a Decoder,
}

impl<'a> Models<'a> {
    /// Those of an adapter on a frozen model.
    pub fn frozen(decoder: &'a Decoder) -> Self {
        Self { trained: decoder, reference: decoder }
    }
}

/// Something to minimise.
pub trait Objective: std::fmt::Debug {
    /// Rows of a batch that belong together: 1, or 2 where rows alternate chosen and rejected.
    fn group_size(&self) -> usize;

    /// What the mean loss of a step is taken over: completion tokens, or pairs.
    fn units(&self, batch: &Batch) -> usize;

    /// The loss of a micro-batch, from the hidden states of the adapted model, `[batch, seq, hidden_size]`.
    ///
    /// # Errors
    /// When the batch does not fit the model or the objective.
    fn loss(&self, models: Models, hidden: &Tensor, batch: &Batch) -> crate::base::Result<BatchLoss>;
}

/// The loss of a micro-batch.
#[derive(Debug)]
pub struct BatchLoss {
    /// Sum over the units, a differentiable scalar.
    pub sum: Tensor,
    /// Number of units.
    pub units: usize,
    /// Further figures by name, each summed over the units.
    pub figures: Vec<(&'static str, f64)>,
}

impl BatchLoss {
    /// The sum as a number.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn value(&self) -> candle_core::Result<f64> {
        self.sum.to_dtype(candle_core::DType::F64)?.to_scalar()
    }
}
