//! `prefold export`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use miette::Result;

use super::{Context, keep_apart, style};
use crate::export::{Dialect, ExportOptions, Precision, export};
use crate::files::StagedFolder;
use crate::onnx::MODEL_NAME;

/// Write a base model as an ONNX graph with a key-value cache
#[derive(Args, Debug)]
pub(super) struct Export {
    /// Hugging Face folder, .gguf file, or the name of a fetched model
    #[arg(long)]
    model: String,
    /// Folder to write
    #[arg(long)]
    out: PathBuf,
    #[command(flatten)]
    options: ExportArgs,
    /// Replace the output folder if it exists and prefold wrote it
    #[arg(long)]
    overwrite: bool,
}

/// How to export.
#[derive(Args, Clone, Debug)]
pub(super) struct ExportArgs {
    /// portable: standard operators, for ONNX Runtime and tract; ort: fused operators of com.microsoft
    #[arg(long, default_value = "portable")]
    dialect: Dialect,
    /// Type of weights, activations and cache: f32, f16, or bf16 for GPUs
    #[arg(long, default_value = "f32")]
    precision: Precision,
    /// Weights go into model.onnx.data where all together exceed this many MiB
    #[arg(long, default_value_t = 64, value_name = "MIB")]
    external_data_threshold: u64,
    /// With --dialect ort, for rows that end in padding or have none, as one row of generated text: the attention operator rotates and
    /// counts by itself, which is faster, and position_ids is no input
    #[arg(long)]
    right_padding_only: bool,
}

/// As the command line has it where nothing is given.
impl Default for ExportArgs {
    fn default() -> Self {
        Self {
            dialect: Dialect::Portable,
            precision: Precision::F32,
            external_data_threshold: 64,
            right_padding_only: false,
        }
    }
}

impl ExportArgs {
    pub(super) fn options(&self) -> ExportOptions {
        ExportOptions {
            dialect: self.dialect,
            precision: self.precision,
            external_data_threshold: self.external_data_threshold.saturating_mul(1 << 20),
            right_padding_only: self.right_padding_only,
        }
    }
}

impl Export {
    pub(super) fn run(self, context: &Context) -> Result<ExitCode> {
        keep_apart(&self.out, &[Path::new(&self.model)])?;
        let staged = StagedFolder::new(&self.out, self.overwrite)?;
        let checkpoint = context.checkpoint(&self.model)?;
        export(&checkpoint, &self.options.options(), staged.path())?;
        let out = staged.commit()?;
        let parameters = style::count(checkpoint.spec().num_parameters());
        println!("{} ({parameters} parameters, {})", out.join(MODEL_NAME).display(), self.options.dialect);
        Ok(ExitCode::SUCCESS)
    }
}
