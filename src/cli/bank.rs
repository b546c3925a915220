//! `prefold bank`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use miette::{IntoDiagnostic, Result};

use super::fold::rows;
use super::{existing_graph, keep_apart, named_adapter};
use crate::files::StagedFolder;
use crate::fold::{BankEdit, NamedAdapter, bank_of, edit_bank, open_adapter};
use crate::onnx::{MODEL_NAME, Model};

/// Adapters into and out of a graph's bank
///
/// `prefold fold --emission bank` makes one. The base graph's bytes and data stay as they are.
#[derive(Args, Debug)]
pub(super) struct Bank {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    List(List),
    Add(Add),
    Drop(Drop),
}

/// Say which adapters a bank holds, by their numbers in adapter_ids
#[derive(Args, Debug)]
struct List {
    /// The graph: its folder or its .onnx file
    graph: PathBuf,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Add adapters to a bank, as its last rows
#[derive(Args, Debug)]
struct Add {
    /// The graph: its folder or its .onnx file
    graph: PathBuf,
    /// The adapter: its folder, or NAME=FOLDER; may be repeated
    #[arg(long, required = true)]
    adapter: Vec<String>,
    #[command(flatten)]
    output: Output,
}

/// Drop adapters from a bank; those behind move up
#[derive(Args, Debug)]
struct Drop {
    /// The graph: its folder or its .onnx file
    graph: PathBuf,
    /// Names of the adapters
    #[arg(required = true)]
    names: Vec<String>,
    #[command(flatten)]
    output: Output,
}

#[derive(Args, Debug)]
struct Output {
    /// Folder to write
    #[arg(long)]
    out: PathBuf,
    /// Replace the output folder if it exists and prefold wrote it
    #[arg(long)]
    overwrite: bool,
}

impl Bank {
    pub(super) fn run(self) -> Result<ExitCode> {
        match self.command {
            Command::List(list) => list.run(),
            Command::Add(add) => {
                let graph = existing_graph(&add.graph)?;
                let named = add.adapter.iter().map(|text| named_adapter(text)).map(|(name, path)| {
                    keep_apart(&add.output.out, &[&path])?;
                    Ok(NamedAdapter { name, adapter: open_adapter(&graph, &path)? })
                });
                let named = named.collect::<Result<Vec<_>>>()?;
                add.output.write(&graph, &BankEdit::Add(named))
            }
            Command::Drop(drop) => drop.output.write(&existing_graph(&drop.graph)?, &BankEdit::Drop(drop.names)),
        }
    }
}

impl List {
    fn run(self) -> Result<ExitCode> {
        let bank = bank_of(&Model::open(&existing_graph(&self.graph)?)?)?;
        if self.json {
            println!("{}", serde_json::to_string_pretty(&bank.adapters).into_diagnostic()?);
            return Ok(ExitCode::SUCCESS);
        }
        println!("0 (base)");
        bank.adapters.iter().enumerate().for_each(|(row, name)| println!("{} {name}", row + 1));
        Ok(ExitCode::SUCCESS)
    }
}

impl Output {
    fn write(&self, graph: &Path, edit: &BankEdit) -> Result<ExitCode> {
        keep_apart(&self.out, &[graph])?;
        let staged = StagedFolder::new(&self.out, self.overwrite)?;
        let names = edit_bank(graph, edit, staged.path())?;
        println!("{} (adapter_ids 0 is the base, {})", staged.commit()?.join(MODEL_NAME).display(), rows(&names));
        Ok(ExitCode::SUCCESS)
    }
}
