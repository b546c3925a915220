//! What a training run would do: `prefold train --dry-run`.

use miette::Result;
use serde::Serialize;

use super::style;
use super::train::{Prepared, RunConfig};
use crate::train::{MemoryEstimate, Workload};

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
    /// The largest micro-batch.
    workload: Workload,
    memory: MemoryEstimate,
}

impl Plan {
    pub(super) fn of(config: &RunConfig, prepared: &Prepared) -> Self {
        let Prepared { checkpoint, adapter, training, held_out, .. } = prepared;
        let (options, spec) = (&config.train, checkpoint.spec());
        let group = training.group_size();
        let examples = training.examples();
        let report = training.report();
        let steps = options.total_steps(training.len());
        let seq = (0..training.len()).map(|row| training.row_len(row)).max().unwrap_or(0);
        let learnt = examples.iter().map(crate::data::Example::labelled).max().unwrap_or(0);
        let rows = (options.batch_size * group).min(training.len() * group);
        let workload = Workload { rows, seq, labelled: rows * if report.packing.is_some() { seq } else { learnt } };
        Self {
            model: checkpoint.display_name(),
            parameters: spec.num_parameters(),
            trained: adapter.num_parameters(),
            objective: options.objective.name(),
            examples: examples.len() / group,
            tokens: report.sequence.total,
            completion_tokens: report.labelled,
            held_out: held_out.as_ref().map(|dataset| dataset.examples().len() / group),
            steps,
            warmup_steps: options.schedule(steps).warmup_steps,
            workload,
            memory: MemoryEstimate::of(spec, adapter, options, &workload),
        }
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
            style::bytes(self.memory.total()),
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
        row("memory: weights", style::bytes(memory.weights));
        row("memory: adapter and optimizer", style::bytes(memory.adapter + memory.optimizer));
        row("memory: activations", style::bytes(memory.activations));
        row("memory: all, estimated", style::bytes(memory.total()));
        println!("{table}");
        println!("{}", super::options::to_toml(config)?);
        Ok(())
    }
}
