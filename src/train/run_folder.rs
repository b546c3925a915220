//! A training run on disk.
//!
//! ```text
//! out/
//! ├── metrics.jsonl                      one line per step and per evaluation
//! ├── evaluation.json                    the last evaluation, with every class
//! ├── report.html                        the curves
//! ├── tensorboard/                       event files, where asked for
//! ├── checkpoints/step-000100/           adapter, optimizer.safetensors, state.json
//! ├── best/                              the best checkpoint, where one is looked for
//! ├── adapter_config.json                the trained adapter, written last
//! └── adapter_model.safetensors
//! ```

use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::checkpoint::{self, Saved, State};
use super::{AdamW, Error, Evaluation, Result};
use crate::adapter::{Adapter, CONFIG_NAME, WEIGHTS_NAME};
use crate::files;

/// File name of the metrics.
pub const METRICS_NAME: &str = "metrics.jsonl";
/// File name of the last evaluation.
pub const EVALUATION_NAME: &str = "evaluation.json";
const CHECKPOINTS: &str = "checkpoints";
const BEST: &str = "best";
/// What folders under construction begin with.
const PARTIAL: &str = ".prefold-";

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
        if Self::check(path, overwrite)? {
            std::fs::remove_dir_all(path).map_err(files::Error::io("replace", path))?;
        }
        std::fs::create_dir_all(path).map_err(files::Error::io("create folder", path))?;
        // the mark of a run, however early it is killed
        let metrics = path.join(METRICS_NAME);
        std::fs::write(&metrics, "").map_err(files::Error::io("write", &metrics))?;
        Ok(Self { path: path.into(), created: true })
    }

    /// Whether [`create`](Self::create) would remove an earlier run.
    ///
    /// # Errors
    /// When it would refuse the folder.
    pub fn check(path: &Path, overwrite: bool) -> Result<bool> {
        let occupied = std::fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_some());
        if occupied && !(overwrite && is_run(path)) {
            return Err(files::Error::Exists { path: path.into() }.into());
        }
        Ok(occupied)
    }

    /// Opens the folder of a run to go on with it: from its newest checkpoint, or from the start where it was stopped
    /// before the first. What a killed process left half written is removed.
    ///
    /// # Errors
    /// When it holds no run.
    pub fn resume(path: &Path) -> Result<Self> {
        if !is_run(path) && !path.join(BEST).exists() {
            return Err(Error::NothingToResume { path: path.into() });
        }
        for folder in [path.to_path_buf(), path.join(CHECKPOINTS)] {
            let Ok(entries) = std::fs::read_dir(&folder) else { continue };
            let is_partial = |entry: &std::fs::DirEntry| entry.file_name().to_string_lossy().starts_with(PARTIAL);
            for entry in entries.flatten().filter(is_partial) {
                remove(&entry.path());
            }
        }
        let folder = Self { path: path.into(), created: false };
        if folder.checkpoints().is_empty() && path.join(WEIGHTS_NAME).exists() {
            let path = path.display();
            tracing::warn!("{path} holds a finished run and no checkpoint to go on from: it is trained from its start");
        }
        Ok(folder)
    }

    /// The folder as it is read by processes of a run that do not write: all but the first.
    pub fn follow(path: &Path) -> Self {
        Self { path: path.into(), created: false }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the folder where this run made it and has not come to a checkpoint.
    pub fn discard_without_checkpoint(&self) {
        if self.created && self.checkpoints().is_empty() && !self.path.join(BEST).exists() {
            remove(&self.path);
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
        Ok(file.write_all(format!("{json}\n").as_bytes()).map_err(files::Error::io("write", &path))?)
    }

    /// Writes an evaluation with everything about its classes.
    pub(super) fn write_evaluation(&self, step: usize, evaluation: &Evaluation) -> Result<()> {
        #[derive(Serialize)]
        struct Full<'a> {
            step: usize,
            #[serde(flatten)]
            evaluation: &'a Evaluation,
            #[serde(skip_serializing_if = "Option::is_none")]
            classification: Option<&'a super::Classification>,
        }
        let full = Full { step, evaluation, classification: evaluation.classification.as_ref() };
        self.replace(EVALUATION_NAME, |path| Ok(files::write_json(path, "an evaluation", &full)?))
    }

    /// Writes the trained adapter. Its configuration, which makes the folder an adapter, comes last.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn finish(&self, adapter: &Adapter) -> Result<()> {
        let staged = tempfile::Builder::new()
            .prefix(PARTIAL)
            .tempdir_in(&self.path)
            .map_err(files::Error::io("create a folder in", &self.path))?;
        adapter.save(staged.path())?;
        for name in [WEIGHTS_NAME, CONFIG_NAME] {
            files::sync(&staged.path().join(name))?;
            let target = self.path.join(name);
            std::fs::rename(staged.path().join(name), &target).map_err(files::Error::io("write", &target))?;
        }
        Ok(files::sync(&self.path)?)
    }

    /// Writes a file under another name and puts it in place of the old one.
    ///
    /// # Errors
    /// Those of `write`, and when the file cannot be renamed.
    pub(super) fn replace(&self, name: &str, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let (partial, target) = (self.path.join(format!("{PARTIAL}{name}")), self.path.join(name));
        write(&partial)?;
        Ok(std::fs::rename(&partial, &target).map_err(files::Error::io("write", &target))?)
    }

    /// Drops the metrics of steps after `step`, all of them for none: a killed run may have logged more than it saved.
    pub(super) fn rewind_metrics(&self, step: Option<usize>) -> Result<()> {
        let path = self.path.join(METRICS_NAME);
        let Ok(text) = std::fs::read(&path) else { return Ok(()) };
        let text = String::from_utf8_lossy(&text);
        let kept = text.lines().filter(|line| {
            let step_of = |v: serde_json::Value| v.get("step").and_then(serde_json::Value::as_u64);
            serde_json::from_str(line)
                .ok()
                .and_then(step_of)
                .is_some_and(|s| step.is_some_and(|step| s as usize <= step))
        });
        let kept: String = kept.flat_map(|line| [line, "\n"]).collect();
        self.replace(METRICS_NAME, |path| Ok(std::fs::write(path, kept).map_err(files::Error::io("write", path))?))
    }

    /// The checkpoints with their steps, the newest last.
    fn checkpoints(&self) -> Vec<(usize, PathBuf)> {
        let Ok(entries) = std::fs::read_dir(self.path.join(CHECKPOINTS)) else { return Vec::new() };
        let step = |path: &Path| path.file_name()?.to_string_lossy().strip_prefix("step-")?.parse::<usize>().ok();
        let mut found: Vec<_> = entries.flatten().filter_map(|e| Some((step(&e.path())?, e.path()))).collect();
        found.sort();
        found
    }

    /// The newest checkpoint's path.
    pub fn newest_checkpoint(&self) -> Option<PathBuf> {
        self.checkpoints().pop().map(|(_, path)| path)
    }

    /// Writes a checkpoint, and removes old ones so that `limit` are left.
    pub(super) fn save(
        &self,
        adapter: &Adapter,
        optimizer: &AdamW,
        state: &State,
        limit: Option<usize>,
    ) -> Result<PathBuf> {
        let target = self.path.join(CHECKPOINTS).join(format!("step-{:06}", state.step));
        checkpoint::write(&target, adapter, optimizer, state)?;
        let older: Vec<PathBuf> =
            self.checkpoints().into_iter().filter(|(step, _)| *step < state.step).map(|(_, path)| path).collect();
        let surplus = limit.map_or(0, |limit| (older.len() + 1).saturating_sub(limit));
        for path in &older[..surplus.min(older.len())] {
            // out of sight first: a half removed checkpoint is none
            let aside = path.with_file_name(format!("{PARTIAL}removed"));
            if std::fs::rename(path, &aside).is_ok() {
                remove(&aside);
            }
        }
        Ok(target)
    }

    /// Writes the best checkpoint so far in place of the one before.
    pub(super) fn save_best(&self, adapter: &Adapter, optimizer: &AdamW, state: &State) -> Result<()> {
        checkpoint::write(&self.path.join(BEST), adapter, optimizer, state)
    }

    /// Reads the best checkpoint, which must be that of `step`.
    pub(super) fn load_best(&self, step: usize) -> Result<Adapter> {
        let path = self.path.join(BEST);
        let saved = checkpoint::read(&path)?;
        if saved.state.step != step {
            let why = format!("it is of step {}, but the run's best was step {step}", saved.state.step);
            return Err(Error::Checkpoint { path, why });
        }
        Ok(saved.adapter)
    }

    /// Reads the newest checkpoint that is whole; damaged ones are passed over with a warning.
    ///
    /// # Errors
    /// When there are checkpoints and none can be read, or one is of another version.
    pub(super) fn load(&self) -> Result<Option<Saved>> {
        let mut failure = None;
        for (step, path) in self.checkpoints().into_iter().rev() {
            let named = |saved: Saved| match saved.state.step {
                found if found == step => Ok(saved),
                found => {
                    let why = format!("its state is of step {found}, its name says {step}");
                    Err(Error::Checkpoint { path: path.clone(), why })
                }
            };
            match checkpoint::read(&path).and_then(named) {
                Ok(saved) => {
                    if let Some(error) = failure {
                        tracing::warn!("{error}; going on from {}", path.display());
                    }
                    return Ok(Some(saved));
                }
                Err(error @ Error::Checkpoint { .. }) => {
                    failure.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        }
        failure.map_or(Ok(None), Err)
    }
}

/// Whether a folder is that of a training run.
fn is_run(path: &Path) -> bool {
    [METRICS_NAME, CHECKPOINTS, CONFIG_NAME].iter().any(|name| path.join(name).exists())
}

fn remove(path: &Path) {
    let removed = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
    if let Err(error) = removed {
        tracing::warn!("could not remove {}: {error}", path.display());
    }
}
