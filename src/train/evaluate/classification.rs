//! Predicted classes against the true ones.

use std::collections::BTreeMap;

use serde::Serialize;

use super::EvalBy;
use crate::data::{Dataset, Example};

/// The classes of a task: names as the records spell them, and the tokens that a model answers with.
#[derive(Clone, Debug)]
pub(super) struct Labels {
    pub(super) names: Vec<String>,
    /// End token included.
    pub(super) completions: Vec<Vec<u32>>,
}

impl Labels {
    /// Every class of the datasets, sorted by name.
    pub(super) fn of<'a>(datasets: impl Iterator<Item = &'a Dataset>) -> Self {
        let mut found = BTreeMap::new();
        for example in datasets.flat_map(Dataset::examples) {
            if let Some(label) = &example.label {
                found.entry(label.clone()).or_insert_with(|| example.completion_ids.clone());
            }
        }
        let (names, completions) = found.into_iter().unzip();
        Self { names, completions }
    }

    /// The class of an example.
    pub(super) fn class_of(&self, example: &Example) -> Option<usize> {
        self.names.binary_search(example.label.as_ref()?).ok()
    }

    /// The class whose completion this is.
    pub(super) fn named_by(&self, completion: &[u32]) -> Option<usize> {
        self.completions.iter().position(|ids| ids == completion)
    }

    /// Whether some class's completion begins with `ids`.
    pub(super) fn any_starts_with(&self, ids: &[u32]) -> bool {
        self.completions.iter().any(|completion| completion.starts_with(ids))
    }
}

/// How well classes are predicted.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Classification {
    /// How they were predicted.
    pub eval_by: EvalBy,
    /// By the greedy text, or by the summed log-probability of each class's completion.
    #[serde(flatten)]
    pub scores: Scores,
    /// By the mean log-probability of a completion's tokens, which does not favour short labels; for `likelihood` only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub normalized: Option<Scores>,
}

/// Figures of one set of predictions.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Scores {
    /// Part of the examples whose class was predicted.
    pub accuracy: f64,
    /// Mean F1 of the classes that occur among true or predicted ones. A text that is no label is no class: it counts
    /// against the recall of the true one.
    pub macro_f1: f64,
    /// Each of these classes.
    pub classes: Vec<ClassScore>,
    /// How often each class was taken for each other and for itself; pairs that do not occur are left out.
    pub confusion: Vec<Confusion>,
}

/// One class. Precision, recall and F1 are 0 where they would divide by 0.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ClassScore {
    /// Its name.
    pub label: String,
    /// Examples of it.
    pub support: usize,
    /// Part of its predictions that are right.
    pub precision: f64,
    /// Part of its examples that were found.
    pub recall: f64,
    /// Their harmonic mean.
    pub f1: f64,
}

/// A cell of the confusion matrix.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Confusion {
    /// The true class.
    pub truth: String,
    /// The predicted class; none for a text that is no label.
    pub predicted: Option<String>,
    /// Number of examples.
    pub count: usize,
}

impl Scores {
    /// Scores predictions, each with the true class, both as places in `names`.
    pub(super) fn of(names: &[String], predictions: &[(usize, Option<usize>)]) -> Self {
        let mut counts = BTreeMap::<(usize, Option<usize>), usize>::new();
        for prediction in predictions {
            *counts.entry(*prediction).or_default() += 1;
        }
        let sum = |keep: &dyn Fn(usize, Option<usize>) -> bool| -> usize {
            counts.iter().filter(|((truth, predicted), _)| keep(*truth, *predicted)).map(|(_, n)| n).sum()
        };
        let share = |n: usize, of: usize| if of == 0 { 0.0 } else { n as f64 / of as f64 };
        let class = |(class, name): (usize, &String)| {
            let hits = sum(&|truth, predicted| truth == class && predicted == Some(class));
            let support = sum(&|truth, _| truth == class);
            let claimed = sum(&|_, predicted| predicted == Some(class));
            (support + claimed > 0).then(|| ClassScore {
                label: name.clone(),
                support,
                precision: share(hits, claimed),
                recall: share(hits, support),
                f1: share(2 * hits, support + claimed),
            })
        };
        let classes: Vec<ClassScore> = names.iter().enumerate().filter_map(class).collect();
        let name = |class: usize| names.get(class).cloned().unwrap_or_default();
        let cell = |((truth, predicted), count): (&(usize, Option<usize>), &usize)| Confusion {
            truth: name(*truth),
            predicted: predicted.map(name),
            count: *count,
        };
        Self {
            accuracy: share(sum(&|truth, predicted| predicted == Some(truth)), predictions.len()),
            macro_f1: classes.iter().map(|class| class.f1).sum::<f64>() / classes.len().max(1) as f64,
            confusion: counts.iter().map(cell).collect(),
            classes,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    /// `fixtures/objectives/make.py`.
    #[test]
    fn scores_are_those_of_scikit_learn() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/objectives/objectives.json");
        let fixture: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let fixture = &fixture["classification"];
        let numbers = |name: &str| -> Vec<i64> {
            fixture[name].as_array().unwrap().iter().map(|n| n.as_i64().unwrap()).collect()
        };
        let pairs: Vec<(usize, Option<usize>)> = numbers("truth")
            .into_iter()
            .zip(numbers("predicted"))
            .map(|(truth, predicted)| (truth as usize, usize::try_from(predicted).ok()))
            .collect();
        let names: Vec<String> = (0..7).map(|class| format!("class {class}")).collect(); // two of them do not occur
        let scores = Scores::of(&names, &pairs);
        let close = |found: f64, expected: &Value| (found - expected.as_f64().unwrap()).abs() < 1e-12;
        assert!(close(scores.accuracy, &fixture["accuracy"]));
        assert!(close(scores.macro_f1, &fixture["macro_f1"]));
        let f1 = fixture["f1"].as_array().unwrap();
        assert_eq!(scores.classes.len(), f1.len());
        assert!(scores.classes.iter().zip(f1).all(|(class, f1)| close(class.f1, f1)));
        for (truth, row) in fixture["confusion"].as_array().unwrap().iter().enumerate() {
            for (predicted, count) in row.as_array().unwrap().iter().enumerate() {
                let is_it = |c: &&Confusion| c.truth == names[truth] && c.predicted.as_ref() == Some(&names[predicted]);
                let found = scores.confusion.iter().find(is_it).map_or(0, |c| c.count);
                assert_eq!(found as u64, count.as_u64().unwrap(), "{truth} taken for {predicted}");
            }
        }
        assert_eq!(scores.confusion.iter().filter(|c| c.predicted.is_none()).map(|c| c.count).sum::<usize>(), 2);
    }
}
