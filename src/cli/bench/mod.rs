//! `prefold bench`: one file for each thing that is measured.

mod graph;
mod kernels;
mod train;

use std::process::ExitCode;

use clap::{Args, Subcommand};
use miette::Result;

use super::Context;

/// Measure
#[derive(Args, Debug)]
pub(super) struct Bench {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    Train(train::BenchTrain),
    Graph(graph::BenchGraph),
    Kernels(kernels::BenchKernels),
}

impl Bench {
    pub(super) fn run(self, context: &Context) -> Result<ExitCode> {
        match self.what {
            What::Train(command) => command.run(context),
            What::Graph(command) => command.run(context),
            What::Kernels(command) => command.run(),
        }
    }
}

/// The middle value; of an even number of them the upper one.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}
