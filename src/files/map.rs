//! The one place where a file is mapped into memory.
#![allow(unsafe_code)] // memory maps: see `MappedFile::open`

use std::path::{Path, PathBuf};

use super::{Error, Result};

/// A multiple of every common page size.
#[cfg(unix)]
const PAGE: usize = 1 << 16;

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
        let file = super::open(path)?;
        let metadata = file.metadata().map_err(Error::io("open", path))?;
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

    /// Lets go of the pages of a range that has been read: the system would count them as this process's memory until it
    /// wants them back. What is read again later comes from the file again.
    pub fn forget(&self, range: std::ops::Range<usize>) {
        #[cfg(unix)]
        if let Some(map) = &self.map {
            // whole pages only: neighbours of the range may be in use
            let (start, end) = (range.start.next_multiple_of(PAGE), range.end.min(map.len()) / PAGE * PAGE);
            if start < end {
                // SAFETY: the map is read-only and backed by its file, so pages that are dropped come back as they were.
                let advised =
                    unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start) };
                if let Err(error) = advised {
                    tracing::debug!("{}: pages cannot be released: {error}", self.path.display());
                }
            }
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }
}
