//! Numbers that are kept in a file for as long as the process runs.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::{Error, Result};

/// A file that only this process has, and that is gone with it. It is read and written from any thread.
#[derive(Debug)]
pub struct ScratchFile {
    file: File,
    folder: PathBuf,
    /// Reading and writing move the file's one cursor.
    #[cfg(not(unix))]
    cursor: std::sync::Mutex<()>,
}

impl ScratchFile {
    /// A file of `bytes` zeros in a folder.
    ///
    /// # Errors
    /// When it cannot be created.
    pub fn new(folder: &Path, bytes: u64) -> Result<Self> {
        let made = tempfile::tempfile_in(folder).and_then(|file| file.set_len(bytes).map(|()| file));
        let file = made.map_err(Error::io("create a file in", folder))?;
        Ok(Self {
            file,
            folder: folder.into(),
            #[cfg(not(unix))]
            cursor: std::sync::Mutex::default(),
        })
    }

    /// Fills `bytes` with what begins at `start`.
    ///
    /// # Errors
    /// When the file ends before, or cannot be read.
    pub fn read(&self, start: u64, bytes: &mut [u8]) -> Result<()> {
        #[cfg(unix)]
        let done = std::os::unix::fs::FileExt::read_exact_at(&self.file, bytes, start);
        #[cfg(not(unix))]
        let done = self.at(start, |mut file| std::io::Read::read_exact(&mut file, bytes));
        done.map_err(Error::io("read a file in", &self.folder))
    }

    /// Writes `bytes` so that they begin at `start`.
    ///
    /// # Errors
    /// When the disk is full, or the file cannot be written.
    pub fn write(&self, start: u64, bytes: &[u8]) -> Result<()> {
        #[cfg(unix)]
        let done = std::os::unix::fs::FileExt::write_all_at(&self.file, bytes, start);
        #[cfg(not(unix))]
        let done = self.at(start, |mut file| std::io::Write::write_all(&mut file, bytes));
        done.map_err(Error::io("write to a file in", &self.folder))
    }

    #[cfg(not(unix))]
    fn at(&self, start: u64, run: impl FnOnce(&File) -> std::io::Result<()>) -> std::io::Result<()> {
        use std::io::Seek;

        let _held = self.cursor.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        (&self.file).seek(std::io::SeekFrom::Start(start))?;
        run(&self.file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_nothing_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let file = ScratchFile::new(folder.path(), 8).unwrap();
        file.write(3, b"abc").unwrap();
        let mut found = [1; 8];
        file.read(0, &mut found).unwrap();
        assert_eq!(&found, b"\0\0\0abc\0\0");
        assert!(file.read(5, &mut [0; 4]).unwrap_err().to_string().contains("cannot read a file in"));
        drop(file);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        assert!(ScratchFile::new(&folder.path().join("absent"), 8).is_err());
    }
}
