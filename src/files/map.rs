//! The one place where a file is mapped into memory.
#![allow(unsafe_code)] // memory maps: see `MappedFile::open`

use std::fs::File;
use std::path::{Path, PathBuf};

use super::{Error, Result};

/// A read-only memory-mapped file.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    map: Option<memmap2::Mmap>,
}

impl MappedFile {
    /// Maps a file. An empty file maps to an empty slice.
    ///
    /// # Errors
    /// When the path is missing, is a folder, or cannot be mapped.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let metadata = file.metadata().map_err(Error::io("open", path))?;
        if metadata.is_dir() {
            let source = std::io::Error::new(std::io::ErrorKind::IsADirectory, "it is a folder, not a file");
            return Err(Error::Io { action: "open", path: path.into(), source });
        }
        let map = if metadata.len() == 0 {
            None
        } else {
            // SAFETY: the map is read-only and private. As for every memory-mapped model file, another process that
            // truncates it while it is mapped ends this one with SIGBUS; that is the price of not copying the weights.
            Some(unsafe { memmap2::Mmap::map(&file) }.map_err(Error::io("map", path))?)
        };
        Ok(Self { path: path.into(), map })
    }

    /// The file's bytes.
    pub fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or(&[])
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }
}
