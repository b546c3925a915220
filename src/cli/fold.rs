//! `prefold fold`

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use miette::Result;

use super::{existing_graph, keep_apart};
use crate::files::StagedFolder;
use crate::fold::{Carry, fold_folder_with};
use crate::onnx::MODEL_NAME;

/// Put an adapter into an ONNX graph
#[derive(Args, Debug)]
pub(super) struct Fold {
    /// The graph: its folder or its .onnx file
    #[arg(long)]
    graph: PathBuf,
    /// The adapter: its folder
    #[arg(long)]
    adapter: PathBuf,
    /// Folder to write
    #[arg(long)]
    out: PathBuf,
    /// Hard-link the graph's external data instead of copying it: at once and without space. The `onnx` package refuses
    /// such files, runtimes do not
    #[arg(long)]
    link: bool,
    /// Replace the output folder if it exists
    #[arg(long)]
    overwrite: bool,
}

impl Fold {
    pub(super) fn run(self) -> Result<ExitCode> {
        keep_apart(&self.out, &[&self.graph, &self.adapter])?;
        let staged = StagedFolder::new(&self.out, self.overwrite)?;
        let carry = if self.link { Carry::Link } else { Carry::Copy };
        let folded = fold_folder_with(&existing_graph(&self.graph)?, &self.adapter, staged.path(), carry)?;
        let out = staged.commit()?;
        println!("{} ({} sites)", out.join(MODEL_NAME).display(), folded.sites.len());
        Ok(ExitCode::SUCCESS)
    }
}
