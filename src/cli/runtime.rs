//! `prefold runtime`

use std::process::ExitCode;

use clap::{Args, Subcommand};
use miette::Result;

use super::{Context, style};
use crate::runtime::{TRACT_VERSION, library};

/// Install or list ONNX Runtime libraries
#[derive(Args, Debug)]
pub(super) struct Runtime {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Get the pinned onnxruntime wheel with pip and unpack its library into the cache
    Install,
    /// List the libraries in the order in which they are tried, and the embedded runtime
    List,
}

impl Runtime {
    pub(super) fn run(self, context: &Context) -> Result<ExitCode> {
        match self.action {
            Action::Install => println!("{}", library::install(&context.cache)?.display()),
            Action::List => list(context),
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn list(context: &Context) {
    let mut table = style::table(&["runtime", "version", "from", "usable", "path"]);
    for candidate in library::list(context.ort_lib(), &context.cache) {
        let usable = candidate.problem.as_deref().map_or("yes".to_owned(), |problem| format!("no: {problem}"));
        let version = candidate.version.unwrap_or_else(|| "?".into());
        let from = candidate.source.to_string();
        table.add_row(["onnxruntime".into(), version, from, usable, candidate.path.display().to_string()]);
    }
    table.add_row(["tract", TRACT_VERSION, "embedded", "yes", ""]);
    println!("{table}");
}
