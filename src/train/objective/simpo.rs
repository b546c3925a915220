//! Simple preference optimisation (arXiv 2405.14734, Eq. 6): no reference, rewards per token, a target margin.

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::preference::{PairLoss, negative_log_sigmoid, pairs, sequences};
use super::{BatchLoss, Models, Objective};
use crate::base::Result;
use crate::data::Batch;

/// Constants of SimPO.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SimpoConfig {
    /// The factor on the mean log-probability of a completion's tokens.
    pub beta: f64,
    /// The margin that the chosen completion's reward is to have over the rejected one's.
    pub gamma: f64,
}

impl Default for SimpoConfig {
    fn default() -> Self {
        Self { beta: 2.0, gamma: 0.5 }
    }
}

/// With `r = β log π(y|x) / |y|`: `−log σ(r_chosen − r_rejected − γ)`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Simpo(pub(super) SimpoConfig);

impl Simpo {
    /// The loss of a pair from the summed log-probabilities and the numbers of tokens.
    pub(super) fn pair(&self, chosen: (f64, usize), rejected: (f64, usize)) -> PairLoss {
        let SimpoConfig { beta, gamma } = self.0;
        let factor = |(_, tokens): (f64, usize)| beta / tokens.max(1) as f64;
        let (r_chosen, r_rejected) = (factor(chosen) * chosen.0, factor(rejected) * rejected.0);
        let (loss, slope) = negative_log_sigmoid(r_chosen - r_rejected - gamma);
        PairLoss {
            loss,
            d_chosen: slope * factor(chosen),
            d_rejected: -slope * factor(rejected),
            chosen: r_chosen,
            rejected: r_rejected,
        }
    }
}

impl Objective for Simpo {
    fn group_size(&self) -> usize {
        2
    }

    fn units(&self, batch: &Batch) -> usize {
        batch.batch / 2
    }

    fn loss(&self, models: Models, hidden: &Tensor, batch: &Batch) -> Result<BatchLoss> {
        let policy = sequences(models.trained, hidden, batch)?;
        let row = |row: usize| (policy.values[row], policy.tokens[row]);
        pairs(&policy, |at| self.pair(row(at), row(at + 1)))
    }
}
