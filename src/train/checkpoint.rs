//! The state of a run on disk: adapter, optimizer, step, data cursor.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::control::Progress;
use super::{AdamW, Error, Fingerprint, Result, TrainConfig};
use crate::adapter::{Adapter, CONFIG_NAME, WEIGHTS_NAME};
use crate::data::Cursor;
use crate::files::{self, MappedFile, StagedFolder};

/// The layout of checkpoints that this version writes and reads.
const VERSION: u64 = 2;

const OPTIMIZER_NAME: &str = "optimizer.safetensors";
const STATE_NAME: &str = "state.json";
/// The files whose hashes `state.json` holds.
const HASHED: [&str; 3] = [CONFIG_NAME, WEIGHTS_NAME, OPTIMIZER_NAME];

/// What a checkpoint holds besides tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct State {
    /// Optimizer steps done.
    pub(super) step: usize,
    /// Where in the training data the next batch begins.
    pub(super) cursor: Cursor,
    /// SHA-256 over the token ids of the training examples.
    pub(super) data: String,
    /// The base model.
    pub(super) base: Fingerprint,
    /// The options of the run.
    pub(super) config: TrainConfig,
    /// The run's figures.
    pub(super) progress: Progress,
    /// The processes that shared the run.
    #[serde(default = "one")]
    pub(super) processes: usize,
}

fn one() -> usize {
    1
}

/// `state.json`.
#[derive(Serialize, Deserialize)]
struct StateFile {
    version: u64,
    /// SHA-256 of the other files.
    files: BTreeMap<String, String>,
    state: State,
}

/// A checkpoint that was read back.
pub(super) struct Saved {
    pub(super) path: PathBuf,
    pub(super) adapter: Adapter,
    /// What [`AdamW::save`] wrote.
    pub(super) moments: MappedFile,
    pub(super) state: State,
}

/// Writes a checkpoint to `target`, whole or not at all, and waits until the disk has it.
pub(super) fn write(target: &Path, adapter: &Adapter, optimizer: &AdamW, state: &State) -> Result<()> {
    let staged = StagedFolder::over(target)?;
    adapter.save(staged.path())?;
    let path = staged.path().join(OPTIMIZER_NAME);
    optimizer.save(&path).map_err(|why| Error::Checkpoint { path, why: format!("cannot be written: {why}") })?;
    let hash = |name: &str| Ok((name.to_owned(), files::sha256_file(&staged.path().join(name))?));
    let files = HASHED.into_iter().map(hash).collect::<Result<_>>()?;
    let file = StateFile { version: VERSION, files, state: state.clone() };
    files::write_json(&staged.path().join(STATE_NAME), "a training state", &file)?;
    staged.commit_synced()?;
    Ok(())
}

/// Reads a checkpoint whose every file is as it was written.
pub(super) fn read(path: &Path) -> Result<Saved> {
    let damaged = |why: String| Error::Checkpoint { path: path.into(), why };
    let text = std::fs::read(path.join(STATE_NAME)).map_err(|e| damaged(format!("{STATE_NAME}: {e}")))?;
    let value: serde_json::Value =
        serde_json::from_slice(&text).map_err(|e| damaged(format!("{STATE_NAME} is not JSON: {e}")))?;
    match value.get("version").map(serde_json::Value::as_u64) {
        Some(Some(VERSION)) => {}
        found => {
            let found = found.flatten().map_or("1".into(), |version| version.to_string());
            return Err(Error::CheckpointVersion { path: path.into(), found, expected: VERSION });
        }
    }
    let file: StateFile = serde_json::from_value(value).map_err(|e| damaged(format!("{STATE_NAME}: {e}")))?;
    for name in HASHED {
        let found = files::sha256_file(&path.join(name)).map_err(|e| damaged(e.to_string()))?;
        if file.files.get(name) != Some(&found) {
            return Err(damaged(format!("{name} is not what was written: its sha256 differs")));
        }
    }
    let moments = MappedFile::open(&path.join(OPTIMIZER_NAME)).map_err(|e| damaged(e.to_string()))?;
    let adapter = Adapter::open(path).map_err(|e| damaged(e.to_string()))?;
    Ok(Saved { path: path.into(), adapter, moments, state: file.state })
}
