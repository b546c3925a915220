//! The loss: cross-entropy of the completion's tokens, and of nothing else.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::base::{Decoder, Error, Input, SiteHook};
use crate::data::Batch;

/// The summed cross-entropy over labelled positions, and what the model would have predicted there.
#[derive(Debug)]
pub struct CompletionLoss {
    /// Sum of the negative log-likelihoods in nats, a differentiable float32 scalar (float64 for a float64 model).
    pub sum: Tensor,
    /// For each labelled position in row order: its row in the batch, and whether the greedy prediction is the label.
    pub hits: Vec<(usize, bool)>,
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
    let (positions, targets) = labelled(input.shape(), labels, decoder.spec().vocab_size)?;
    let hidden = decoder.hidden_states(input, None, hook)?;
    let (batch, seq) = input.shape();
    let action = Error::candle("computing the loss");
    let index = Tensor::new(positions.as_slice(), decoder.device()).map_err(&action)?;
    let rows = hidden
        .reshape((batch * seq, decoder.spec().hidden_size))
        .and_then(|h| h.index_select(&index, 0))
        .map_err(&action)?;
    let mut logits = decoder.logits(&rows)?;
    if matches!(logits.dtype(), DType::F16 | DType::BF16) {
        logits = logits.to_dtype(DType::F32).map_err(&action)?;
    }
    let predicted: Vec<u32> = logits.detach().argmax(1).and_then(|p| p.to_vec1()).map_err(&action)?;
    let rows = positions.iter().map(|at| *at as usize / seq);
    let hits = rows.zip(predicted.iter().zip(&targets).map(|(p, t)| p == t)).collect();
    let sum = logits.contiguous().and_then(|l| l.apply_op1(CrossEntropy { targets })).map_err(&action)?;
    Ok(CompletionLoss { sum, hits })
}

/// Rows of the flattened hidden states that predict a label, and the labels.
fn labelled(shape: (usize, usize), labels: &[i64], vocab: usize) -> crate::base::Result<(Vec<u32>, Vec<u32>)> {
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

/// `Σ_r logsumexp(logits_r) − logits_r[target_r]` over the rows of `[rows, vocab]`.
struct CrossEntropy {
    targets: Vec<u32>,
}

trait Logit: num_traits::Float + Send + Sync {
    fn wide(self) -> f64;
}

impl Logit for f32 {
    fn wide(self) -> f64 {
        f64::from(self)
    }
}

impl Logit for f64 {
    fn wide(self) -> f64 {
        self
    }
}

/// `(max, Σ exp(x − max))`, the sum gathered in float64.
fn log_sum_parts<T: Logit>(row: &[T]) -> (T, f64) {
    let max = row.iter().copied().fold(T::neg_infinity(), T::max);
    (max, row.iter().map(|x| (*x - max).exp().wide()).sum())
}

fn loss_of_rows<T: Logit>(logits: &[T], targets: &[u32]) -> f64 {
    let width = logits.len() / targets.len().max(1);
    let losses: Vec<f64> = logits
        .par_chunks(width.max(1))
        .zip(targets)
        .map(|(row, target)| {
            let (max, sum) = log_sum_parts(row);
            max.wide() + sum.ln() - row[*target as usize].wide()
        })
        .collect();
    // a fixed order of summation, whatever the threads did
    losses.iter().sum()
}

fn gradient_of_rows<T: Logit>(logits: &[T], targets: &[u32], scale: T) -> Vec<T> {
    let width = (logits.len() / targets.len().max(1)).max(1);
    let mut gradient = vec![T::zero(); logits.len()];
    gradient.par_chunks_mut(width).zip(logits.par_chunks(width)).zip(targets).for_each(|((gradient, row), target)| {
        let (max, sum) = log_sum_parts(row);
        let factor = scale / T::from(sum).unwrap_or_else(T::nan);
        for (g, x) in gradient.iter_mut().zip(row) {
            *g = (*x - max).exp() * factor;
        }
        let target = &mut gradient[*target as usize];
        *target = *target - scale;
    });
    gradient
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("cross-entropy was given strided logits")
        };
        let storage = match logits {
            CpuStorage::F32(v) => CpuStorage::F32(vec![loss_of_rows(&v[start..end], &self.targets) as f32]),
            CpuStorage::F64(v) => CpuStorage::F64(vec![loss_of_rows(&v[start..end], &self.targets)]),
            other => candle_core::bail!("cross-entropy was given {:?}", other.dtype()),
        };
        Ok((storage, Shape::from(())))
    }

    fn bwd(&self, logits: &Tensor, _loss: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        logits.apply_op2_no_bwd(grad, &CrossEntropyGrad { targets: self.targets.clone() }).map(Some)
    }
}

/// `(softmax(logits) − onehot(target)) · grad`.
struct CrossEntropyGrad {
    targets: Vec<u32>,
}

impl CustomOp2 for CrossEntropyGrad {
    fn name(&self) -> &'static str {
        "cross-entropy-grad"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, ll: &Layout, grad: &CpuStorage, lg: &Layout) -> Result<(CpuStorage, Shape)> {
        let Some((start, end)) = ll.contiguous_offsets() else {
            candle_core::bail!("cross-entropy was given strided logits")
        };
        let at = lg.start_offset();
        let storage = match (logits, grad) {
            (CpuStorage::F32(v), CpuStorage::F32(g)) => {
                CpuStorage::F32(gradient_of_rows(&v[start..end], &self.targets, g[at]))
            }
            (CpuStorage::F64(v), CpuStorage::F64(g)) => {
                CpuStorage::F64(gradient_of_rows(&v[start..end], &self.targets, g[at]))
            }
            _ => candle_core::bail!("cross-entropy's gradient was given mixed types"),
        };
        Ok((storage, ll.shape().clone()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    #[test]
    fn cross_entropy_is_candle_nn_s_with_the_same_gradient() {
        let values: Vec<f64> = (0..24).map(|i| (i as f64 * 1.3).sin() * 4.0).collect();
        let logits = Var::from_tensor(&Tensor::from_vec(values, (4, 6), &Device::Cpu).unwrap()).unwrap();
        let targets = vec![0u32, 5, 2, 2];
        let ours = logits.as_tensor().apply_op1(CrossEntropy { targets: targets.clone() }).unwrap();
        let theirs =
            candle_nn::loss::cross_entropy(logits.as_tensor(), &Tensor::new(targets, &Device::Cpu).unwrap()).unwrap();
        let value = |t: &Tensor| t.to_scalar::<f64>().unwrap();
        assert!((value(&ours) / 4.0 - value(&theirs)).abs() < 1e-12);
        let gradient = |loss: &Tensor| {
            let grads = loss.backward().unwrap();
            grads.get(&logits).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap()
        };
        for (a, b) in gradient(&ours).iter().zip(gradient(&theirs)) {
            assert!((a / 4.0 - b).abs() < 1e-12);
        }
    }

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
