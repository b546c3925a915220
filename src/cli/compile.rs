//! `prefold compile`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use miette::Result;

use super::export::ExportArgs;
use super::verify::{VerifyArgs, compile, summary, table};
use super::{Context, keep_apart, usage};
use crate::files::StagedFolder;
use crate::fold::Emission;
use crate::onnx::MODEL_NAME;

/// Export a model, fold an adapter into it, and verify the result
///
/// Writes the folder only where parity holds; with --keep also where it does not.
#[derive(Args, Debug)]
pub(super) struct Compile {
    /// Hugging Face folder, .gguf file, or the name of a fetched model
    #[arg(long)]
    model: String,
    /// The adapter: its folder
    #[arg(long)]
    adapter: PathBuf,
    /// Folder to write: model.onnx, its data, tokenizer, prefold.json, parity.json
    #[arg(long)]
    out: PathBuf,
    /// Replace the output folder if it exists and prefold wrote it
    #[arg(long)]
    overwrite: bool,
    /// Keep the graph where parity does not hold
    #[arg(long)]
    keep: bool,
    /// How the adapter stands in the graph: baked, slot or bank
    #[arg(long, default_value_t)]
    emission: Emission,
    #[command(flatten)]
    export: ExportArgs,
    #[command(flatten)]
    verify: VerifyArgs,
}

impl Compile {
    pub(super) fn run(self, context: &Context) -> Result<ExitCode> {
        keep_apart(&self.out, &[Path::new(&self.model), &self.adapter])?;
        let staged = StagedFolder::new(&self.out, self.overwrite)?;
        let (checkpoint, adapter) = context.checkpoint_with(&self.model, Some(&self.adapter))?;
        let Some(adapter) = adapter.as_ref() else { return Err(usage("there is no adapter", "check --adapter")) };
        let adapter = (adapter, self.adapter.as_path());
        let report = compile(context, &checkpoint, adapter, staged.path(), &self.export, &self.verify, self.emission)?;
        println!("{}", table(&report));
        println!("{}", summary(&report));
        if !report.verdict.passed() && !self.keep {
            let help = "pass --keep to look at the graph and its parity.json";
            return Err(usage("the graph does not compute what the model computes, so nothing was written", help));
        }
        println!("{}", staged.commit()?.join(MODEL_NAME).display());
        Ok(if report.verdict.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
