//! A folder that appears whole or not at all.

use std::path::{Path, PathBuf};

use super::{Error, MANIFEST_NAME, Result, TemporaryFolder};

/// An output folder under construction, beside its final place. [`commit`](Self::commit) renames it there; dropping it
/// without that removes everything, so that a failed command leaves nothing behind.
#[derive(Debug)]
pub struct StagedFolder {
    staging: TemporaryFolder,
    target: PathBuf,
    replaces: Replaces,
}

/// What a finished folder may take the place of; an empty folder is nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Replaces {
    Nothing,
    /// A folder with a manifest, or with nothing but what is written again.
    Own,
    Anything,
}

impl StagedFolder {
    /// Starts a folder that will become `target`; `overwrite` lets it take the place of what prefold wrote, and of nothing else.
    ///
    /// # Errors
    /// When `target` exists and `overwrite` is false (an empty folder counts as absent), when it is a file, or when the parent
    /// cannot be created or written.
    pub fn new(target: &Path, overwrite: bool) -> Result<Self> {
        Self::start(target, if overwrite { Replaces::Own } else { Replaces::Nothing })
    }

    /// Starts a folder that will take the place of `target`, whatever that is.
    ///
    /// # Errors
    /// When the parent cannot be created or written.
    pub fn over(target: &Path) -> Result<Self> {
        Self::start(target, Replaces::Anything)
    }

    fn start(target: &Path, replaces: Replaces) -> Result<Self> {
        if replaces == Replaces::Nothing && is_occupied(target) {
            return Err(Error::Exists { path: target.into() });
        }
        if replaces == Replaces::Own && is_occupied(target) && !target.is_dir() {
            return Err(Error::Foreign { path: target.into(), found: "it is a file".into() });
        }
        let parent = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        std::fs::create_dir_all(parent).map_err(Error::io("create folder", parent))?;
        let staging = TemporaryFolder::within(parent, ".partial").map_err(Error::io("create a folder in", parent))?;
        Ok(Self { staging, target: target.into(), replaces })
    }

    /// Where to write for now.
    pub fn path(&self) -> &Path {
        self.staging.path()
    }

    /// As [`commit`](Self::commit), but what was written is on the disk before the folder appears, and the folder's name
    /// before this returns: it outlives a loss of power.
    ///
    /// # Errors
    /// Those of [`commit`](Self::commit), and when the system cannot write to the disk.
    pub fn commit_synced(self) -> Result<PathBuf> {
        let entries = std::fs::read_dir(self.path()).map_err(Error::io("read", self.path()))?;
        for entry in entries.flatten() {
            sync(&entry.path())?;
        }
        sync(self.path())?;
        let target = self.commit()?;
        if let Some(parent) = target.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            sync(parent)?;
        }
        Ok(target)
    }

    /// Moves the folder to its final place. What is replaced is so only now.
    ///
    /// # Errors
    /// When what is there may not be replaced, or the rename fails; the previous content, if any, is put back.
    pub fn commit(self) -> Result<PathBuf> {
        let Self { staging, target, replaces } = self;
        staging.placed(|staging| replace(staging, &target, replaces))?;
        Ok(target)
    }
}

/// Moves a finished folder to its place; what was there is set aside until it stands.
fn replace(staging: &Path, target: &Path, replaces: Replaces) -> Result<()> {
    let mut previous = None;
    if is_occupied(target) {
        match replaces {
            Replaces::Nothing => return Err(Error::Exists { path: target.into() }),
            Replaces::Own => refuse_foreign(staging, target)?,
            Replaces::Anything => {}
        }
        let aside = staging.with_extension("previous");
        std::fs::rename(target, &aside).map_err(Error::io("move aside", target))?;
        previous = Some(aside);
    }
    if let Err(source) = std::fs::rename(staging, target) {
        if let Some(aside) = previous {
            std::fs::rename(&aside, target).map_err(Error::io("restore", target))?;
        }
        return Err(Error::Io { action: "move the finished folder to", path: target.into(), source });
    }
    if let Some(aside) = previous {
        let removed = if aside.is_dir() { std::fs::remove_dir_all(&aside) } else { std::fs::remove_file(&aside) };
        removed.map_err(Error::io("remove the replaced", &aside))?;
    }
    Ok(())
}

/// Refuses a folder without a manifest that holds what the folder that is to replace it does not.
fn refuse_foreign(staging: &Path, target: &Path) -> Result<()> {
    if target.join(MANIFEST_NAME).is_file() {
        return Ok(());
    }
    let entries = std::fs::read_dir(target).map_err(Error::io("read", target))?;
    let foreign = entries.flatten().find(|entry| !staging.join(entry.file_name()).exists());
    match foreign {
        Some(entry) => {
            let found = format!("it holds `{}`", entry.file_name().to_string_lossy());
            Err(Error::Foreign { path: target.into(), found })
        }
        None => Ok(()),
    }
}

/// Waits until the disk has a file's content, or a folder's list of names; folders are passed over on Windows, which does
/// this itself.
///
/// # Errors
/// When the file cannot be opened or written.
pub fn sync(path: &Path) -> Result<()> {
    if cfg!(windows) && path.is_dir() {
        return Ok(());
    }
    // Windows writes through handles that may write only
    let file = std::fs::OpenOptions::new().read(true).write(cfg!(windows)).open(path);
    file.and_then(|file| file.sync_all()).map_err(Error::io("write to disk", path))
}

/// Whether a path holds something that a new folder would replace.
fn is_occupied(path: &Path) -> bool {
    match std::fs::read_dir(path) {
        Ok(mut entries) => entries.next().is_some(),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => true,
        // where a file stands its place is taken, and below it there is none
        Err(_) => path.symlink_metadata().is_ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn appears_whole_or_not_at_all() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("deep/out");
        drop(StagedFolder::new(&target, false).unwrap());
        assert_eq!(std::fs::read_dir(target.parent().unwrap()).unwrap().count(), 0);

        let staged = StagedFolder::new(&target, false).unwrap();
        std::fs::write(staged.path().join("a"), "1").unwrap();
        staged.commit().unwrap();
        assert_eq!(std::fs::read_to_string(target.join("a")).unwrap(), "1");
        assert!(matches!(StagedFolder::new(&target, false), Err(Error::Exists { .. })));

        let file = target.join("a");
        assert!(matches!(StagedFolder::new(&file, false), Err(Error::Exists { .. })));
        let below = StagedFolder::new(&file.join("out"), false);
        assert!(matches!(below, Err(Error::Io { action: "create folder", path, .. }) if path == file));

        let staged = StagedFolder::over(&target).unwrap();
        std::fs::write(staged.path().join("b"), "2").unwrap();
        assert!(target.join("a").exists(), "the old content stays until the commit");
        staged.commit().unwrap();
        assert!(!target.join("a").exists() && target.join("b").exists());
        assert_eq!(std::fs::read_dir(target.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn what_prefold_did_not_write_is_not_replaced() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("home");
        let staged = |names: &[&str]| {
            let staged = StagedFolder::new(&target, true).unwrap();
            names.iter().for_each(|name| std::fs::write(staged.path().join(name), "new").unwrap());
            staged.commit()
        };
        std::fs::create_dir(&target).unwrap();
        std::fs::write(target.join("thesis.txt"), "old").unwrap();
        std::fs::write(target.join("model.onnx"), "old").unwrap();
        let error = staged(&["model.onnx"]).unwrap_err();
        assert!(matches!(&error, Error::Foreign { found, .. } if found.contains("thesis.txt")), "{error}");
        assert_eq!(std::fs::read_to_string(target.join("thesis.txt")).unwrap(), "old");
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 1, "nothing is left beside it");
        // what is written again, and a folder with a manifest
        std::fs::remove_file(target.join("thesis.txt")).unwrap();
        staged(&["model.onnx", MANIFEST_NAME, "parity.json"]).unwrap();
        staged(&["model.onnx"]).unwrap();
        assert_eq!(std::fs::read_dir(&target).unwrap().count(), 1);
        let file = target.join("model.onnx");
        assert!(matches!(StagedFolder::new(&file, true), Err(Error::Foreign { .. })));
    }
}
