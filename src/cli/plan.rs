//! What a training run would do: `prefold train --dry-run`.

use miette::Result;
use serde::Serialize;

use super::memory::resident;
use super::style;
use super::train::{Prepared, RunConfig};
use crate::base::DeviceMemory;
use crate::data::{Dataset, Example};
use crate::train::{MemoryEstimate, TrainConfig, Workload, evaluated_groups};

/// A run before its start.
#[derive(Debug, Serialize)]
pub(super) struct Plan {
    /// The model's name.
    model: String,
    /// Parameters of the model, and of the adapter.
    parameters: usize,
    trained: usize,
    objective: &'static str,
    /// Training examples (pairs with a preference objective), tokens of one pass over them, and those that carry loss.
    examples: usize,
    tokens: usize,
    completion_tokens: usize,
    held_out: Option<usize>,
    /// Optimizer steps, and those of the warm-up.
    steps: usize,
    warmup_steps: usize,
    /// Processes that share the run.
    processes: usize,
    /// The largest micro-batch, and the largest batch of an evaluation.
    workload: Workload,
    evaluation: Workload,
    memory: MemoryEstimate,
}

impl Plan {
    pub(super) fn of(config: &RunConfig, prepared: &Prepared, processes: usize) -> Self {
        let Prepared { checkpoint, adapter, training, held_out, .. } = prepared;
        let (options, spec) = (&config.train, checkpoint.spec());
        let group = training.group_size();
        let examples = training.examples();
        let report = training.report();
        let steps = options.total_steps(training.len(), processes);
        let workload = workload(training, options.batch_size, report.packing.is_some());
        let evaluation = held_out.as_ref().map(|held_out| workload_of_examples(held_out, evaluated_groups(options)));
        let evaluation = evaluation.unwrap_or_default();
        let process = resident().unwrap_or(0);
        Self {
            model: checkpoint.display_name(),
            parameters: spec.num_parameters(),
            trained: adapter.num_parameters(spec),
            objective: options.objective.name(),
            examples: examples.len() / group,
            tokens: report.sequence.total,
            completion_tokens: report.labelled,
            held_out: held_out.as_ref().map(|dataset| dataset.examples().len() / group),
            steps,
            warmup_steps: options.schedule(steps).warmup_steps,
            processes,
            workload,
            evaluation,
            memory: MemoryEstimate::of(spec, adapter, options, [&workload, &evaluation], process),
        }
    }

    /// What to change so that a run fits a device whose memory was full.
    pub(super) fn what_fits(&self, config: &RunConfig, prepared: &Prepared, device: Option<DeviceMemory>) -> String {
        // the process itself is not on the device
        let needed = self.memory.peak - self.memory.process;
        let estimated = format!("the run is estimated to need {}", style::bytes(needed));
        let Some(DeviceMemory { total, free, .. }) = device else {
            return format!("{estimated}; lower --batch-size, or use --checkpoint-activations");
        };
        let device = format!("the GPU has {}, {} of it free now", style::bytes(total), style::bytes(free));
        let estimate = |rows: usize, checkpoint_activations: bool| {
            let options = TrainConfig { checkpoint_activations, ..config.train.clone() };
            let part = |of: &Workload, rows: usize| {
                let labelled = of.labelled / of.rows.max(1) * rows;
                Workload { rows, labelled, ..*of }
            };
            let workloads = [part(&self.workload, rows), part(&self.evaluation, self.evaluation.rows.min(4 * rows))];
            let [training, evaluation] = &workloads;
            let spec = prepared.checkpoint.spec();
            MemoryEstimate::of(spec, &prepared.adapter, &options, [training, evaluation], 0).peak
        };
        let batches = std::iter::successors(Some(config.train.batch_size), |rows| (*rows > 1).then(|| rows / 2));
        let group = self.workload.rows / config.train.batch_size.max(1);
        let fits = batches
            .flat_map(|rows| [(rows, config.train.checkpoint_activations), (rows, true)])
            .find(|(rows, checkpointed)| estimate(rows * group.max(1), *checkpointed) < total / 10 * 9);
        let advice = match fits {
            None => {
                "no batch of this model fits: use --dtype bf16, a shorter --max-seq-len or a smaller model".to_owned()
            }
            Some((rows, checkpointed)) => {
                let accumulation = config.train.batch_size.div_ceil(rows) * config.train.gradient_accumulation;
                let more = if checkpointed { " --checkpoint-activations" } else { "" };
                format!(
                    "--batch-size {rows} --gradient-accumulation {accumulation}{more} should fit (about {})",
                    style::bytes(estimate(rows * group.max(1), checkpointed))
                )
            }
        };
        format!("{estimated}; {device}; {advice}")
    }

    pub(super) fn memory(&self) -> &MemoryEstimate {
        &self.memory
    }

    /// The line that a run begins with.
    pub(super) fn headline(&self) -> String {
        format!(
            "training {} of {} parameters ({:.2} %) on {} examples, {} steps, about {} of memory",
            style::count(self.trained),
            style::count(self.parameters),
            100.0 * self.trained as f64 / self.parameters.max(1) as f64,
            self.examples,
            self.steps,
            style::bytes(self.memory.peak),
        )
    }

    /// The plan and the resolved options as a table.
    pub(super) fn print(&self, config: &RunConfig) -> Result<()> {
        let Workload { rows, seq, labelled } = self.workload;
        let memory = &self.memory;
        let mut table = style::table(&["", ""]);
        let share = 100.0 * self.trained as f64 / self.parameters.max(1) as f64;
        let mut row = |name: &str, value: String| {
            table.add_row([name.to_owned(), value]);
        };
        row("model", format!("{} ({} parameters)", self.model, style::count(self.parameters)));
        row("adapter", format!("{} trained parameters ({share:.2} %)", style::count(self.trained)));
        row("objective", self.objective.into());
        let unit = if self.workload.rows > 0 && self.objective != "sft" { "pairs" } else { "examples" };
        let tokens = format!("{} tokens, {} learnt", style::count(self.tokens), style::count(self.completion_tokens));
        row("training data", format!("{} {unit}, {tokens}", self.examples));
        row("held out", self.held_out.map_or("nothing".into(), |n| format!("{n} {unit}")));
        row("steps", format!("{}, the first {} to warm up", self.steps, self.warmup_steps));
        row("largest batch", format!("{rows} × {seq} tokens, {labelled} of them learnt at most"));
        row("memory: process", style::bytes(memory.process));
        row("memory: weights", style::bytes(memory.weights));
        row("memory: adapter and optimizer", style::bytes(memory.adapter + memory.optimizer));
        row("memory: activations", style::bytes(memory.activations));
        row("memory: evaluation", style::bytes(memory.evaluation));
        row("memory: peak, estimated", style::bytes(memory.peak));
        println!("{table}");
        println!("{}", super::options::to_toml(config)?);
        Ok(())
    }
}

/// The largest batch of `groups` examples or pairs out of a sampler's rows, which may be packed.
fn workload(dataset: &Dataset, groups: usize, packed: bool) -> Workload {
    if !packed {
        return workload_of_examples(dataset, groups);
    }
    let seq = (0..dataset.len()).map(|row| dataset.row_len(row)).max().unwrap_or(0);
    let rows = groups.min(dataset.len());
    Workload { rows, seq, labelled: rows * seq }
}

/// The largest batch of `groups` examples or pairs.
fn workload_of_examples(dataset: &Dataset, groups: usize) -> Workload {
    let (examples, group) = (dataset.examples(), dataset.group_size());
    let largest = |of: fn(&Example) -> usize| examples.iter().map(of).max().unwrap_or(0);
    let rows = groups.saturating_mul(group).min(examples.len());
    Workload { rows, seq: largest(Example::len), labelled: rows * largest(Example::labelled) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::AdapterConfig;
    use crate::base::Checkpoint;
    use crate::data::{DataConfig, Format, FormatOptions, Paths};

    #[test]
    fn what_fits_a_full_gpu_is_a_smaller_batch_or_activations_computed_again() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/demo");
        let checkpoint = Checkpoint::open(&folder.join("model")).unwrap();
        let tokenizer = checkpoint.tokenizer().unwrap();
        let format = Format::new(&tokenizer, checkpoint.spec().vocab_size, FormatOptions::default()).unwrap();
        let data = DataConfig { train: Some(Paths::from(folder.join("train.jsonl"))), ..DataConfig::default() };
        let (training, _) = data.load(&format, 0, 256).unwrap();
        let adapter = AdapterConfig::prefix_plus(checkpoint.spec(), None);
        let prepared = Prepared { checkpoint, adapter, training, held_out: None };
        let mut config = RunConfig::default();
        config.train.batch_size = 64;
        let plan = Plan::of(&config, &prepared, 1);
        let fits = |total: u64| {
            let memory = DeviceMemory { total, free: total / 2, peak: total };
            plan.what_fits(&config, &prepared, Some(memory))
        };
        let needed = plan.memory().peak - plan.memory().process;
        assert!(
            fits(4 * needed).contains("--batch-size 64 --gradient-accumulation 1 should fit"),
            "{}",
            fits(4 * needed)
        );
        let tight = fits(needed / 2);
        assert!(tight.contains("should fit") && !tight.contains("accumulation 1 should fit"), "{tight}");
        assert!(fits(1 << 20).contains("no batch of this model fits"), "{}", fits(1 << 20));
        assert!(plan.what_fits(&config, &prepared, None).contains("lower --batch-size"));
    }
}
