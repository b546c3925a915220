//! Loss and accuracy on examples that are not trained on.

mod classification;
mod likelihood;
mod text;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use classification::{ClassScore, Classification, Confusion, Scores};

use super::objective::{CompletionLoss, Models, Objective};
use super::{Error, Result, batch_input, completion_loss};
use crate::base::SiteHook;
use crate::data::{Batch, Dataset, Example};
use classification::Labels;

/// How the class of a held-out record is predicted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum EvalBy {
    /// The greedy text: a class counts when greedy decoding gives its completion and nothing else.
    #[default]
    Text,
    /// The class whose completion is the most probable, out of all classes of training and held-out records.
    Likelihood,
}

impl std::str::FromStr for EvalBy {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "text" => Ok(Self::Text),
            "likelihood" => Ok(Self::Likelihood),
            other => Err(format!("`{other}` is neither text nor likelihood")),
        }
    }
}

/// Figures over a set of examples.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Number of examples, or of pairs.
    pub examples: usize,
    /// Mean negative log-likelihood of a completion token, in nats; with a preference objective, the mean loss of a pair.
    pub loss: f64,
    /// Part of the completion tokens that are the model's greedy choice; none for a preference objective.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_accuracy: Option<f64>,
    /// Part of the examples that come out right: whose whole completion, end token included, is what greedy decoding
    /// gives; whose class is the most probable (`eval_by = "likelihood"`); whose chosen completion has the higher reward.
    pub accuracy: f64,
    /// Further figures by name: `macro_f1` for classes, `rewards/…` for preferences.
    #[serde(flatten)]
    pub figures: BTreeMap<String, f64>,
    /// Everything about the classes, where the examples have some. Kept in `evaluation.json`, not in the metrics.
    #[serde(skip)]
    pub classification: Option<Classification>,
}

/// Evaluates adapters on one set of examples.
pub struct Evaluator<'a> {
    models: Models<'a>,
    objective: &'a dyn Objective,
    dataset: &'a Dataset,
    by: EvalBy,
    labels: Labels,
    batch_size: usize,
}

impl<'a> Evaluator<'a> {
    /// An evaluation of `dataset`, in batches of at most `batch_size` groups. Classes are those of `dataset` and of
    /// `train`.
    pub fn new(
        models: Models<'a>,
        objective: &'a dyn Objective,
        dataset: &'a Dataset,
        train: Option<&Dataset>,
        by: EvalBy,
        batch_size: usize,
    ) -> Self {
        let labels = Labels::of(std::iter::once(dataset).chain(train));
        Self { models, objective, dataset, by, labels, batch_size: batch_size.max(1) }
    }

    /// Evaluates `hook`.
    ///
    /// # Errors
    /// When an example does not fit the model.
    pub fn run(&self, hook: &dyn SiteHook) -> Result<Evaluation> {
        if self.objective.group_size() > 1 {
            return self.preferences(hook);
        }
        let Completions { mut evaluation, predictions } = self.completions(hook)?;
        if self.dataset.examples().iter().all(|example| example.label.is_some()) {
            let classification = match self.by {
                EvalBy::Text => self.by_text(hook, &predictions)?,
                EvalBy::Likelihood => self.by_likelihood(hook)?,
            };
            let [scores, normalized] = [Some(&classification.scores), classification.normalized.as_ref()];
            for (name, scores) in [("", scores), ("_normalized", normalized)] {
                let Some(scores) = scores else { continue };
                evaluation.figures.insert(format!("macro_f1{name}"), scores.macro_f1);
                if name.is_empty() {
                    evaluation.accuracy = scores.accuracy;
                } else {
                    evaluation.figures.insert(format!("accuracy{name}"), scores.accuracy);
                }
            }
            evaluation.classification = Some(classification);
        }
        Ok(evaluation)
    }

    /// Examples in groups that stay together, sorted by length so that little is padding, cut into batches. Rows that
    /// training packs are evaluated one by one.
    fn batches(&self, group: usize) -> Vec<Vec<usize>> {
        let examples = self.dataset.examples();
        let length = |start: &usize| examples.iter().skip(*start).take(group).map(Example::len).max();
        let mut starts: Vec<usize> = (0..examples.len() / group).map(|at| at * group).collect();
        starts.sort_by_key(length);
        let rows = |starts: &[usize]| starts.iter().flat_map(|start| *start..start + group).collect();
        starts.chunks(self.batch_size).map(rows).collect()
    }

    fn batch(&self, examples: &[usize]) -> Batch {
        let examples: Vec<&Example> = examples.iter().filter_map(|at| self.dataset.examples().get(*at)).collect();
        Batch::training(&examples, self.dataset.pad())
    }

    fn preferences(&self, hook: &dyn SiteHook) -> Result<Evaluation> {
        let (mut loss, mut pairs) = (0.0, 0);
        let mut figures = BTreeMap::<String, f64>::new();
        for rows in self.batches(self.objective.group_size()) {
            let batch = self.batch(&rows);
            let hidden = self.models.trained.hidden_states(&batch_input(&batch)?, None, hook)?;
            let found = self.objective.loss(self.models, &hidden, &batch)?;
            loss += found.value().map_err(Error::candle("reading the loss"))?;
            pairs += found.units;
            for (name, sum) in found.figures {
                *figures.entry(name.into()).or_default() += sum;
            }
        }
        let count = pairs.max(1) as f64;
        figures.values_mut().for_each(|figure| *figure /= count);
        let accuracy = figures.get("rewards/accuracies").copied().unwrap_or_default();
        Ok(Evaluation { examples: pairs, loss: loss / count, accuracy, figures, ..Evaluation::default() })
    }

    fn completions(&self, hook: &dyn SiteHook) -> Result<Completions> {
        let (mut loss, mut tokens, mut correct) = (0.0, 0, 0);
        let mut predictions = vec![Vec::new(); self.dataset.examples().len()];
        for rows in self.batches(1) {
            let batch = self.batch(&rows);
            let found = completion_loss(self.models.trained, hook, &batch_input(&batch)?, &batch.labels)?;
            let sum = found.sum.to_dtype(candle_core::DType::F64).and_then(|s| s.to_scalar::<f64>());
            loss += sum.map_err(Error::candle("reading the loss"))?;
            tokens += found.tokens();
            correct += found.correct_tokens();
            note_predictions(&found, &rows, &mut predictions);
        }
        let examples = self.dataset.examples();
        for (example, predicted) in examples.iter().zip(&mut predictions) {
            // labels in the prompt come first
            predicted.drain(..predicted.len().saturating_sub(example.completion_ids.len()));
        }
        let exact = examples.iter().zip(&predictions).filter(|(e, predicted)| e.completion_ids == **predicted).count();
        let share = |n: usize, of: usize| n as f64 / of.max(1) as f64;
        let evaluation = Evaluation {
            examples: predictions.len(),
            loss: loss / tokens.max(1) as f64,
            token_accuracy: Some(share(correct, tokens)),
            accuracy: share(exact, predictions.len()),
            ..Evaluation::default()
        };
        Ok(Completions { evaluation, predictions })
    }
}

struct Completions {
    evaluation: Evaluation,
    /// For each example the greedy prediction of each of its completion's tokens, given those before it.
    predictions: Vec<Vec<u32>>,
}

fn note_predictions(found: &CompletionLoss, rows: &[usize], predictions: &mut [Vec<u32>]) {
    for ((row, _), id) in found.hits.iter().zip(&found.predicted) {
        if let Some(ids) = rows.get(*row).and_then(|example| predictions.get_mut(*example)) {
            ids.push(*id);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use candle_core::{DType, Device, Tensor};

    use super::*;
    use crate::adapter::{Adapter, AdapterConfig};
    use crate::base::{Checkpoint, Decoder, Input};
    use crate::data::{DataConfig, Format, FormatOptions, Paths};
    use crate::train::Sft;

    /// The demo's model in float64 with an adapter of arbitrary numbers, and a few of its records.
    fn demo() -> (Decoder, Box<dyn SiteHook>, Dataset) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/demo");
        let checkpoint = Checkpoint::open(&folder.join("model")).unwrap();
        let tokenizer = checkpoint.tokenizer().unwrap();
        let format = Format::new(&tokenizer, checkpoint.spec().vocab_size, FormatOptions::default()).unwrap();
        let test = Paths::from(folder.join("test.jsonl"));
        let data = DataConfig { train: Some(test), per_class: Some(1), ..DataConfig::default() };
        let (dataset, _) = data.load(&format, 3, 256).unwrap();
        let decoder = Decoder::load(&checkpoint, DType::F64, &Device::Cpu).unwrap();
        let zeros = Adapter::zeros(AdapterConfig::prefix_plus(decoder.spec(), None)).unwrap();
        let fill = |(name, zeros): (&String, &Tensor)| {
            let values: Vec<f32> = (0..zeros.elem_count()).map(|i| 0.1 * (i as f32 * 1.37).sin()).collect();
            (name.clone(), Tensor::from_vec(values, zeros.shape(), &Device::Cpu).unwrap())
        };
        let adapter = Adapter::new(zeros.config().clone(), zeros.tensors().iter().map(fill).collect()).unwrap();
        let hook = adapter.hook(decoder.spec(), &Device::Cpu).unwrap();
        (decoder, hook, dataset)
    }

    /// The log-probability of every token after each position of a text, run whole and without a cache.
    fn log_softmax(decoder: &Decoder, hook: &dyn SiteHook, ids: &[u32]) -> Vec<Vec<f64>> {
        let logits = decoder.forward(&Input::row(ids).unwrap(), None, hook).unwrap().squeeze(0).unwrap();
        candle_nn::ops::log_softmax(&logits, 1).unwrap().to_vec2().unwrap()
    }

    #[test]
    fn label_likelihoods_are_those_of_whole_texts() {
        let (decoder, hook, dataset) = demo();
        for batch_size in [1, 3, 100] {
            let evaluator =
                Evaluator::new(Models::frozen(&decoder), &Sft, &dataset, None, EvalBy::Likelihood, batch_size);
            assert_eq!(evaluator.labels.names.len(), 8);
            for example in &dataset.examples()[..2] {
                let found = evaluator.label_log_probs(hook.as_ref(), example).unwrap();
                for (found, completion) in found.iter().zip(&evaluator.labels.completions) {
                    let whole = [example.prompt_ids.as_slice(), completion].concat();
                    let scores = log_softmax(&decoder, hook.as_ref(), &whole);
                    let first = example.prompt_ids.len() - 1;
                    let expected: f64 =
                        completion.iter().enumerate().map(|(at, id)| scores[first + at][*id as usize]).sum();
                    assert!((found - expected).abs() < 1e-9, "{found} vs {expected}");
                }
            }
        }
    }

    /// Classes whose completions are what greedy decoding gives for one example are found for that example.
    #[test]
    fn greedy_texts_name_classes() {
        let (decoder, hook, dataset) = demo();
        let mut evaluator = Evaluator::new(Models::frozen(&decoder), &Sft, &dataset, None, EvalBy::Text, 4);
        let greedy = |prompt: &[u32], tokens: usize| {
            let mut ids = prompt.to_vec();
            for _ in 0..tokens {
                let scores = log_softmax(&decoder, hook.as_ref(), &ids).pop().unwrap();
                let best = scores.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
                ids.push(best as u32);
            }
            ids.split_off(prompt.len())
        };
        let texts: Vec<Vec<u32>> = dataset.examples()[..3].iter().map(|e| greedy(&e.prompt_ids, 3)).collect();
        for (completion, text) in evaluator.labels.completions.iter_mut().zip(&texts) {
            completion.clone_from(text);
        }
        let classification = evaluator.run(hook.as_ref()).unwrap().classification.unwrap();
        let names = &evaluator.labels.names;
        for (at, example) in dataset.examples()[..3].iter().enumerate() {
            let truth = example.label.clone().unwrap();
            let named = evaluator.labels.completions.iter().position(|c| *c == texts[at]).map(|c| names[c].clone());
            let found = classification.scores.confusion.iter().filter(|cell| cell.truth == truth);
            assert_eq!(found.map(|cell| cell.predicted.clone()).collect::<Vec<_>>(), [named], "{truth}");
        }
        let counted: usize = classification.scores.confusion.iter().map(|cell| cell.count).sum();
        assert_eq!(counted, dataset.len());
    }
}
