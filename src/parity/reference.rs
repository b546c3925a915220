//! The reference: the model in float64 over the cases, which all others replay.

use ndarray::Array2;

use super::cause::Reading;
use super::figures::{first_non_finite, largest_abs};
use super::run::{CandleRunner, Script, record, replay};
use super::{Case, Error, Figures, Result};
use crate::base::{Decoder, DecoderSpec, SiteHook};

/// The version in Cargo.lock; a test holds them together.
pub(super) const CANDLE_VERSION: &str = "0.11.1";

/// A model as candle runs it.
#[derive(Clone, Copy)]
pub struct Model<'a> {
    /// The base model.
    pub decoder: &'a Decoder,
    /// What acts at its attention sites; [`NoHook`](crate::base::NoHook) for the base model itself.
    pub hook: &'a dyn SiteHook,
}

/// The cases with the reference's logits. Holds no model: what computed it can be dropped.
#[derive(Debug)]
pub struct Reference {
    /// The model; none where the reference is a graph.
    pub(super) spec: Option<DecoderSpec>,
    pub(super) ports: Ports,
    pub(super) precision: &'static str,
    /// What it is, in words.
    pub(super) source: String,
    pub(super) cases: Vec<ReferenceCase>,
}

/// What is known of the graphs that are judged.
#[derive(Clone, Copy, Debug)]
pub struct Ports {
    /// Tokens that have a logit.
    pub vocab: usize,
    /// Width of a head, for graphs that do not declare the last dimension of their cache.
    pub head_dim: Option<usize>,
    /// Terms of the longest dot product.
    pub longest_dot_product: usize,
}

impl Ports {
    /// Those of a model's graph.
    pub fn of(spec: &DecoderSpec) -> Self {
        Self {
            vocab: spec.vocab_size,
            head_dim: Some(spec.attention.head_dim),
            longest_dot_product: spec.longest_dot_product(),
        }
    }
}

#[derive(Debug)]
pub(super) struct ReferenceCase {
    pub(super) case: Case,
    pub(super) script: Script,
    /// `[spots, vocab]`.
    pub(super) logits: Array2<f64>,
    pub(super) largest: f64,
}

impl Reference {
    /// Runs the model, in float64 where it fits, over the cases.
    ///
    /// # Errors
    /// When a case does not fit the model, or the model fails or gives a logit that is not finite.
    pub fn compute(model: Model<'_>, cases: Vec<Case>) -> Result<Self> {
        Self::compute_each(&[model], cases)
    }

    /// The same with several models, of which each row of a case names [its own](Case::models).
    ///
    /// # Errors
    /// As [`compute`](Self::compute), and when a case names a model that is not given.
    pub fn compute_each(models: &[Model<'_>], cases: Vec<Case>) -> Result<Self> {
        let Some(first) = models.first() else { return Err(Error::Nothing) };
        let spec = first.decoder.spec().clone();
        let mut runner = CandleRunner::new(models);
        let cases = cases.into_iter().map(|case| ReferenceCase::compute(&mut runner, case, &spec));
        let (precision, ports) = (first.decoder.dtype().as_str(), Ports::of(&spec));
        Ok(Self { cases: cases.collect::<Result<_>>()?, precision, source: candle(precision), ports, spec: Some(spec) })
    }

    /// The logits of the same model in another precision, by case.
    ///
    /// # Errors
    /// When it is another model, or fails.
    pub fn replay(&self, model: Model<'_>) -> Result<Vec<Array2<f64>>> {
        self.replay_each(&[model])
    }

    /// The same for [several models](Self::compute_each).
    ///
    /// # Errors
    /// As [`replay`](Self::replay).
    pub fn replay_each(&self, models: &[Model<'_>]) -> Result<Vec<Array2<f64>>> {
        self.replay_numbered(models, &(0..self.cases.len()).collect::<Vec<_>>())
    }

    /// The same in some cases, by number.
    pub(super) fn replay_numbered(&self, models: &[Model<'_>], cases: &[usize]) -> Result<Vec<Array2<f64>>> {
        self.replay_some(models, |model| self.spec.as_ref() == Some(model.decoder.spec()), Reading::Faithful, cases)
    }

    /// The logits of some cases, by number, of models that must be `right`.
    pub(super) fn replay_some(
        &self,
        models: &[Model<'_>],
        right: impl Fn(&Model<'_>) -> bool,
        reading: Reading,
        cases: &[usize],
    ) -> Result<Vec<Array2<f64>>> {
        if !models.iter().all(right) {
            return Err(Error::Option { option: "model", why: "is not the reference's model".into() });
        }
        let mut runner = CandleRunner::reading(models, reading);
        let cases = cases.iter().filter_map(|number| self.cases.get(*number));
        cases.map(|case| replay(&mut runner, &case.script, self.ports.vocab)).collect()
    }
}

/// What a reference by candle is.
pub(super) fn candle(precision: &str) -> String {
    format!("the model in candle {CANDLE_VERSION}, {precision}")
}

impl ReferenceCase {
    fn compute(runner: &mut CandleRunner<'_>, case: Case, spec: &DecoderSpec) -> Result<Self> {
        case.check_fits(spec)?;
        let (script, logits) = record(runner, &case, spec.vocab_size)?;
        Self::new(case, script, logits)
    }

    pub(super) fn new(case: Case, script: Script, logits: Array2<f64>) -> Result<Self> {
        if let Some(what) = first_non_finite(&logits, &script.spots) {
            return Err(Error::Reference { case: case.name().into(), what });
        }
        let largest = largest_abs(&logits);
        Ok(Self { case, script, logits, largest })
    }

    /// A run's distance, or why it has none.
    pub(super) fn figures(&self, logits: &Array2<f64>) -> std::result::Result<Figures, String> {
        if let Some(what) = first_non_finite(logits, &self.script.spots) {
            return Err(format!("{what} is not finite"));
        }
        Figures::of(&self.logits, logits, &self.script.spots, &self.script.next)
            .ok_or_else(|| "there are no logits".into())
    }
}
