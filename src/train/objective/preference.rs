//! What the preference objectives share: log-probabilities of completions, and losses of pairs of them.

use candle_core::{DType, Tensor};

use super::BatchLoss;
use super::sft::{Labelled, label_losses};
use crate::base::{Decoder, Error, Result};
use crate::data::Batch;

/// The log-probability of each row's labels.
pub(super) struct Sequences {
    /// Summed over the row, float64 `[rows]`, differentiable.
    pub(super) log_probs: Tensor,
    /// The same as numbers.
    pub(super) values: Vec<f64>,
    /// Labels of each row; at least one.
    pub(super) tokens: Vec<usize>,
}

/// From the hidden states of a batch whose rows all carry labels.
pub(super) fn sequences(decoder: &Decoder, hidden: &Tensor, batch: &Batch) -> Result<Sequences> {
    sum_by_row(&label_losses(decoder, hidden, &batch.labels)?, batch.batch)
}

pub(super) fn sum_by_row(labelled: &Labelled, rows: usize) -> Result<Sequences> {
    let mut tokens = vec![0; rows];
    for row in &labelled.rows {
        tokens[*row] += 1;
    }
    if let Some(row) = tokens.iter().position(|n| *n == 0) {
        return Err(Error::Input {
            why: format!("row {row} of the batch carries no label"),
            help: "every chosen and rejected completion needs at least one token",
        });
    }
    let action = Error::candle("summing log-probabilities");
    let sums = || {
        let device = labelled.nll.device();
        let row_of: Vec<u32> = labelled.rows.iter().map(|row| *row as u32).collect();
        let zeros = Tensor::zeros(rows, DType::F64, device)?;
        zeros.index_add(&Tensor::new(row_of, device)?, &labelled.nll.to_dtype(DType::F64)?, 0)?.neg()
    };
    let log_probs = sums().map_err(&action)?;
    let values = log_probs.detach().to_vec1().map_err(&action)?;
    Ok(Sequences { log_probs, values, tokens })
}

/// A pair's loss and its derivatives.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct PairLoss {
    /// The loss, in nats.
    pub(super) loss: f64,
    /// Derivative with respect to the log-probability of the chosen completion.
    pub(super) d_chosen: f64,
    /// Derivative with respect to that of the rejected one.
    pub(super) d_rejected: f64,
    /// The implicit reward of the chosen completion.
    pub(super) chosen: f64,
    /// The implicit reward of the rejected one.
    pub(super) rejected: f64,
}

/// The summed loss of rows that alternate chosen, rejected. `pair` is given the number of the chosen row; its rejected one
/// is the next.
///
/// The losses are few and closed-form, so they are numbers in float64; gradients reach the model through
/// `Σ d_r · (log_prob_r − its value)`, which is zero and has the derivatives `d_r`.
pub(super) fn pairs(found: &Sequences, pair: impl Fn(usize) -> PairLoss) -> Result<BatchLoss> {
    let rows = found.values.len();
    if !rows.is_multiple_of(2) {
        return Err(Error::Input {
            why: format!("{rows} rows are no pairs of chosen and rejected"),
            help: "a preference objective needs records {prompt, chosen, rejected}",
        });
    }
    let pairs: Vec<PairLoss> = (0..rows).step_by(2).map(pair).collect();
    let slopes: Vec<f64> = pairs.iter().flat_map(|pair| [pair.d_chosen, pair.d_rejected]).collect();
    let sum = |of: fn(&PairLoss) -> f64| pairs.iter().map(of).sum::<f64>();
    let tensor = || {
        let slopes = Tensor::from_vec(slopes, rows, found.log_probs.device())?;
        let log_probs = &found.log_probs;
        ((log_probs - log_probs.detach())? * slopes)?.sum_all()? + sum(|pair| pair.loss)
    };
    Ok(BatchLoss {
        sum: tensor().map_err(Error::candle("computing the loss"))?,
        units: pairs.len(),
        figures: vec![
            ("rewards/chosen", sum(|pair| pair.chosen)),
            ("rewards/rejected", sum(|pair| pair.rejected)),
            ("rewards/accuracies", sum(|pair| f64::from(u8::from(pair.chosen > pair.rejected)))),
            ("rewards/margins", sum(|pair| pair.chosen - pair.rejected)),
        ],
    })
}

/// `−log σ(x)`, and its derivative `σ(x) − 1`.
pub(super) fn negative_log_sigmoid(x: f64) -> (f64, f64) {
    let e = (-x.abs()).exp();
    let sigmoid_of_minus = if x >= 0.0 { e / (1.0 + e) } else { 1.0 / (1.0 + e) };
    ((-x).max(0.0) + e.ln_1p(), -sigmoid_of_minus)
}
