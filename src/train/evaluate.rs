//! Loss and accuracy on examples that are not trained on.

use serde::{Deserialize, Serialize};

use super::{Error, Result, batch_input, completion_loss};
use crate::base::{Decoder, SiteHook};
use crate::data::Dataset;

/// Figures over a set of examples.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Number of examples.
    pub examples: usize,
    /// Mean negative log-likelihood of a completion token, in nats.
    pub loss: f64,
    /// Part of the completion tokens that are the model's greedy choice.
    pub token_accuracy: f64,
    /// Part of the examples whose whole completion, end token included, is what greedy decoding gives.
    pub accuracy: f64,
}

/// Evaluates `hook` on a dataset in batches of `batch_size`, sorted by length so that little is padding.
///
/// # Errors
/// When an example does not fit the model.
pub fn evaluate(decoder: &Decoder, hook: &dyn SiteHook, dataset: &Dataset, batch_size: usize) -> Result<Evaluation> {
    let examples = dataset.examples();
    let mut by_length: Vec<usize> = (0..examples.len()).collect();
    by_length.sort_by_key(|i| examples.get(*i).map(|e| e.prompt_ids.len() + e.completion_ids.len()));
    let (mut loss, mut tokens, mut correct, mut exact) = (0.0, 0, 0, 0);
    for chunk in by_length.chunks(batch_size.max(1)) {
        let batch = dataset.batch(chunk);
        let found = completion_loss(decoder, hook, &batch_input(&batch)?, &batch.labels)?;
        let sum = found.sum.to_dtype(candle_core::DType::F64).and_then(|s| s.to_scalar::<f64>());
        loss += sum.map_err(Error::candle("reading the loss"))?;
        tokens += found.tokens();
        correct += found.correct_tokens();
        exact += found.exact_rows();
    }
    let share = |n: usize, of: usize| n as f64 / of.max(1) as f64;
    Ok(Evaluation {
        examples: examples.len(),
        loss: loss / tokens.max(1) as f64,
        token_accuracy: share(correct, tokens),
        accuracy: share(exact, examples.len()),
    })
}
