//! A training run on disk.
//!
//! ```text
//! out/
//! ├── metrics.jsonl                      one line per step and per evaluation
//! ├── checkpoints/step-000100/           adapter, optimizer.safetensors, state.json
//! ├── adapter_config.json                the trained adapter, written last
//! └── adapter_model.safetensors
//! ```

use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::Device;
use serde::{Deserialize, Serialize};

use super::{AdamW, Error, Result, TrainConfig};
use crate::adapter::Adapter;
use crate::data::Cursor;
use crate::files::{self, StagedFolder};

/// File name of the metrics.
pub const METRICS_NAME: &str = "metrics.jsonl";
const CHECKPOINTS: &str = "checkpoints";
const OPTIMIZER_NAME: &str = "optimizer.safetensors";
const STATE_NAME: &str = "state.json";

/// What a checkpoint holds besides tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct State {
    /// Optimizer steps done.
    pub(super) step: usize,
    /// Where in the training data the next batch begins.
    pub(super) cursor: Cursor,
    /// SHA-256 over the token ids of the training examples.
    pub(super) data: String,
    /// The options of the run.
    pub(super) config: TrainConfig,
}

/// The folder that a run writes to.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    created: bool,
}

impl RunFolder {
    /// Starts a run in a new or empty folder. With `overwrite`, what an earlier run left there is removed.
    ///
    /// # Errors
    /// When the folder holds something and `overwrite` is false, or it cannot be created.
    pub fn create(path: &Path, overwrite: bool) -> Result<Self> {
        let occupied = std::fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_some());
        if occupied && !overwrite {
            return Err(files::Error::Exists { path: path.into() }.into());
        }
        if occupied {
            std::fs::remove_dir_all(path).map_err(files::Error::io("replace", path))?;
        }
        let created = !path.exists();
        std::fs::create_dir_all(path).map_err(files::Error::io("create folder", path))?;
        Ok(Self { path: path.into(), created })
    }

    /// Opens the folder of a run to go on with it.
    ///
    /// # Errors
    /// When it holds no checkpoint.
    pub fn resume(path: &Path) -> Result<Self> {
        let folder = Self { path: path.into(), created: false };
        match folder.newest_checkpoint() {
            Some(_) => Ok(folder),
            None => Err(Error::NothingToResume { path: path.into() }),
        }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the folder where this run made it and nothing worth keeping is in it.
    pub fn discard_if_empty(&self) {
        if self.created && self.newest_checkpoint().is_none() && std::fs::remove_dir_all(&self.path).is_err() {
            tracing::warn!("could not remove {}", self.path.display());
        }
    }

    /// Appends a line to the metrics.
    pub(super) fn log(&self, line: &impl Serialize) -> Result<()> {
        let path = self.path.join(METRICS_NAME);
        let json = serde_json::to_string(line).map_err(|source| files::Error::Json {
            path: path.clone(),
            what: "a line of metrics",
            source,
        })?;
        let mut file = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(files::Error::io("open", &path))?;
        Ok(writeln!(file, "{json}").map_err(files::Error::io("write", &path))?)
    }

    /// Drops the metrics of steps after `step`: a killed run may have logged more than it saved.
    pub(super) fn rewind_metrics(&self, step: usize) -> Result<()> {
        let path = self.path.join(METRICS_NAME);
        let Ok(text) = std::fs::read_to_string(&path) else { return Ok(()) };
        let kept = text.lines().filter(|line| {
            let step_of = |v: serde_json::Value| v.get("step").and_then(serde_json::Value::as_u64);
            serde_json::from_str(line).ok().and_then(step_of).is_some_and(|s| s as usize <= step)
        });
        let kept: String = kept.flat_map(|line| [line, "\n"]).collect();
        Ok(std::fs::write(&path, kept).map_err(files::Error::io("write", &path))?)
    }

    fn newest_checkpoint(&self) -> Option<PathBuf> {
        let entries = std::fs::read_dir(self.path.join(CHECKPOINTS)).ok()?;
        let is_checkpoint = |p: &PathBuf| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("step-"));
        entries.flatten().map(|e| e.path()).filter(is_checkpoint).max()
    }

    /// Writes a checkpoint, whole or not at all.
    pub(super) fn save(&self, adapter: &Adapter, optimizer: &AdamW, state: &State) -> Result<PathBuf> {
        let target = self.path.join(CHECKPOINTS).join(format!("step-{:06}", state.step));
        let staged = StagedFolder::new(&target, true)?;
        adapter.save(staged.path())?;
        let tensors: std::collections::HashMap<String, candle_core::Tensor> = optimizer.state().into_iter().collect();
        let path = staged.path().join(OPTIMIZER_NAME);
        candle_core::safetensors::save(&tensors, &path).map_err(Error::candle("saving the optimizer"))?;
        files::write_json(&staged.path().join(STATE_NAME), "a training state", state)?;
        Ok(staged.commit()?)
    }

    /// Reads the newest checkpoint.
    pub(super) fn load(&self) -> Result<Option<Saved>> {
        let Some(path) = self.newest_checkpoint() else { return Ok(None) };
        let optimizer = path.join(OPTIMIZER_NAME);
        let moments = candle_core::safetensors::load(&optimizer, &Device::Cpu)
            .map_err(|e| Error::Resume { path: path.clone(), why: format!("{OPTIMIZER_NAME}: {e}") })?;
        let state = files::read_json(&path.join(STATE_NAME), "a training state")?;
        Ok(Some(Saved { adapter: Adapter::open(&path)?, moments, state, path }))
    }
}

/// A checkpoint that was read back.
pub(super) struct Saved {
    pub(super) path: PathBuf,
    pub(super) adapter: Adapter,
    pub(super) moments: std::collections::HashMap<String, candle_core::Tensor>,
    pub(super) state: State,
}
