//! Progress of long work, on standard error.

use std::path::Path;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};

use super::interrupt::Interrupt;
use super::style::percent;
use crate::train::{Evaluation, Observer, StepReport};

/// A training run as a progress bar with loss, tokens a second and time left; a line now and then where standard error is
/// no terminal.
pub(super) struct TrainingBar {
    bar: ProgressBar,
    started: Instant,
    tokens: usize,
    smoothed: Option<f64>,
    last_line: Option<Instant>,
    quiet: bool,
    interrupt: Option<Interrupt>,
}

const SECONDS_BETWEEN_LINES: u64 = 10;

impl TrainingBar {
    pub(super) fn new(total: usize, done: usize, quiet: bool, interrupt: Option<Interrupt>) -> Self {
        let bar = if quiet { ProgressBar::hidden() } else { ProgressBar::new(total as u64) };
        let style = ProgressStyle::with_template("{bar:30} step {pos}/{len}  {msg}  {eta} left");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_position(done as u64);
        bar.reset_eta();
        Self { bar, started: Instant::now(), tokens: 0, smoothed: None, last_line: None, quiet, interrupt }
    }

    /// A line that stays, above the bar.
    fn say(&self, line: &str) {
        if self.quiet {
            return;
        }
        if self.bar.is_hidden() {
            eprintln!("{line}");
        } else {
            self.bar.println(line);
        }
    }

    pub(super) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl Observer for TrainingBar {
    fn step(&mut self, report: &StepReport, total: usize) {
        self.tokens += report.tokens;
        let smoothed = self.smoothed.map_or(report.loss, |s| 0.9 * s + 0.1 * report.loss);
        self.smoothed = Some(smoothed);
        let rate = self.tokens as f64 / self.started.elapsed().as_secs_f64().max(1e-9);
        let message = format!("loss {smoothed:.3}  {rate:.0} tokens/s");
        let is_due = self.last_line.is_none_or(|at| at.elapsed().as_secs() >= SECONDS_BETWEEN_LINES);
        if self.bar.is_hidden() && (is_due || report.step == total) {
            self.say(&format!("step {}/{total}  {message}", report.step));
            self.last_line = Some(Instant::now());
        }
        self.bar.set_message(message);
        self.bar.set_position(report.step as u64);
    }

    fn evaluation(&mut self, step: usize, evaluation: &Evaluation) {
        self.say(&format!(
            "held out after step {step}: loss {:.3}, accuracy {} of {} examples",
            evaluation.loss,
            percent(evaluation.accuracy),
            evaluation.examples,
        ));
    }

    fn checkpoint(&mut self, path: &Path) {
        self.say(&format!("checkpoint {}", path.display()));
    }

    fn should_stop(&self) -> bool {
        self.interrupt.as_ref().is_some_and(Interrupt::is_asked)
    }
}
