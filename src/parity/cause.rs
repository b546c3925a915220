//! Why a graph is another function than its model: what exporters and operators are known to leave out or read otherwise, each
//! tried in candle and recognised by the graph's own logits.

use ndarray::Array2;

use super::figures::{Figures, first_non_finite};
use super::reference::ReferenceCase;
use super::{Model, Reference, Result};
use crate::base::DecoderSpec;

/// How a graph reads the attention mask.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Reading {
    /// Padding is hidden, and positions are counted from it.
    #[default]
    Faithful,
    /// Padding is hidden and has positions as tokens do.
    ByColumn,
    /// Padding is a token like others, but for positions.
    Unmasked,
    /// Padding is a token like others.
    UnmaskedByColumn,
}

impl Reading {
    pub(super) fn hides_padding(self) -> bool {
        matches!(self, Self::Faithful | Self::ByColumn)
    }

    pub(super) fn is_by_column(self) -> bool {
        matches!(self, Self::ByColumn | Self::UnmaskedByColumn)
    }
}

/// What is done to a model.
type Change = fn(&mut DecoderSpec);

/// Computes the logits of a suspect in some cases.
pub(super) type Compute<'a> = dyn FnMut(&Suspect, &[usize]) -> Result<Vec<Array2<f64>>> + 'a;

/// Another function that a graph may be.
#[derive(Clone, Debug, PartialEq)]
pub struct Suspect {
    /// What sets it apart, to follow "the graph".
    pub text: String,
    /// The model that it is.
    pub spec: DecoderSpec,
    pub(super) reading: Reading,
}

impl Suspect {
    /// All that are known for a model, the simplest first.
    pub fn all(spec: &DecoderSpec) -> Vec<Self> {
        let reading = |reading, text: &str| Self { text: text.into(), spec: spec.clone(), reading };
        let mut all = vec![
            reading(Reading::ByColumn, "counts positions by column, padding included"),
            reading(Reading::Unmasked, "does not hide padding"),
            reading(Reading::UnmaskedByColumn, "ignores the attention mask"),
        ];
        let changed = |text: String, change: &dyn Fn(&mut DecoderSpec)| {
            let mut spec = spec.clone();
            change(&mut spec);
            Self { text, spec, reading: Reading::Faithful }
        };
        let set_window = |spec: &mut DecoderSpec, by: Option<isize>| {
            for layer in &mut spec.layers {
                layer.window = layer.window.zip(by).map(|(window, by)| window.saturating_add_signed(by));
            }
        };
        let mut drops: Vec<(String, Change)> = Vec::new();
        if let Some(window) = spec.layers.iter().find_map(|layer| layer.window) {
            drops.push((format!("the sliding window of {window} tokens"), |spec| {
                spec.layers.iter_mut().for_each(|layer| layer.window = None);
            }));
            for (by, what) in [(1, "longer"), (-1, "shorter")] {
                let text = format!("has a sliding window that is one token {what} than {window}");
                all.push(changed(text, &|spec| set_window(spec, Some(by))));
            }
        }
        if let Some(cap) = spec.attention.softcap {
            drops.push((format!("the soft cap of {cap} on the scores"), |spec| spec.attention.softcap = None));
        }
        if let Some(cap) = spec.head.softcap {
            drops.push((format!("the soft cap of {cap} on the logits"), |spec| spec.head.softcap = None));
        }
        // Every set of them, single ones first.
        let mut sets: Vec<usize> = (1..1usize << drops.len()).collect();
        sets.sort_by_key(|set| set.count_ones());
        for set in sets {
            let chosen: Vec<_> =
                drops.iter().enumerate().filter(|(bit, _)| set >> bit & 1 == 1).map(|(_, d)| d).collect();
            let names: Vec<&str> = chosen.iter().map(|(name, _)| name.as_str()).collect();
            let text = format!("leaves out {}", names.join(" and "));
            all.push(changed(text, &|spec| chosen.iter().for_each(|(_, drop)| drop(spec))));
        }
        all
    }
}

/// A graph's logits in a case in which it failed.
#[derive(Clone, Debug)]
pub(super) struct Failed {
    pub(super) case: usize,
    pub(super) logits: Array2<f64>,
    pub(super) allowed: f64,
    /// From the reference.
    pub(super) distance: f64,
}

impl Reference {
    /// The logits of a suspect over the tokens of some cases, by their numbers.
    ///
    /// # Errors
    /// When a model is not the suspect's, or fails.
    pub fn suspected(&self, models: &[Model<'_>], suspect: &Suspect, cases: &[usize]) -> Result<Vec<Array2<f64>>> {
        let of_suspect = |model: &Model| *model.decoder.spec() == suspect.spec;
        self.replay_some(models, of_suspect, suspect.reading, cases)
    }
}

/// What part of its distance from the reference a graph may keep from a suspect that explains it: the budget is the model's
/// own, and a model without a soft cap or a window rounds otherwise.
const UNEXPLAINED: f64 = 1e-3;

/// The first suspect whose logits a graph's are, wherever it failed. `logits` computes them for some cases.
pub(super) fn recognise(
    spec: &DecoderSpec,
    cases: &[ReferenceCase],
    failed: &[Failed],
    logits: &mut Compute<'_>,
) -> Result<Option<String>> {
    let is_near = |failed: &Failed, suspected: &Array2<f64>| {
        let Some(script) = cases.get(failed.case).map(|case| &case.script) else { return false };
        let finite = [suspected, &failed.logits].iter().all(|logits| first_non_finite(logits, &script.spots).is_none());
        finite
            && Figures::of(suspected, &failed.logits, &script.spots, &script.next)
                .is_some_and(|figures| figures.max_abs <= failed.allowed.max(UNEXPLAINED * failed.distance))
    };
    for suspect in Suspect::all(spec) {
        // One case refutes most of them.
        let mut fits = true;
        for part in [failed.get(..1), failed.get(1..)].into_iter().flatten().filter(|part| !part.is_empty()) {
            let numbers: Vec<usize> = part.iter().map(|failed| failed.case).collect();
            fits =
                fits && part.iter().zip(logits(&suspect, &numbers)?).all(|(failed, logits)| is_near(failed, &logits));
            if !fits {
                break;
            }
        }
        if fits && !failed.is_empty() {
            return Ok(Some(suspect.text));
        }
    }
    Ok(None)
}
