//! Folders that do not outlive the command that makes them: they are removed when they are dropped, and when a signal ends the
//! process, which drops nothing.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Those that exist now.
static UNFINISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// How often the removal of a folder is tried into which another thread still writes.
const TRIES: usize = 100;
const PAUSE: Duration = Duration::from_millis(10);

/// A folder that is removed with all that it holds.
#[derive(Debug)]
pub struct TemporaryFolder {
    path: PathBuf,
}

impl TemporaryFolder {
    /// A folder among the system's temporary ones.
    ///
    /// # Errors
    /// When it cannot be created.
    pub fn new() -> std::io::Result<Self> {
        Self::made(|| tempfile::Builder::new().prefix("prefold-").tempdir())
    }

    /// A hidden folder in `parent`, whose name ends in `suffix`.
    ///
    /// # Errors
    /// When it cannot be created.
    pub fn within(parent: &Path, suffix: &str) -> std::io::Result<Self> {
        let mut builder = tempfile::Builder::new();
        builder.prefix(".prefold-").suffix(suffix);
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755));
        Self::made(|| builder.tempdir_in(parent))
    }

    /// No signal ends the process between the making of a folder and its place in the list.
    fn made(make: impl FnOnce() -> std::io::Result<tempfile::TempDir>) -> std::io::Result<Self> {
        let mut unfinished = unfinished();
        let path = make()?.keep();
        unfinished.push(path.clone());
        Ok(Self { path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Calls `place`, which moves the folder to where it stays. No signal ends the process meanwhile.
    pub(super) fn placed<T>(self, place: impl FnOnce(&Path) -> T) -> T {
        let _held = unfinished();
        // what was moved is no longer there to be removed
        place(&self.path)
    }
}

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        let mut unfinished = unfinished();
        unfinished.retain(|path| *path != self.path);
        if let Err(error) = std::fs::remove_dir_all(&self.path)
            && error.kind() != ErrorKind::NotFound
        {
            tracing::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

fn unfinished() -> MutexGuard<'static, Vec<PathBuf>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes every temporary folder: for a process that is about to end. Threads that would make, move or drop one wait from here on
/// for the end, so that none comes after and a command whose folder is gone does not tell of it.
pub fn remove_unfinished() {
    let unfinished = unfinished();
    for path in unfinished.iter() {
        for _ in 0..TRIES {
            match std::fs::remove_dir_all(path) {
                Err(error) if error.kind() != ErrorKind::NotFound => std::thread::sleep(PAUSE),
                _ => break,
            }
        }
    }
    std::mem::forget(unfinished);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_temporary_folder_goes_with_its_content_and_stays_where_it_is_moved() {
        let root = tempfile::tempdir().unwrap();
        let folder = TemporaryFolder::within(root.path(), ".partial").unwrap();
        std::fs::write(folder.path().join("a"), "1").unwrap();
        assert!(unfinished().contains(&folder.path().to_owned()));
        drop(folder);
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0);
        let folder = TemporaryFolder::within(root.path(), ".partial").unwrap();
        let path = folder.path().to_owned();
        folder.placed(|from| std::fs::rename(from, root.path().join("kept"))).unwrap();
        assert!(root.path().join("kept").is_dir() && !path.exists() && !unfinished().contains(&path));
    }
}
