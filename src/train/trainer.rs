//! The training loop.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::DType;
use serde::Serialize;

use super::optimizer::accumulate;
use super::run_folder::State;
use super::{
    AdamW, Error, Evaluation, Result, RunFolder, Schedule, TrainConfig, batch_input, clip_gradients, completion_loss,
    evaluate,
};
use crate::adapter::Adapter;
use crate::base::{Decoder, SiteHook};
use crate::data::{Batch, Cursor, Dataset, Example, Sampler};

/// One optimizer step, as it is logged and shown.
#[derive(Clone, Debug, Serialize)]
pub struct StepReport {
    /// Optimizer steps done.
    pub step: usize,
    /// Mean loss of the step's completion tokens, in nats.
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
}

/// Is told how a run goes.
pub trait Observer {
    /// A step is done, out of `total`.
    fn step(&mut self, report: &StepReport, total: usize);
    /// The held-out part was evaluated.
    fn evaluation(&mut self, step: usize, evaluation: &Evaluation);
    /// A checkpoint was written.
    fn checkpoint(&mut self, path: &Path);
}

/// Hears nothing.
#[derive(Clone, Copy, Debug)]
pub struct Silent;

impl Observer for Silent {
    fn step(&mut self, _: &StepReport, _: usize) {}
    fn evaluation(&mut self, _: usize, _: &Evaluation) {}
    fn checkpoint(&mut self, _: &Path) {}
}

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The trained adapter, on the CPU.
    pub adapter: Adapter,
    /// Optimizer steps done in all.
    pub steps: usize,
    /// Mean loss of the last step.
    pub loss: f64,
    /// The held-out part before the first step of a new run.
    pub before: Option<Evaluation>,
    /// The held-out part after the last step.
    pub after: Option<Evaluation>,
}

/// A training run: what is trained, on what, how, and where it is written.
///
/// What it computes follows from its seed, data and options: a checkpoint holds the adapter, the optimizer's moments, the
/// step and the data cursor, and a run that goes on from it ends in the same bytes.
pub struct Trainer<'a> {
    decoder: &'a Decoder,
    /// Of the adapter's own tensors, where they are the model's.
    own: Option<Decoder>,
    config: TrainConfig,
    train: &'a Dataset,
    held_out: Option<&'a Dataset>,
    folder: &'a RunFolder,
    adapter: Adapter,
    hook: Box<dyn SiteHook>,
    optimizer: AdamW,
    schedule: Schedule,
    data_hash: String,
    start: usize,
    sampler: Sampler,
    cursor: Cursor,
}

impl<'a> Trainer<'a> {
    /// Prepares a run from `adapter`, or from the folder's newest checkpoint where it has one.
    ///
    /// # Errors
    /// When the options make no sense, nothing is left to train on, the adapter does not fit the model, or a checkpoint
    /// belongs to another run.
    pub fn new(
        decoder: &'a Decoder,
        adapter: &Adapter,
        config: TrainConfig,
        train: &'a Dataset,
        held_out: Option<&'a Dataset>,
        folder: &'a RunFolder,
    ) -> Result<Self> {
        config.check()?;
        if train.examples().is_empty() {
            return Err(Error::NoExamples);
        }
        let data_hash = hash_of(train.examples());
        let saved = folder.load()?;
        if let Some(saved) = &saved {
            check_resumable(
                &saved.path,
                &saved.state,
                &config,
                &data_hash,
                saved.adapter.config() == adapter.config(),
            )?;
        }
        let start_from = saved.as_ref().map_or(adapter, |s| &s.adapter);
        let (adapter, vars) = start_from.trainable(DType::F32, decoder.device())?;
        let hook = adapter.hook(decoder.spec(), decoder.device())?;
        let own = adapter.decoder(decoder.spec(), decoder.dtype())?;
        let mut optimizer = AdamW::new(config.adamw, vars).map_err(Error::candle("making the optimizer"))?;
        let (mut start, mut cursor) = (0, Cursor::default());
        if let Some(saved) = saved {
            (start, cursor) = (saved.state.step, saved.state.cursor);
            if optimizer.restore(&saved.moments, start).is_none() {
                let why = "its optimizer state does not fit the adapter".into();
                return Err(Error::Resume { path: saved.path, why });
            }
            folder.rewind_metrics(Some(start))?;
        } else {
            folder.rewind_metrics(None)?;
        }
        let schedule = config.schedule(config.total_steps(train.len()));
        let sampler = Sampler::new(train.len(), config.batch_size, config.seed);
        Ok(Self {
            decoder,
            own,
            config,
            train,
            held_out,
            folder,
            adapter,
            hook,
            optimizer,
            schedule,
            data_hash,
            start,
            sampler,
            cursor,
        })
    }

    /// Optimizer steps of the whole run.
    pub fn total_steps(&self) -> usize {
        self.schedule.total_steps
    }

    /// Steps that a checkpoint has already done.
    pub fn start_step(&self) -> usize {
        self.start
    }

    /// Trains to the end and returns the adapter.
    ///
    /// # Errors
    /// When the loss or gradient is not finite, or a file cannot be written.
    pub fn run(mut self, observer: &mut dyn Observer) -> Result<Outcome> {
        let total = self.schedule.total_steps;
        let before = if self.start == 0 { self.evaluate_held_out(0, observer)? } else { None };
        let mut after = None;
        let mut loss = f64::NAN;
        for step in self.start..total {
            let report = self.step(step)?;
            loss = report.loss;
            self.folder.log(&report)?;
            observer.step(&report, total);
            let done = step + 1;
            if done == total || is_due(done, self.config.eval_every) {
                after = self.evaluate_held_out(done, observer)?;
            }
            if done < total && is_due(done, self.config.save_every) {
                observer.checkpoint(&self.save(done)?);
            }
        }
        let adapter = Adapter::new(self.adapter.config().clone(), self.adapter.tensors().clone())?;
        Ok(Outcome { adapter, steps: total, loss, before, after })
    }

    fn save(&self, step: usize) -> Result<PathBuf> {
        let state = State { step, cursor: self.cursor, data: self.data_hash.clone(), config: self.config.clone() };
        self.folder.save(&self.adapter, &self.optimizer, &state)
    }

    fn evaluate_held_out(&self, step: usize, observer: &mut dyn Observer) -> Result<Option<Evaluation>> {
        let Some(held_out) = self.held_out else { return Ok(None) };
        let evaluation = evaluate(self.decoder(), self.hook.as_ref(), held_out, self.config.batch_size * 4)?;
        #[derive(Serialize)]
        struct Line {
            step: usize,
            held_out: Evaluation,
        }
        self.folder.log(&Line { step, held_out: evaluation })?;
        observer.evaluation(step, &evaluation);
        Ok(Some(evaluation))
    }

    fn step(&mut self, step: usize) -> Result<StepReport> {
        let started = Instant::now();
        let batches: Vec<Batch> = (0..self.config.gradient_accumulation).map(|_| self.next_batch()).collect();
        let completion_tokens: usize = batches.iter().map(Batch::labelled).sum();
        let mut gradients = BTreeMap::new();
        let mut loss = 0.0;
        for batch in &batches {
            let found = completion_loss(self.decoder(), self.hook.as_ref(), &batch_input(batch)?, &batch.labels)?;
            // the mean over all completion tokens of the step, however they fall into micro-batches
            let mean = (found.sum / completion_tokens as f64).map_err(Error::candle("computing the loss"))?;
            let value = mean.to_dtype(DType::F64).and_then(|l| l.to_scalar::<f64>());
            loss += value.map_err(Error::candle("reading the loss"))?;
            let store = mean.backward().map_err(Error::candle("computing gradients"))?;
            accumulate(&mut gradients, self.optimizer.vars(), &store).map_err(Error::candle("adding gradients"))?;
        }
        self.check_finite(step, "loss", loss)?;
        let max_norm = (self.config.max_grad_norm > 0.0).then_some(self.config.max_grad_norm);
        let grad_norm = clip_gradients(&mut gradients, max_norm).map_err(Error::candle("clipping gradients"))?;
        self.check_finite(step, "gradient norm", grad_norm)?;
        let learning_rate = self.schedule.rate(step);
        self.optimizer.step(&gradients, learning_rate).map_err(Error::candle("updating the adapter"))?;
        let tokens = batches.iter().map(Batch::tokens).sum();
        let seconds = started.elapsed().as_secs_f64();
        Ok(StepReport { step: step + 1, loss, learning_rate, grad_norm, tokens, completion_tokens, seconds })
    }

    fn decoder(&self) -> &Decoder {
        self.own.as_ref().unwrap_or(self.decoder)
    }

    fn check_finite(&self, step: usize, what: &'static str, value: f64) -> Result<()> {
        if value.is_finite() {
            return Ok(());
        }
        Err(Error::Diverged { step: step + 1, what, value, learning_rate: self.config.learning_rate })
    }

    fn next_batch(&mut self) -> Batch {
        self.train.batch(&self.sampler.next(&mut self.cursor))
    }
}

fn is_due(step: usize, every: usize) -> bool {
    every > 0 && step.is_multiple_of(every)
}

fn hash_of(examples: &[Example]) -> String {
    let bytes: Vec<u8> = examples
        .iter()
        .flat_map(|e| e.prompt_ids.iter().chain([&u32::MAX]).chain(&e.completion_ids).chain([&u32::MAX]))
        .flat_map(|id| id.to_le_bytes())
        .collect();
    crate::files::sha256_bytes(&bytes)
}

fn check_resumable(path: &Path, state: &State, config: &TrainConfig, data: &str, same_adapter: bool) -> Result<()> {
    let differs = |what: &str| Err(Error::Resume { path: path.into(), why: format!("{what} differs from the run's") });
    if state.data != data {
        return differs("the training data (or its tokenisation)");
    }
    if !same_adapter {
        return differs("the adapter's configuration");
    }
    let fields = |c: &TrainConfig| serde_json::to_value(c).unwrap_or_default();
    if let (serde_json::Value::Object(old), serde_json::Value::Object(new)) = (fields(&state.config), fields(config))
        && let Some((field, _)) = old.iter().find(|(k, v)| !PACE_ONLY.contains(&k.as_str()) && new.get(*k) != Some(*v))
    {
        return differs(&format!("option `{field}`"));
    }
    Ok(())
}

/// Options that change when something is written or measured, not what is computed.
const PACE_ONLY: [&str; 2] = ["eval_every", "save_every"];
