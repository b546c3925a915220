//! `prefold adapter`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};
use miette::Result;

use super::{Context, keep_apart};
use crate::adapter::{Adapter, CONFIG_NAME, WEIGHTS_NAME, peft};
use crate::files::{Manifest, StagedFolder};

/// Work on adapters
#[derive(Args, Debug)]
pub(super) struct Adapt {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Convert(Convert),
    Merge(Merge),
}

/// Write the base model with the adapter in its weights
///
/// Of lora (rsLoRA and DoRA too) and full. The Hugging Face folder is written again: the same names, shards and data types,
/// configuration and tokenizer copied.
#[derive(Args, Debug)]
struct Merge {
    /// The adapter: a folder of prefold's or PEFT's
    #[arg(long)]
    adapter: PathBuf,
    /// Its base model: a Hugging Face folder
    #[arg(long)]
    model: String,
    /// Folder to write
    #[arg(long)]
    out: PathBuf,
    /// Replace the output folder if it exists
    #[arg(long)]
    overwrite: bool,
}

/// Write an adapter in another tool's layout
///
/// PEFT folders hold LoRA (with rsLoRA and DoRA) and prefix tuning. prefold reads them wherever it takes an adapter together with
/// its base model.
#[derive(Args, Debug)]
struct Convert {
    /// The adapter: a folder of prefold's or PEFT's
    #[arg(long)]
    adapter: PathBuf,
    /// Its base model: Hugging Face folder, .gguf file, or the name of a fetched model
    #[arg(long)]
    model: String,
    /// The layout to write
    #[arg(long, value_enum)]
    to: Layout,
    /// Folder to write
    #[arg(long)]
    out: PathBuf,
    /// Replace the output folder if it exists
    #[arg(long)]
    overwrite: bool,
}

/// A layout of adapter folders.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Layout {
    /// prefold's own.
    Prefold,
    /// That of the Python package peft.
    Peft,
}

impl Adapt {
    pub(super) fn run(self, context: &Context) -> Result<ExitCode> {
        match self.command {
            Command::Convert(command) => command.run(context),
            Command::Merge(command) => command.run(context),
        }
    }
}

impl Convert {
    fn run(self, context: &Context) -> Result<ExitCode> {
        keep_apart(&self.out, &[&self.adapter, self.model.as_ref()])?;
        let staged = StagedFolder::new(&self.out, self.overwrite)?;
        let checkpoint = context.checkpoint(&self.model)?;
        let adapter = Adapter::open_for(&self.adapter, checkpoint.spec())?;
        let name = match self.to {
            Layout::Prefold => {
                adapter.save(staged.path())?;
                "prefold"
            }
            Layout::Peft => {
                peft::write(&adapter, checkpoint.spec(), staged.path())?;
                "peft"
            }
        };
        let mut manifest = Manifest::new("adapter convert", serde_json::json!({ "to": name }));
        manifest = with_adapter(manifest, &self.adapter)?;
        manifest = manifest.output("adapter_config", &staged.path().join(CONFIG_NAME))?;
        manifest.output("adapter", &staged.path().join(WEIGHTS_NAME))?.write(staged.path())?;
        println!("{}", staged.commit()?.display());
        Ok(ExitCode::SUCCESS)
    }
}

impl Merge {
    fn run(self, context: &Context) -> Result<ExitCode> {
        keep_apart(&self.out, &[&self.adapter, self.model.as_ref()])?;
        let staged = StagedFolder::new(&self.out, self.overwrite)?;
        let checkpoint = context.checkpoint(&self.model)?;
        let adapter = Adapter::open_for(&self.adapter, checkpoint.spec())?;
        adapter.check_mergeable()?;
        checkpoint.write_with(staged.path(), &|role, weight| adapter.merged_weight(role, weight))?;
        let mut manifest = with_adapter(Manifest::new("adapter merge", serde_json::json!({})), &self.adapter)?;
        for file in checkpoint.weight_files() {
            manifest = manifest.input("base", &file)?;
            manifest = manifest.output("weights", &staged.path().join(file.file_name().unwrap_or_default()))?;
        }
        manifest.write(staged.path())?;
        println!("{}", staged.commit()?.display());
        Ok(ExitCode::SUCCESS)
    }
}

fn with_adapter(manifest: Manifest, adapter: &Path) -> Result<Manifest> {
    if !adapter.is_dir() {
        return Ok(manifest.input("adapter", adapter)?);
    }
    let manifest = manifest.input("adapter_config", &adapter.join(CONFIG_NAME))?;
    Ok(manifest.input("adapter", &adapter.join(WEIGHTS_NAME))?)
}
