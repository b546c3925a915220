//! The command line: one file per command. The only room that prints or ends the process.
//!
//! Results go to standard output, progress and errors to standard error. Exit codes: 0 done (for `verify`: parity),
//! 1 failed (for `verify`: no parity), 2 wrong usage of the command line (for `verify`: it could not be told; for `fold`:
//! folded, but not proved), 130 or 143 stopped by SIGINT or SIGTERM with a
//! checkpoint (`train`).
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod active;
mod adapter;
mod bank;
mod bench;
mod compile;
mod data;
mod demo;
mod device;
mod export;
mod fetch;
mod fold;
mod forward;
mod generate;
mod inspect;
mod interrupt;
mod memory;
mod options;
mod plan;
mod preview;
mod progress;
mod runtime;
mod schema;
mod shell;
mod site_proof;
mod style;
mod train;
mod unfold;
mod verify;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use miette::{IntoDiagnostic, Result};

use self::shell::command_line;
use crate::adapter::Adapter;
use crate::base::{Checkpoint, fetch as models};
use crate::files;
use crate::fold::{graph_file, name_of};

pub use schema::schemas;

/// Train Prefix-Tuning+ adapters for frozen language models, fold them into ONNX graphs, and prove that the graph computes
/// what was trained.
#[derive(Debug, Parser)]
#[command(name = "prefold", version, propagate_version = true, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    global: Global,
}

/// Options of every command.
#[derive(Args, Clone, Debug)]
struct Global {
    /// The ONNX Runtime library to load [default: prefold's cache, else the Python package onnxruntime]; `verify` takes several
    #[arg(
        long = "ort-lib",
        global = true,
        env = "ORT_DYLIB_PATH",
        value_name = "FILE",
        help_heading = "Global options"
    )]
    ort_libs: Vec<PathBuf>,
    /// Say more about what happens; twice for everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count, help_heading = "Global options")]
    verbose: u8,
    /// Show no progress
    #[arg(short, long, global = true, help_heading = "Global options")]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    Demo(demo::Demo),
    Fetch(fetch::Fetch),
    Data(data::Data),
    Train(Box<train::Train>),
    Export(export::Export),
    Fold(fold::Fold),
    Unfold(unfold::Unfold),
    Bank(bank::Bank),
    Compile(Box<compile::Compile>),
    Verify(Box<verify::Verify>),
    Generate(generate::Generate),
    Forward(forward::Forward),
    Inspect(inspect::Inspect),
    Adapter(adapter::Adapt),
    Runtime(runtime::Runtime),
    Schema(schema::Schema),
    Bench(bench::Bench),
    /// Run a graph for the process that started this one
    #[command(name = RUNTIME_PROCESS, hide = true)]
    RuntimeProcess,
}

/// The command that holds a runtime, which `verify` starts.
const RUNTIME_PROCESS: &str = "runtime-process";

/// What every command may use.
struct Context {
    global: Global,
    cache: PathBuf,
}

impl Context {
    /// The ONNX Runtime library that was named; the first of several.
    fn ort_lib(&self) -> Option<&Path> {
        self.global.ort_libs.first().map(PathBuf::as_path)
    }

    /// Opens a checkpoint by path, by a known name, or by `hf:OWNER/NAME` once fetched.
    fn checkpoint(&self, model: &str) -> Result<Checkpoint> {
        let path = models::resolve_model(model, &self.cache)?;
        Ok(Checkpoint::open(&path)?)
    }

    /// Opens a checkpoint and an adapter of it, prefold's or PEFT's. Weights that the adapter replaces are the checkpoint's.
    fn checkpoint_with(&self, model: &str, adapter: Option<&Path>) -> Result<(Checkpoint, Option<Adapter>)> {
        let checkpoint = self.checkpoint(model)?;
        let Some(adapter) = adapter else { return Ok((checkpoint, None)) };
        let adapter = Adapter::open_for(adapter, checkpoint.spec())?;
        Ok((adapter.overlay(checkpoint)?, Some(adapter)))
    }
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    start_logging(cli.global.verbose);
    // an error's text already says what caused it
    let hook = miette::set_hook(Box::new(|_| {
        Box::new(miette::MietteHandlerOpts::new().without_cause_chain().width(100).build())
    }));
    if hook.is_err() {
        tracing::debug!("errors are shown in the default style");
    }
    match run(cli) {
        Ok(code) => code,
        Err(report) => {
            eprintln!("{report:?}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    let context = Context { global: cli.global, cache: files::cache_folder()? };
    // training has a checkpoint to save first, and the process of a runtime writes nothing
    if !matches!(cli.command, Command::Train(_) | Command::RuntimeProcess) {
        interrupt::leave_nothing_behind()?;
    }
    match cli.command {
        Command::Data(command) => command.run(&context),
        Command::Demo(command) => command.run(&context),
        Command::Fetch(command) => command.run(&context),
        Command::Train(command) => command.run(&context),
        Command::Export(command) => command.run(&context),
        Command::Fold(command) => command.run(&context),
        Command::Unfold(command) => command.run(),
        Command::Bank(command) => command.run(),
        Command::Compile(command) => command.run(&context),
        Command::Verify(command) => command.run(&context),
        Command::Generate(command) => command.run(&context),
        Command::Forward(command) => command.run(&context),
        Command::Inspect(command) => command.run(&context),
        Command::Adapter(command) => command.run(&context),
        Command::Runtime(command) => command.run(&context),
        Command::Schema(command) => command.run(),
        Command::Bench(command) => command.run(&context),
        Command::RuntimeProcess => crate::runtime::serve_parent().map(|()| ExitCode::SUCCESS).into_diagnostic(),
    }
}

/// Warnings always, more with `-v`; `PREFOLD_LOG` overrides, in the syntax of `RUST_LOG`.
fn start_logging(verbose: u8) {
    let default = match verbose {
        0 => "prefold=warn,error",
        1 => "prefold=info,warn",
        _ => "prefold=debug,info",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("PREFOLD_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    subscriber.without_time().with_target(false).init();
}

/// An error of the command line itself.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
#[error("{message}")]
#[diagnostic(help("{help}"))]
struct Usage {
    message: String,
    help: String,
}

fn usage(message: impl Into<String>, help: impl Into<String>) -> miette::Report {
    Usage { message: message.into(), help: help.into() }.into()
}

/// The `.onnx` file that a graph's path names, which must be there.
fn existing_graph(path: &Path) -> Result<PathBuf> {
    let file = graph_file(path);
    if file.is_file() {
        return Ok(file);
    }
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut graphs: Vec<_> = entries.filter(|path| path.extension().is_some_and(|end| end == "onnx")).collect();
    graphs.sort();
    if graphs.is_empty() {
        let message = format!("there is no graph {}", path.display());
        return Err(usage(message, "name a folder that holds model.onnx, or an .onnx file"));
    }
    let graphs: Vec<String> = graphs.iter().map(|path| path.display().to_string()).collect();
    Err(usage(format!("{} holds no model.onnx", path.display()), format!("name the graph: {}", graphs.join(" or "))))
}

/// `NAME=PATH` or `PATH`, whose name is then the last part of it.
fn named_adapter(text: &str) -> (String, PathBuf) {
    let path = PathBuf::from(text);
    match text.split_once('=') {
        Some((name, rest)) if !path.exists() && !name.contains(['/', '\\']) => (name.to_owned(), rest.into()),
        _ => (name_of(&path), path),
    }
}

/// Refuses an output that is, or holds, one of a command's inputs: replacing it would destroy them.
fn keep_apart(out: &Path, inputs: &[&Path]) -> Result<()> {
    let Ok(out_path) = out.canonicalize() else { return Ok(()) };
    let inside = |input: &&&Path| input.canonicalize().is_ok_and(|input| input.starts_with(&out_path));
    match inputs.iter().find(inside) {
        Some(input) => {
            let message = format!("the output {} would replace the input {}", out.display(), input.display());
            Err(usage(message, "choose another --out"))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    /// Names that are taken twice, in any command, are found when it is used, and in debug builds only.
    #[test]
    fn every_command_is_well_formed() {
        Cli::command().debug_assert();
    }
}
