//! The manifest that every output folder carries.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Result;

/// The manifest's file name inside an output folder.
pub const MANIFEST_NAME: &str = "prefold.json";

/// What a command made, from what, and how.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Manifest {
    /// Version of this layout.
    pub schema_version: u32,
    /// The tool that wrote the folder, with its version.
    pub tool: String,
    /// The command: `export`, `fold`, `train`, ….
    pub command: String,
    /// Input files with their hashes.
    pub inputs: Vec<FileFact>,
    /// Output files with their hashes.
    pub outputs: Vec<FileFact>,
    /// The options in force.
    pub options: serde_json::Value,
    /// What the command found or decided, in its own terms.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub facts: serde_json::Value,
}

/// One file, by role and content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FileFact {
    /// The file's part: `graph`, `weights`, `adapter`, ….
    pub role: String,
    /// File name, without its folder.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
    /// SHA-256 in hexadecimal.
    pub sha256: String,
}

impl FileFact {
    /// Describes a file.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn of(role: &str, path: &Path) -> Result<Self> {
        let bytes = std::fs::metadata(path).map_err(super::Error::io("read", path))?.len();
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(Self { role: role.into(), name, bytes, sha256: super::sha256_file(path)? })
    }
}

impl Manifest {
    /// A manifest for `command` with nothing in it yet.
    pub fn new(command: &str, options: serde_json::Value) -> Self {
        Self {
            schema_version: 1,
            tool: format!("prefold {}", env!("CARGO_PKG_VERSION")),
            command: command.into(),
            inputs: Vec::new(),
            outputs: Vec::new(),
            options,
            facts: serde_json::Value::Null,
        }
    }

    /// Adds an input file.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn input(mut self, role: &str, path: &Path) -> Result<Self> {
        self.inputs.push(FileFact::of(role, path)?);
        Ok(self)
    }

    /// Adds an output file.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn output(mut self, role: &str, path: &Path) -> Result<Self> {
        self.outputs.push(FileFact::of(role, path)?);
        Ok(self)
    }

    /// Writes the manifest into a folder.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        super::write_json(&folder.join(MANIFEST_NAME), "a prefold manifest", self)
    }
}
