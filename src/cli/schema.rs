//! `prefold schema`

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use miette::{IntoDiagnostic, Result};
use schemars::{Schema as JsonSchema, schema_for};

use crate::adapter::AdapterConfig;
use crate::files::{self, Manifest};
use crate::parity::Report;

/// Write the JSON schemas of the files that prefold reads and writes
#[derive(Args, Debug)]
pub(super) struct Schema {
    /// Folder to write
    #[arg(long, default_value = "schemas")]
    out: PathBuf,
}

/// File name and schema of every file format.
pub fn schemas() -> [(&'static str, JsonSchema); 5] {
    [
        ("train.schema.json", schema_for!(super::train::RunConfig)),
        ("adapter_config.schema.json", schema_for!(AdapterConfig)),
        ("parity.schema.json", schema_for!(Report)),
        ("prefold.schema.json", schema_for!(Manifest)),
        ("fold_facts.schema.json", schema_for!(super::site_proof::FoldFacts)),
    ]
}

impl Schema {
    pub(super) fn run(self) -> Result<ExitCode> {
        std::fs::create_dir_all(&self.out).into_diagnostic()?;
        for (name, schema) in schemas() {
            let path = self.out.join(name);
            files::write_json(&path, "a JSON schema", &schema)?;
            println!("{}", path.display());
        }
        Ok(ExitCode::SUCCESS)
    }
}
