//! The files around a graph: its external data, configuration and tokenizer, brought to the folder of the edited graph.
//!
//! Data files are moved as files and never parsed. The default is a copy, which shares its blocks with the first where the
//! file system can: the `onnx` package from version 1.23 on refuses a data file that has several hard links. Neither a
//! symbolic link nor a location outside of the graph's folder would be accepted by the runtimes.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Error, Result};
use crate::files::{self, Carried};
use crate::onnx::{
    self, DataFile, MODEL_NAME, Model, NEWEST_IR, NEWEST_OPSET, check_any_order, data_files, external_files,
};

/// How the external data of a graph comes to the folder of another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Carry {
    /// As a file of its own.
    #[default]
    Copy,
    /// As a hard link: at once and without space, where both folders are on one disk. The `onnx` package refuses such
    /// files; runtimes do not.
    Link,
}

/// A data file in its new folder.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct CarriedFile {
    /// Its place in the folder.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// How it came there.
    pub by: Carried,
}

/// Files that travel with a graph beside its data.
const COMPANIONS: [&str; 14] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "genai_config.json",
];

/// Opens a graph that holds together: its structure is checked, and its data files are there and long enough.
pub(super) fn open(graph: &Path, source: &Path) -> Result<(Model, Vec<DataFile>)> {
    let model = Model::open(graph)?;
    let (ir, opset) = (model.ir_version(), model.opset("").unwrap_or(0));
    if ir > NEWEST_IR || opset > NEWEST_OPSET {
        tracing::warn!(
            "the graph is of IR version {ir}, operator set {opset}; known here are {NEWEST_IR} and {NEWEST_OPSET}"
        );
    }
    let checked = check_any_order(&model).and_then(|()| data_files(&model, source));
    let in_file = |source| onnx::Error::InFile { path: graph.into(), source: Box::new(source) };
    Ok((model, checked.map_err(in_file)?))
}

/// Brings those data files that `model` still refers to, and the companions found in `source`, to `folder`.
pub(super) fn carry(
    model: &Model,
    data: &[DataFile],
    source: &Path,
    folder: &Path,
    how: Carry,
) -> Result<Vec<CarriedFile>> {
    let plain = |name: &String| Path::new(name).components().filter(|c| *c != Component::CurDir).collect::<PathBuf>();
    let used: BTreeSet<PathBuf> = external_files(model)?.iter().map(plain).collect();
    let data = data.iter().filter(|file| used.contains(&file.location));
    let carried = data.map(|file| carry_data(file, folder, how)).collect::<Result<Vec<_>>>()?;
    for name in COMPANIONS {
        let (from, to) = (source.join(name), folder.join(name));
        if from.is_file() && !to.exists() {
            std::fs::copy(&from, &to).map_err(files::Error::io("copy", &from))?;
        }
    }
    Ok(carried)
}

fn carry_data(file: &DataFile, folder: &Path, how: Carry) -> Result<CarriedFile> {
    let (name, to) = (file.location.display().to_string(), folder.join(&file.location));
    let reserved = [MODEL_NAME, files::MANIFEST_NAME].map(Path::new).contains(&file.location.as_path());
    if reserved || to.symlink_metadata().is_ok() {
        return Err(Error::NameTaken { name });
    }
    if let Some(parent) = to.parent() {
        std::fs::create_dir_all(parent).map_err(files::Error::io("create folder", parent))?;
    }
    let by = match how {
        Carry::Copy => files::copy_file(&file.path, &to)?,
        Carry::Link => files::link_file(&file.path, &to).or_else(|reason| {
            tracing::warn!("{reason}; it is copied instead");
            files::copy_file(&file.path, &to)
        })?,
    };
    Ok(CarriedFile { name, bytes: file.bytes, by })
}
