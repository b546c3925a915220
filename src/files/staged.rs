//! A folder that appears whole or not at all.

use std::path::{Path, PathBuf};

use super::{Error, Result, TemporaryFolder};

/// An output folder under construction, beside its final place. [`commit`](Self::commit) renames it there; dropping it
/// without that removes everything, so that a failed command leaves nothing behind.
#[derive(Debug)]
pub struct StagedFolder {
    staging: TemporaryFolder,
    target: PathBuf,
    overwrite: bool,
}

impl StagedFolder {
    /// Starts a folder that will become `target`.
    ///
    /// # Errors
    /// When `target` exists and `overwrite` is false (an empty folder counts as absent), or when the parent cannot be
    /// created or written.
    pub fn new(target: &Path, overwrite: bool) -> Result<Self> {
        if !overwrite && is_occupied(target) {
            return Err(Error::Exists { path: target.into() });
        }
        let parent = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        std::fs::create_dir_all(parent).map_err(Error::io("create folder", parent))?;
        let staging = TemporaryFolder::within(parent, ".partial").map_err(Error::io("create a folder in", parent))?;
        Ok(Self { staging, target: target.into(), overwrite })
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

    /// Moves the folder to its final place. With `overwrite`, what was there is replaced only now.
    ///
    /// # Errors
    /// When the rename fails; the previous content, if any, is put back.
    pub fn commit(self) -> Result<PathBuf> {
        let Self { staging, target, overwrite } = self;
        staging.placed(|staging| replace(staging, &target, overwrite))?;
        Ok(target)
    }
}

/// Moves a finished folder to its place; what was there is set aside until it stands.
fn replace(staging: &Path, target: &Path, overwrite: bool) -> Result<()> {
    let mut previous = None;
    if is_occupied(target) {
        if !overwrite {
            return Err(Error::Exists { path: target.into() });
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
        // a file stands where a folder would be: its own place is taken, and below it there is none
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => path.symlink_metadata().is_ok(),
        Err(error) => error.kind() != std::io::ErrorKind::NotFound,
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

        let staged = StagedFolder::new(&target, true).unwrap();
        std::fs::write(staged.path().join("b"), "2").unwrap();
        assert!(target.join("a").exists(), "the old content stays until the commit");
        staged.commit().unwrap();
        assert!(!target.join("a").exists() && target.join("b").exists());
        assert_eq!(std::fs::read_dir(target.parent().unwrap()).unwrap().count(), 1);
    }
}
