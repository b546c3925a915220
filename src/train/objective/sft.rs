//! Supervised fine-tuning: cross-entropy of the completion's tokens, and of nothing else.

use candle_core::{DType, Tensor};

use super::{BatchLoss, Models, Objective};
use crate::base::ops::LabelLoss;
use crate::base::{Decoder, Error, Input, SiteHook};
use crate::data::Batch;

/// The mean negative log-likelihood of a completion token.
#[derive(Clone, Copy, Debug)]
pub struct Sft;

impl Objective for Sft {
    fn group_size(&self) -> usize {
        1
    }

    fn units(&self, batch: &Batch) -> usize {
        batch.labelled()
    }

    fn loss(&self, models: Models, hidden: &Tensor, batch: &Batch) -> crate::base::Result<BatchLoss> {
        let found = label_losses(models.trained, hidden, &batch.labels)?;
        Ok(BatchLoss { units: found.targets.len(), sum: found.sum()?, figures: Vec::new() })
    }
}

/// The summed cross-entropy over labelled positions, and what the model would have predicted there.
#[derive(Debug)]
pub struct CompletionLoss {
    /// Sum of the negative log-likelihoods in nats, a differentiable float64 scalar.
    pub sum: Tensor,
    /// For each labelled position in row order: its row in the batch, and whether the greedy prediction is the label.
    pub hits: Vec<(usize, bool)>,
    /// For each of them, the greedy prediction.
    pub predicted: Vec<u32>,
}

impl CompletionLoss {
    /// Number of labelled positions.
    pub fn tokens(&self) -> usize {
        self.hits.len()
    }

    /// Of these, how many are predicted greedily.
    pub fn correct_tokens(&self) -> usize {
        self.hits.iter().filter(|(_, hit)| *hit).count()
    }

    /// Rows whose every label is predicted, so that greedy decoding would give exactly the completion.
    pub fn exact_rows(&self) -> usize {
        self.hits.chunk_by(|a, b| a.0 == b.0).filter(|row| row.iter().all(|(_, hit)| *hit)).count()
    }
}

/// The decoder's input of a batch.
///
/// # Errors
/// When the batch holds no token.
pub fn batch_input(batch: &Batch) -> crate::base::Result<Input> {
    let input = Input::new(batch.batch, &batch.input_ids, &batch.attention_mask, Some(&batch.position_ids))?;
    match &batch.segments {
        Some(segments) => input.with_segments(segments.clone()),
        None => Ok(input),
    }
}

/// Loss of a batch whose labels stand in the positions of `input_ids` (Hugging Face's convention: shifted inside, −100
/// ignored). Logits are computed at the labelled positions only.
///
/// # Errors
/// When the batch does not fit the model, holds no label, or a label is not in the vocabulary.
pub fn completion_loss(
    decoder: &Decoder,
    hook: &dyn SiteHook,
    input: &Input,
    labels: &[i64],
) -> crate::base::Result<CompletionLoss> {
    let found = label_losses(decoder, &decoder.hidden_states(input, None, hook)?, labels)?;
    let sum = found.sum()?;
    let predicted = found.predicted.to_vec1::<u32>().map_err(Error::candle("reading predictions"))?;
    let hits = found.rows.into_iter().zip(predicted.iter().zip(&found.targets).map(|(p, t)| p == t)).collect();
    Ok(CompletionLoss { sum, hits, predicted })
}

/// The labels of a batch, and how likely they are.
pub(super) struct Labelled {
    /// Negative log-likelihood of each label, `[labelled]`, differentiable.
    pub(super) nll: Tensor,
    /// The greedy prediction at each, u32.
    pub(super) predicted: Tensor,
    /// The labels.
    pub(super) targets: Vec<u32>,
    /// The row of the batch that each belongs to.
    pub(super) rows: Vec<usize>,
}

impl Labelled {
    /// Sum of the negative log-likelihoods, a float64 scalar.
    fn sum(&self) -> crate::base::Result<Tensor> {
        let sum = self.nll.to_dtype(DType::F64).and_then(|nll| nll.sum_all());
        sum.map_err(Error::candle("computing the loss"))
    }
}

/// Losses at the labelled positions, from hidden states of `[batch, seq, hidden_size]`.
pub(super) fn label_losses(decoder: &Decoder, hidden: &Tensor, labels: &[i64]) -> crate::base::Result<Labelled> {
    let action = Error::candle("computing the loss");
    let (batch, seq, width) = hidden.dims3().map_err(&action)?;
    let (positions, targets) = labelled((batch, seq), labels, decoder.spec().vocab_size)?;
    let index = Tensor::new(positions.as_slice(), decoder.device()).map_err(&action)?;
    let rows = hidden.reshape((batch * seq, width)).and_then(|h| h.index_select(&index, 0)).map_err(&action)?;
    let LabelLoss { nll, predicted } = decoder.label_loss(&rows, &targets)?;
    Ok(Labelled { nll, predicted, targets, rows: positions.iter().map(|at| *at as usize / seq).collect() })
}

/// Rows of the flattened hidden states that predict a label, and the labels.
pub(super) fn labelled(
    shape: (usize, usize),
    labels: &[i64],
    vocab: usize,
) -> crate::base::Result<(Vec<u32>, Vec<u32>)> {
    let (batch, seq) = shape;
    let fail = |why: String| Error::Input {
        why,
        help: "labels is [batch, seq] like input_ids, with -100 where there is nothing to predict",
    };
    if labels.len() != batch * seq {
        return Err(fail(format!("{} labels for {} tokens", labels.len(), batch * seq)));
    }
    let mut positions = Vec::new();
    let mut targets = Vec::new();
    for (at, label) in labels.iter().enumerate().filter(|(at, label)| **label != -100 && at % seq != 0) {
        match u32::try_from(*label) {
            Ok(target) if (target as usize) < vocab => targets.push(target),
            _ => return Err(fail(format!("label {label} is not below the vocabulary size {vocab}"))),
        }
        positions.push((at - 1) as u32);
    }
    if positions.is_empty() {
        return Err(fail("no position carries a label".into()));
    }
    Ok((positions, targets))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_predict_from_the_position_before() {
        let (positions, targets) = labelled((2, 3), &[7, -100, 8, -100, 9, -100], 10).unwrap();
        assert_eq!((positions, targets), (vec![1, 3], vec![8, 9]));
        let messages = [vec![-100; 6], vec![1, 2], vec![-100, 10, -100, -100, -100, -100]]
            .map(|labels| labelled((2, 3), &labels, 10).unwrap_err().to_string());
        insta::assert_snapshot!(messages.join("\n"), @"
        the model's inputs do not fit: no position carries a label
        the model's inputs do not fit: 2 labels for 6 tokens
        the model's inputs do not fit: label 10 is not below the vocabulary size 10
        ");
    }
}
