//! `prefold unfold`

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use miette::Result;

use super::{existing_graph, keep_apart};
use crate::files::StagedFolder;
use crate::fold::unfold_folder;
use crate::onnx::MODEL_NAME;

/// Take an adapter out of a graph again: the file before the fold, byte for byte
///
/// A folded graph holds the way back in its metadata. A graph that something else changed since is refused.
#[derive(Args, Debug)]
pub(super) struct Unfold {
    /// The folded graph: its folder or its .onnx file
    graph: PathBuf,
    /// Folder to write
    #[arg(long)]
    out: PathBuf,
    /// Take off every fold, not the last one alone
    #[arg(long)]
    all: bool,
    /// Replace the output folder if it exists and prefold wrote it
    #[arg(long)]
    overwrite: bool,
}

impl Unfold {
    pub(super) fn run(self) -> Result<ExitCode> {
        keep_apart(&self.out, &[&self.graph])?;
        let staged = StagedFolder::new(&self.out, self.overwrite)?;
        let unfolded = unfold_folder(&existing_graph(&self.graph)?, self.all, staged.path())?;
        let out = staged.commit()?;
        let names: Vec<String> = unfolded.folds.iter().map(|fold| fold.adapters.join(", ")).collect();
        println!("{} (without {})", out.join(MODEL_NAME).display(), names.join("; "));
        Ok(ExitCode::SUCCESS)
    }
}
