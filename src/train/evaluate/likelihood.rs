//! Classes by the likelihood of their completions.

use candle_core::{DType, Tensor};

use super::classification::{Classification, Scores};
use super::{EvalBy, Evaluator};
use crate::base::{Error, Input, KvCache, Result as BaseResult, SiteHook};
use crate::data::Example;
use crate::train::Result;

impl Evaluator<'_> {
    /// Predicts each example's class as the one whose completion is the most probable: by the sum of its tokens'
    /// log-probabilities, end token included, and by their mean. Of equal ones the first by name counts.
    pub(super) fn by_likelihood(&self, hook: &dyn SiteHook) -> Result<Classification> {
        let (mut sums, mut means) = (Vec::new(), Vec::new());
        for example in self.dataset.examples() {
            let Some(truth) = self.labels.class_of(example) else { continue };
            let scores = self.label_log_probs(hook, example)?;
            let lengths = self.labels.completions.iter().map(|ids| ids.len().max(1) as f64);
            let normalized: Vec<f64> = scores.iter().zip(lengths).map(|(score, length)| score / length).collect();
            sums.push((truth, highest(&scores)));
            means.push((truth, highest(&normalized)));
        }
        let of = |pairs: &[(usize, Option<usize>)]| Scores::of(&self.labels.names, pairs);
        Ok(Classification { eval_by: EvalBy::Likelihood, scores: of(&sums), normalized: Some(of(&means)) })
    }

    /// The log-probability of every class's completion after an example's prompt, which is run once.
    pub(super) fn label_log_probs(&self, hook: &dyn SiteHook, example: &Example) -> BaseResult<Vec<f64>> {
        let action = Error::candle("computing label likelihoods");
        let mut cache = KvCache::new(self.models.trained.spec().num_layers);
        let prompt = Input::row(&example.prompt_ids)?;
        let hidden = self.models.trained.hidden_states(&prompt, Some(&mut cache), hook)?;
        let last = hidden.narrow(1, example.prompt_ids.len() - 1, 1).and_then(|h| h.squeeze(1)).map_err(&action)?;
        let logits =
            self.models.trained.logits(&last)?.to_dtype(DType::F64).and_then(|l| l.squeeze(0)?.to_vec1::<f64>());
        let logits = logits.map_err(&action)?;
        let highest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let normalizer = highest + logits.iter().map(|x| (x - highest).exp()).sum::<f64>().ln();
        let first = |ids: &Vec<u32>| ids.first().and_then(|id| logits.get(*id as usize)).map(|x| x - normalizer);
        let mut scores: Vec<f64> = self.labels.completions.iter().map(|ids| first(ids).unwrap_or(0.0)).collect();
        // labels of about equal length together, so that little is padding
        let mut order: Vec<usize> = (0..scores.len()).filter(|at| self.labels.completions[*at].len() > 1).collect();
        order.sort_by_key(|at| self.labels.completions[*at].len());
        for chunk in order.chunks(self.batch_size) {
            let completions: Vec<&[u32]> = chunk.iter().map(|at| self.labels.completions[*at].as_slice()).collect();
            let rest = self.rest_log_probs(hook, &cache, &completions)?;
            for (at, rest) in chunk.iter().zip(rest) {
                scores[*at] += rest;
            }
        }
        Ok(scores)
    }

    /// The log-probability of all tokens but the first of each completion, given the cached prompt.
    fn rest_log_probs(&self, hook: &dyn SiteHook, prompt: &KvCache, completions: &[&[u32]]) -> BaseResult<Vec<f64>> {
        let action = Error::candle("computing label likelihoods");
        let rows = completions.len();
        let seq = completions.iter().map(|ids| ids.len() - 1).max().unwrap_or(0);
        let (mut ids, mut mask) = (Vec::new(), Vec::new());
        let (mut positions, mut targets, mut group_of) = (Vec::new(), Vec::new(), Vec::new());
        for (row, completion) in completions.iter().enumerate() {
            let given = completion.len() - 1;
            ids.extend(completion[..given].iter().map(|id| i64::from(*id)).chain(std::iter::repeat_n(0, seq - given)));
            mask.extend(std::iter::repeat_n(1, prompt.len() + given).chain(std::iter::repeat_n(0, seq - given)));
            positions.extend((0..given).map(|at| (row * seq + at) as u32));
            targets.extend(&completion[1..]);
            group_of.extend(std::iter::repeat_n(row, given));
        }
        let mut cache = prompt.repeat(rows)?;
        let input = Input::new(rows, &ids, &mask, None)?;
        let hidden = self.models.trained.hidden_states(&input, Some(&mut cache), hook)?;
        let index = Tensor::new(positions.as_slice(), self.models.trained.device()).map_err(&action)?;
        let width = self.models.trained.spec().hidden_size;
        let hidden = hidden.reshape((rows * seq, width)).and_then(|h| h.index_select(&index, 0)).map_err(&action)?;
        let nll = self.models.trained.label_loss(&hidden, &targets)?.nll;
        let nll = nll.to_dtype(DType::F64).and_then(|nll| nll.to_vec1::<f64>()).map_err(&action)?;
        let mut log_probs = vec![0.0; rows];
        for (row, nll) in group_of.into_iter().zip(nll) {
            log_probs[row] -= nll;
        }
        Ok(log_probs)
    }
}

/// The place of the largest number, the first of equal ones.
fn highest(scores: &[f64]) -> Option<usize> {
    let better = |best: Option<(usize, f64)>, (at, score): (usize, &f64)| match best {
        Some((_, most)) if *score <= most => best,
        _ => Some((at, *score)),
    };
    scores.iter().enumerate().fold(None, better).map(|(at, _)| at)
}
