//! One optimizer step.

use std::collections::BTreeMap;
use std::time::Instant;

use candle_core::DType;
use serde::Serialize;

use super::parallel::sum_gradients;
use super::trainer::Trainer;
use super::{BatchGradients, ComputeType, Error, Result, batch_gradients, clip_gradients};
use crate::data::Batch;

/// One optimizer step, as it is logged and shown.
#[derive(Clone, Debug, Serialize)]
pub struct StepReport {
    /// Optimizer steps done.
    pub step: usize,
    /// Mean loss of the step, in nats: of a completion token, or of a pair with a preference objective.
    pub loss: f64,
    /// The rate that was used.
    pub learning_rate: f64,
    /// Global L2 norm of the gradients before clipping.
    pub grad_norm: f64,
    /// Tokens that went through the model, padding not counted.
    pub tokens: usize,
    /// Of these, tokens that carried loss.
    pub completion_tokens: usize,
    /// Wall time of the step.
    pub seconds: f64,
    /// The objective's further figures by name, means over the step: `rewards/margins`, ….
    #[serde(flatten)]
    pub figures: BTreeMap<String, f64>,
}

impl Trainer<'_> {
    /// Runs the batches of step `step`, counted from 0, and moves the adapter.
    pub(super) fn step(&mut self, step: usize) -> Result<StepReport> {
        let started = Instant::now();
        // of all processes, which agree in the order of the data without a word
        let (processes, rank) = self.group.map_or((1, 0), |group| (group.world_size(), group.rank()));
        let own = self.config.gradient_accumulation;
        let batches: Vec<Batch> = (0..own * processes).map(|_| self.next_batch()).collect();
        let units: usize = batches.iter().map(|batch| self.objective.units(batch)).sum();
        let mut gradients = BTreeMap::new();
        let mut figures = BTreeMap::<String, f64>::new();
        let mut losses = Vec::with_capacity(own);
        for (at, batch) in batches.iter().enumerate().skip(rank * own).take(own) {
            self.hook.begin_pass(self.pass_number(step, at, batches.len()));
            let of = BatchGradients {
                models: self.models(),
                hook: self.hook.as_ref(),
                vars: self.optimizer.vars(),
                objective: self.objective.as_ref(),
                checkpoint_activations: self.config.checkpoint_activations,
            };
            // the mean over all units of the step, however they fall into micro-batches
            let found = batch_gradients(&of, batch, 1.0 / units as f64, &mut gradients)?;
            losses.push(found.sum);
            for (name, sum) in &found.figures {
                *figures.entry((*name).into()).or_default() += sum / units as f64;
            }
        }
        // after the last of them, so that none waits for the device
        let sum = losses
            .iter()
            .map(|loss| Ok(loss.to_dtype(DType::F64)?.to_scalar::<f64>()? / units as f64))
            .sum::<candle_core::Result<f64>>();
        let mut loss = sum.map_err(Error::candle("reading the loss"))?;
        if let Some(group) = self.group {
            let mut numbers: Vec<f64> = std::iter::once(loss).chain(figures.values().copied()).collect();
            group.sum_f64(&mut numbers)?;
            loss = numbers.first().copied().unwrap_or(loss);
            figures.values_mut().zip(numbers.iter().skip(1)).for_each(|(figure, sum)| *figure = *sum);
            sum_gradients(group, self.optimizer.vars(), &mut gradients)?;
        }
        self.check_finite(step, "loss", loss)?;
        let max_norm = (self.config.max_grad_norm > 0.0).then_some(self.config.max_grad_norm);
        let grad_norm = clip_gradients(&mut gradients, max_norm).map_err(Error::candle("clipping gradients"))?;
        self.check_finite(step, "gradient norm", grad_norm)?;
        let ignorance = (self.models().trained.spec().vocab_size as f64).ln();
        if let Some(smoothed) = self.progress.loss.exploded(loss, ignorance) {
            return Err(self.diverged(step, "smoothed loss", smoothed));
        }
        let learning_rate = self.schedule.rate(step);
        self.optimizer.step(gradients, learning_rate).map_err(Error::candle("updating the adapter"))?;
        Ok(StepReport {
            step: step + 1,
            loss,
            learning_rate,
            grad_norm,
            tokens: batches.iter().map(Batch::tokens).sum(),
            completion_tokens: batches.iter().map(Batch::labelled).sum(),
            seconds: started.elapsed().as_secs_f64(),
            figures,
        })
    }

    /// A number for each micro-batch of the run, which a resumed run gives again.
    fn pass_number(&self, step: usize, batch: usize, batches: usize) -> u64 {
        let number = step as u64 * batches as u64 + batch as u64;
        self.config.seed.rotate_left(32) ^ number
    }

    fn check_finite(&self, step: usize, what: &'static str, value: f64) -> Result<()> {
        if value.is_finite() { Ok(()) } else { Err(self.diverged(step, what, value)) }
    }

    fn diverged(&self, step: usize, what: &'static str, value: f64) -> Error {
        Error::Diverged {
            step: step + 1,
            what,
            value,
            learning_rate: self.config.learning_rate,
            half: self.config.dtype == ComputeType::F16,
            checkpoint: self.folder.newest_checkpoint(),
        }
    }

    /// The next rows: examples, or pairs of them.
    fn next_batch(&mut self) -> Batch {
        self.train.batch(&self.sampler.next(&mut self.cursor))
    }
}
