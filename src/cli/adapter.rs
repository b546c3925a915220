//! `prefold adapter`

use std::path::PathBuf;
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
        if self.adapter.is_dir() {
            manifest = manifest.input("adapter_config", &self.adapter.join(CONFIG_NAME))?;
            manifest = manifest.input("adapter", &self.adapter.join(WEIGHTS_NAME))?;
        } else {
            manifest = manifest.input("adapter", &self.adapter)?;
        }
        manifest = manifest.output("adapter_config", &staged.path().join(CONFIG_NAME))?;
        manifest.output("adapter", &staged.path().join(WEIGHTS_NAME))?.write(staged.path())?;
        println!("{}", staged.commit()?.display());
        Ok(ExitCode::SUCCESS)
    }
}
