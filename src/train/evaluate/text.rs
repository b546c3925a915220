//! Classes by the greedy text.

use super::classification::{Classification, Labels, Scores};
use super::{EvalBy, Evaluator};
use crate::base::{Decoder, Error, Input, KvCache, SiteHook};
use crate::train::Result;

impl Evaluator<'_> {
    /// Predicts each example's class. `predictions` are greedy tokens under teacher forcing: up to the first that is not
    /// the label's they are what greedy decoding gives, and mostly no label begins so. Only where one does is the text
    /// decoded further.
    pub(super) fn by_text(&self, hook: &dyn SiteHook, predictions: &[Vec<u32>]) -> Result<Classification> {
        let mut pairs = Vec::new();
        for (example, predicted) in self.dataset.examples().iter().zip(predictions) {
            let Some(truth) = self.labels.class_of(example) else { continue };
            let agreed = predicted.iter().zip(&example.completion_ids).take_while(|(a, b)| a == b).count();
            let class = if agreed == example.completion_ids.len() {
                Some(truth)
            } else {
                let begun = predicted.get(..=agreed).unwrap_or(predicted).to_vec();
                greedy_class(self.models.trained, hook, &self.labels, &example.prompt_ids, begun)?
            };
            pairs.push((truth, class));
        }
        let scores = Scores::of(&self.labels.names, &pairs);
        Ok(Classification { eval_by: EvalBy::Text, scores, normalized: None })
    }
}

/// The class whose completion greedy decoding gives, `text` being what it has given so far.
fn greedy_class(
    decoder: &Decoder,
    hook: &dyn SiteHook,
    labels: &Labels,
    prompt: &[u32],
    mut text: Vec<u32>,
) -> Result<Option<usize>> {
    let mut cache = KvCache::new(decoder.spec().num_layers);
    let mut next = [prompt, &text].concat();
    let mut seen = 0;
    loop {
        if let Some(class) = labels.named_by(&text) {
            return Ok(Some(class));
        }
        if !labels.any_starts_with(&text) {
            return Ok(None);
        }
        seen += next.len();
        let ids: Vec<i64> = next.iter().map(|id| i64::from(*id)).collect();
        let input = Input::new(1, &ids, &vec![1; seen], None)?;
        let hidden = decoder.hidden_states(&input, Some(&mut cache), hook)?;
        let action = Error::candle("decoding greedily");
        let last = hidden.narrow(1, next.len() - 1, 1).and_then(|h| h.squeeze(1)).map_err(&action)?;
        let id: Vec<u32> = decoder.logits(&last)?.argmax(1).and_then(|id| id.to_vec1()).map_err(&action)?;
        text.extend(&id);
        next = id;
    }
}
