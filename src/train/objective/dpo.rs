//! Direct preference optimisation (arXiv 2305.18290, Eq. 7), the sigmoid loss.

use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::preference::{PairLoss, negative_log_sigmoid, pairs, sequences};
use super::{BatchLoss, Models, Objective, batch_input};
use crate::base::{NoHook, Result};
use crate::data::Batch;

/// Constants of DPO.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DpoConfig {
    /// How strongly the policy is held to the reference: the factor on the log-ratios.
    pub beta: f64,
    /// The share of pairs that are assumed to be labelled the wrong way round, from 0 to below 0.5 (conservative DPO).
    pub label_smoothing: f64,
}

impl Default for DpoConfig {
    fn default() -> Self {
        Self { beta: 0.1, label_smoothing: 0.0 }
    }
}

/// With `r = β (log π(y|x) − log π_ref(y|x))` and `z = r_chosen − r_rejected`: `−(1 − ε) log σ(z) − ε log σ(−z)`.
///
/// The reference is the same decoder without the adapter, or the model as it was where its weights are trained. It is run
/// again for every batch: a value kept from a batch of
/// another shape differs in its last bits, and a resumed run would no longer end in the same bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dpo(pub(super) DpoConfig);

impl Dpo {
    /// The loss of a pair from the log-ratios of its policy to the reference.
    pub(super) fn pair(&self, chosen: f64, rejected: f64) -> PairLoss {
        let DpoConfig { beta, label_smoothing } = self.0;
        let (chosen, rejected) = (beta * chosen, beta * rejected);
        let (kept, d_kept) = negative_log_sigmoid(chosen - rejected);
        let (flipped, d_flipped) = negative_log_sigmoid(rejected - chosen);
        let slope = beta * ((1.0 - label_smoothing) * d_kept - label_smoothing * d_flipped);
        PairLoss {
            loss: (1.0 - label_smoothing) * kept + label_smoothing * flipped,
            d_chosen: slope,
            d_rejected: -slope,
            chosen,
            rejected,
        }
    }
}

impl Objective for Dpo {
    fn group_size(&self) -> usize {
        2
    }

    fn units(&self, batch: &Batch) -> usize {
        batch.batch / 2
    }

    fn loss(&self, models: Models, hidden: &Tensor, batch: &Batch) -> Result<BatchLoss> {
        let reference = models.reference.hidden_states(&batch_input(batch)?, None, &NoHook)?;
        let reference = sequences(models.reference, &reference, batch)?.values;
        let policy = sequences(models.trained, hidden, batch)?;
        let ratio = |row: usize| policy.values[row] - reference[row];
        pairs(&policy, |row| self.pair(ratio(row), ratio(row + 1)))
    }
}
