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
use crate::adapter::{Adapter, CONFIG_NAME, WEIGHTS_NAME};
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
    /// When the folder holds something, unless it is an earlier run and `overwrite` is true; or it cannot be created.
    pub fn create(path: &Path, overwrite: bool) -> Result<Self> {
        let occupied = std::fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_some());
        if occupied && !(overwrite && is_run(path)) {
            return Err(files::Error::Exists { path: path.into() }.into());
        }
        if occupied {
            std::fs::remove_dir_all(path).map_err(files::Error::io("replace", path))?;
        }
        std::fs::create_dir_all(path).map_err(files::Error::io("create folder", path))?;
        Ok(Self { path: path.into(), created: true })
    }

    /// Opens the folder of a run to go on with it: from its newest checkpoint, or from the start where it was stopped
    /// before the first.
    ///
    /// # Errors
    /// When it holds no run.
    pub fn resume(path: &Path) -> Result<Self> {
        if !is_run(path) {
            return Err(Error::NothingToResume { path: path.into() });
        }
        Ok(Self { path: path.into(), created: false })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the folder where this run made it and has not come to a checkpoint.
    pub fn discard_without_checkpoint(&self) {
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

    /// Writes the trained adapter. Its configuration, which makes the folder an adapter, comes last.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn finish(&self, adapter: &Adapter) -> Result<()> {
        let staged = tempfile::tempdir_in(&self.path).map_err(files::Error::io("create a folder in", &self.path))?;
        adapter.save(staged.path())?;
        for name in [WEIGHTS_NAME, CONFIG_NAME] {
            let target = self.path.join(name);
            std::fs::rename(staged.path().join(name), &target).map_err(files::Error::io("write", &target))?;
        }
        Ok(())
    }

    /// Drops the metrics of steps after `step`, all of them for none: a killed run may have logged more than it saved.
    pub(super) fn rewind_metrics(&self, step: Option<usize>) -> Result<()> {
        let path = self.path.join(METRICS_NAME);
        let Ok(text) = std::fs::read_to_string(&path) else { return Ok(()) };
        let kept = text.lines().filter(|line| {
            let step_of = |v: serde_json::Value| v.get("step").and_then(serde_json::Value::as_u64);
            serde_json::from_str(line)
                .ok()
                .and_then(step_of)
                .is_some_and(|s| step.is_some_and(|step| s as usize <= step))
        });
        let kept: String = kept.flat_map(|line| [line, "\n"]).collect();
        Ok(std::fs::write(&path, kept).map_err(files::Error::io("write", &path))?)
    }

    fn newest_checkpoint(&self) -> Option<PathBuf> {
        let entries = std::fs::read_dir(self.path.join(CHECKPOINTS)).ok()?;
        let step = |path: &Path| path.file_name()?.to_string_lossy().strip_prefix("step-")?.parse::<usize>().ok();
        entries.flatten().filter_map(|e| Some((step(&e.path())?, e.path()))).max().map(|(_, path)| path)
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

/// Whether a folder is that of a training run.
fn is_run(path: &Path) -> bool {
    [METRICS_NAME, CHECKPOINTS, CONFIG_NAME].iter().any(|name| path.join(name).exists())
}

/// A checkpoint that was read back.
pub(super) struct Saved {
    pub(super) path: PathBuf,
    pub(super) adapter: Adapter,
    pub(super) moments: std::collections::HashMap<String, candle_core::Tensor>,
    pub(super) state: State,
}
