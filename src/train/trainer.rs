//! The training loop.

use std::path::Path;

use candle_core::DType;
use serde::Serialize;

use super::checkpoint::{Saved, State};
use super::control::Progress;
use super::curves;
use super::{
    AdamW, Best, ComputeType, Error, Evaluation, Evaluator, EventWriter, Fingerprint, Group, Models, Objective, Result,
    RunFolder, Schedule, StepReport, TrainConfig,
};
use crate::adapter::{Adapter, AdapterConfig, Method};
use crate::base::{Decoder, DecoderSpec, SiteHook};
use crate::data::{Cursor, Dataset, Example, Sampler};

/// Is told how a run goes, and may end it.
pub trait Observer {
    /// A step is done, out of `total`.
    fn step(&mut self, report: &StepReport, total: usize);
    /// The held-out part was evaluated.
    fn evaluation(&mut self, step: usize, evaluation: &Evaluation);
    /// A checkpoint was written.
    fn checkpoint(&mut self, path: &Path);
    /// Whether the run is to stop; asked after every step. A checkpoint is then written.
    fn should_stop(&self) -> bool {
        false
    }
}

/// Hears nothing.
#[derive(Clone, Copy, Debug)]
pub struct Silent;

impl Observer for Silent {
    fn step(&mut self, _: &StepReport, _: usize) {}
    fn evaluation(&mut self, _: usize, _: &Evaluation) {}
    fn checkpoint(&mut self, _: &Path) {}
}

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ended {
    /// All steps are done.
    Completed,
    /// The held-out figure did not get better any more.
    Exhausted,
    /// The observer wanted it; a checkpoint of the last step is there, unless no step was done.
    Stopped,
}

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The trained adapter, on the CPU; the best one with `load_best_at_end`.
    pub adapter: Adapter,
    /// Optimizer steps done in all.
    pub steps: usize,
    /// Mean loss of the last step.
    pub loss: f64,
    /// The held-out part before the first step.
    pub before: Option<Evaluation>,
    /// The held-out part after the last step.
    pub after: Option<Evaluation>,
    /// The best evaluation, where one is watched.
    pub best: Option<Best>,
    /// Why it ended.
    pub ended: Ended,
}

/// What a run starts from.
pub struct Inputs<'a> {
    /// The frozen model.
    pub decoder: &'a Decoder,
    /// Which model that is; checked when a run is resumed.
    pub base: Fingerprint,
    /// The adapter at the start.
    pub adapter: &'a Adapter,
    /// The options.
    pub config: TrainConfig,
    /// What is trained on.
    pub train: &'a Dataset,
    /// What is evaluated on.
    pub held_out: Option<&'a Dataset>,
    /// Where the run is written.
    pub folder: &'a RunFolder,
    /// The processes that share the run; the first of them evaluates and writes.
    pub group: Option<&'a Group>,
}

/// A training run: what is trained, on what, how, and where it is written.
///
/// What it computes follows from its seed, data and options: a checkpoint holds the adapter, the optimizer's moments, the
/// step, the data cursor and the figures that decide when the run ends, and a run that goes on from it ends in the same
/// bytes.
pub struct Trainer<'a> {
    /// The frozen model.
    base_decoder: &'a Decoder,
    /// The model of the adapter's own tensors, where they are the whole model.
    own: Option<Decoder>,
    pub(super) config: TrainConfig,
    pub(super) objective: Box<dyn Objective>,
    pub(super) train: &'a Dataset,
    pub(super) folder: &'a RunFolder,
    pub(super) hook: Box<dyn SiteHook>,
    pub(super) optimizer: AdamW,
    pub(super) schedule: Schedule,
    pub(super) sampler: Sampler,
    pub(super) cursor: Cursor,
    pub(super) progress: Progress,
    pub(super) group: Option<&'a Group>,
    held_out: Option<&'a Dataset>,
    base: Fingerprint,
    adapter: Adapter,
    data_hash: String,
    start: usize,
    events: Option<EventWriter>,
}

/// How far a run came.
struct Course {
    done: usize,
    loss: f64,
    after: Option<Evaluation>,
    ended: Ended,
}

impl<'a> Trainer<'a> {
    /// Prepares a run from its adapter, or from the folder's newest checkpoint where it has one.
    ///
    /// # Errors
    /// When the options make no sense, nothing is left to train on, the data do not fit the objective, the adapter does
    /// not fit the model, a checkpoint belongs to another run, or the processes of the run were started differently.
    pub fn new(inputs: Inputs<'a>) -> Result<Self> {
        let Inputs { decoder, base, adapter, config, train, held_out, folder, group } = inputs;
        config.check()?;
        check_data(&config, train, held_out)?;
        check_method(&config, adapter.config(), decoder.spec(), train, held_out)?;
        let data_hash = train.digest();
        let saved = folder.load()?;
        let processes = group.map_or(1, Group::world_size);
        if let Some(saved) = &saved {
            check_resumable(saved, &config, &data_hash, &base, adapter)?;
            check_processes(saved, processes)?;
        }
        if let Some(group) = group {
            let start = saved.as_ref().map_or(0, |saved| saved.state.step);
            let options = serde_json::json!([config, adapter.config()]).to_string();
            let base = serde_json::json!(base).to_string();
            group.agree(&[
                ("options", options),
                ("training data", data_hash.clone()),
                ("base weights", base),
                ("checkpoints", start.to_string()),
            ])?;
        }
        let start_from = saved.as_ref().map_or(adapter, |s| &s.adapter);
        let (adapter, vars) = start_from.trainable(DType::F32, decoder.device())?;
        let hook = adapter.hook(decoder.spec(), decoder.device())?;
        let own = adapter.decoder(decoder.spec(), decoder.dtype())?;
        let mut optimizer = match config.offload_optimizer {
            true => AdamW::offloaded(config.adamw, vars, folder.path())?,
            false => AdamW::new(config.adamw, vars).map_err(Error::candle("making the optimizer"))?,
        };
        let (mut start, mut cursor, mut progress) = (0, Cursor::default(), Progress::default());
        let resumed = saved.is_some();
        if let Some(Saved { path, moments, state, .. }) = saved {
            (start, cursor, progress) = (state.step, state.cursor, state.progress);
            if let Err(why) = optimizer.restore(&moments, start) {
                let why = format!("its optimizer state does not fit the adapter: {why}");
                return Err(Error::Checkpoint { path, why });
            }
        }
        let leads = group.is_none_or(|group| group.rank() == 0);
        if leads {
            folder.rewind_metrics(resumed.then_some(start))?;
        }
        let events = match config.tensorboard && leads {
            true => Some(EventWriter::create(&folder.path().join("tensorboard"), resumed.then_some(start))?),
            false => None,
        };
        let objective = config.objective.objective(&config);
        Ok(Self {
            base_decoder: decoder,
            own,
            schedule: config.schedule(config.total_steps(train.len(), processes)),
            sampler: train.sampler(config.batch_size, config.seed),
            config,
            objective,
            train,
            folder,
            hook,
            optimizer,
            cursor,
            progress,
            group,
            held_out,
            base,
            adapter,
            data_hash,
            start,
            events,
        })
    }

    /// The model that is trained, and what it is compared with.
    pub(super) fn models(&self) -> Models<'_> {
        Models { trained: self.own.as_ref().unwrap_or(self.base_decoder), reference: self.base_decoder }
    }

    /// Whether this process evaluates and writes.
    fn leads(&self) -> bool {
        self.group.is_none_or(|group| group.rank() == 0)
    }

    /// Whether any process of the run says yes.
    fn any(&self, yes: bool) -> Result<bool> {
        self.group.map_or(Ok(yes), |group| group.any(yes))
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
    /// When the loss or gradient is not finite or has exploded, or a file cannot be written.
    pub fn run(mut self, observer: &mut dyn Observer) -> Result<Outcome> {
        let course = self.steps(observer);
        // the curves of a run that diverged are wanted most
        let written = if self.leads() { curves::write(self.folder) } else { Ok(()) };
        let Course { done, loss, after, ended } = course?;
        written?;
        let adapter = self.result(ended)?;
        let Progress { before, best, .. } = self.progress;
        Ok(Outcome { adapter, steps: done, loss, before, after, best, ended })
    }

    fn steps(&mut self, observer: &mut dyn Observer) -> Result<Course> {
        let total = self.schedule.total_steps;
        if self.start == 0 {
            self.progress.before = self.evaluate_held_out(0, observer)?;
        }
        let mut course = Course { done: self.start, loss: f64::NAN, after: None, ended: Ended::Completed };
        let mut saved = self.start;
        for step in self.start..total {
            if self.any(observer.should_stop())? {
                course.ended = Ended::Stopped;
                break;
            }
            let report = self.step(step)?;
            let done = step + 1;
            (course.loss, course.done) = (report.loss, done);
            if self.leads() {
                self.folder.log(&report)?;
            }
            if let Some(events) = &mut self.events {
                events.step(&report)?;
            }
            observer.step(&report, total);
            if done == total || is_due(done, self.config.eval_every) {
                course.after = self.evaluate_held_out(done, observer)?;
                if let Some(evaluation) = &course.after {
                    self.keep_if_best(done, evaluation)?;
                }
                if self.any(self.progress.is_exhausted(&self.config))? {
                    course.ended = Ended::Exhausted;
                    break;
                }
            }
            if done < total && is_due(done, self.config.save_every) {
                self.save(done, observer)?;
                saved = done;
            }
        }
        if course.ended == Ended::Stopped && course.done > saved {
            self.save(course.done, observer)?;
        }
        Ok(course)
    }

    fn result(&self, ended: Ended) -> Result<Adapter> {
        match self.progress.best {
            Some(best) if self.config.load_best_at_end && ended != Ended::Stopped && self.leads() => {
                self.folder.load_best(best.step)
            }
            _ => Ok(Adapter::new(self.adapter.config().clone(), self.adapter.tensors().clone())?),
        }
    }

    fn state(&self, step: usize) -> State {
        State {
            step,
            cursor: self.cursor,
            data: self.data_hash.clone(),
            base: self.base.clone(),
            config: self.config.clone(),
            progress: self.progress.clone(),
            processes: self.group.map_or(1, Group::world_size),
        }
    }

    fn save(&self, step: usize, observer: &mut dyn Observer) -> Result<()> {
        if !self.leads() {
            return Ok(());
        }
        let limit = self.config.save_limit;
        let path = self.folder.save(&self.adapter, &self.optimizer, &self.state(step), limit)?;
        observer.checkpoint(&path);
        Ok(())
    }

    fn keep_if_best(&mut self, step: usize, evaluation: &Evaluation) -> Result<()> {
        if self.progress.note(&self.config, step, evaluation) {
            self.folder.save_best(&self.adapter, &self.optimizer, &self.state(step))?;
        }
        Ok(())
    }

    fn evaluate_held_out(&mut self, step: usize, observer: &mut dyn Observer) -> Result<Option<Evaluation>> {
        let Some(held_out) = self.held_out.filter(|_| self.leads()) else { return Ok(None) };
        // without gradients: a graph of so many rows would be the largest of the run
        let (still, base) = (self.adapter.detached(), self.base_decoder);
        let hook = still.hook(base.spec(), base.device())?;
        let own = still.decoder(base.spec(), base.dtype())?;
        let (objective, by, batch_size) =
            (self.objective.as_ref(), self.config.eval_by, evaluated_groups(&self.config));
        let models = Models { trained: own.as_ref().unwrap_or(base), reference: base };
        let evaluation =
            Evaluator::new(models, objective, held_out, Some(self.train), by, batch_size).run(hook.as_ref())?;
        #[derive(Serialize)]
        struct Line<'a> {
            step: usize,
            held_out: &'a Evaluation,
        }
        self.folder.log(&Line { step, held_out: &evaluation })?;
        self.folder.write_evaluation(step, &evaluation)?;
        if let Some(events) = &mut self.events {
            events.evaluation(step, &evaluation)?;
        }
        observer.evaluation(step, &evaluation);
        Ok(Some(evaluation))
    }
}

/// Examples or pairs of an evaluation's batch.
pub fn evaluated_groups(config: &TrainConfig) -> usize {
    config.batch_size.saturating_mul(4)
}

fn is_due(step: usize, every: usize) -> bool {
    every > 0 && step.is_multiple_of(every)
}

/// Whether options and data go together.
///
/// # Errors
/// When there is nothing to train on, the records are not what the objective learns, or an option needs held-out records.
pub fn check_data(config: &TrainConfig, train: &Dataset, held_out: Option<&Dataset>) -> Result<()> {
    if train.examples().is_empty() {
        return Err(Error::NoExamples);
    }
    let group = config.objective.objective(config).group_size();
    let what = |group: usize| if group == 2 { "pairs of chosen and rejected" } else { "completions" };
    for dataset in std::iter::once(train).chain(held_out) {
        if dataset.group_size() != group {
            let (needs, found) = (what(group), what(dataset.group_size()));
            return Err(Error::ObjectiveData { objective: config.objective.name(), needs, found });
        }
    }
    match (config.needs_best(), held_out) {
        (Some(field), None) => Err(Error::NoHeldOut { field }),
        _ => Ok(()),
    }
}

/// Whether a method goes together with the options and the data.
///
/// # Errors
/// When the method does not compute in the type asked for, it does not see packed rows, or an example is longer than the
/// positions that are left to it.
pub fn check_method(
    config: &TrainConfig,
    adapter: &AdapterConfig,
    spec: &DecoderSpec,
    train: &Dataset,
    held_out: Option<&Dataset>,
) -> Result<()> {
    let fail = |field: &'static str, why: String| Err(Error::Config { field, why });
    let is_full = matches!(adapter.method, Method::Full(_));
    if is_full && config.dtype != ComputeType::F32 {
        return fail("dtype", "must be f32 with method = full, whose weights are trained in float32".into());
    }
    let prefix = match &adapter.method {
        Method::Prefix(prefix) => prefix.num_virtual_tokens,
        _ => 0,
    };
    if prefix > 0 && train.report().packing.is_some() {
        let why = "is on, but method = prefix puts its trained keys before a row, not before each of its examples";
        return fail("packing", why.into());
    }
    let Some(table) = spec.embedding.positions else { return Ok(()) };
    let room = table.rows.saturating_sub(table.offset + prefix);
    let lengths = std::iter::once(train).chain(held_out).flat_map(Dataset::examples).map(Example::len);
    match lengths.max().filter(|longest| *longest > room) {
        Some(longest) => fail(
            "max_seq_len",
            format!(
                "lets examples have {longest} tokens, but the model has {room} positions for them: set it to {room}"
            ),
        ),
        None => Ok(()),
    }
}

fn check_resumable(
    saved: &Saved,
    config: &TrainConfig,
    data: &str,
    base: &Fingerprint,
    adapter: &Adapter,
) -> Result<()> {
    let refuse = |why: String| Err(Error::Resume { path: saved.path.clone(), why });
    let state = &saved.state;
    if let Some(difference) = state.base.difference(base) {
        return refuse(difference);
    }
    if state.data != data {
        return refuse("the training data (or its tokenisation) differs from the run's".into());
    }
    if saved.adapter.config() != adapter.config() {
        return refuse("the adapter's configuration differs from the run's".into());
    }
    let fields = |c: &TrainConfig| serde_json::to_value(c).unwrap_or_default();
    let is_free =
        |field: &str| PACE_ONLY.contains(&field) && !(field.starts_with("eval") && config.needs_best().is_some());
    if let (serde_json::Value::Object(old), serde_json::Value::Object(new)) = (fields(&state.config), fields(config))
        && let Some((field, _)) = old.iter().find(|(k, v)| !is_free(k) && new.get(*k) != Some(*v))
    {
        return refuse(format!("option `{field}` differs from the run's"));
    }
    Ok(())
}

fn check_processes(saved: &Saved, processes: usize) -> Result<()> {
    let before = saved.state.processes;
    if before == processes {
        return Ok(());
    }
    let why = format!("it was written by a run of {before} processes, this one has {processes}");
    Err(Error::Resume { path: saved.path.clone(), why })
}

/// Options that change when something is written or measured, and where it is computed, not what. Those of the evaluation decide what is
/// computed where the best adapter is looked for.
const PACE_ONLY: [&str; 7] =
    ["eval_every", "eval_by", "save_every", "save_limit", "offload_optimizer", "tensorboard", "device"];
