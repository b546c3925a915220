//! `prefold fold`

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use miette::Result;

use super::site_proof::ProofArgs;
use super::{Context, existing_graph, keep_apart};
use crate::files::StagedFolder;
use crate::fold::fold_folder;
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
    /// Replace the output folder if it exists
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    proof: ProofArgs,
}

impl Fold {
    pub(super) fn run(self, context: &Context) -> Result<ExitCode> {
        keep_apart(&self.out, &[&self.graph, &self.adapter])?;
        let staged = StagedFolder::new(&self.out, self.overwrite)?;
        let folded = fold_folder(&existing_graph(&self.graph)?, &self.adapter, staged.path())?;
        self.proof.run(context, &self.graph, &self.adapter, staged.path())?;
        let out = staged.commit()?;
        println!("{} ({} sites)", out.join(MODEL_NAME).display(), folded.sites.len());
        Ok(ExitCode::SUCCESS)
    }
}
