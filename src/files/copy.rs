//! Bringing large files to another folder: linked, sharing their blocks, or copied with their holes.
#![allow(unsafe_code)] // lseek: see `seek`

use std::fs::File;
use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Error, Result};

/// How a file came to its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Carried {
    /// It is the same file under a second name.
    Linked,
    /// It is a file of its own, which shares its blocks with the first until either is written to.
    Reflinked,
    /// It was copied.
    Copied,
}

/// Gives a file a second name.
///
/// # Errors
/// When the file system cannot, as between two disks, or `to` exists.
pub fn link_file(from: &Path, to: &Path) -> Result<Carried> {
    std::fs::hard_link(from, to).map_err(Error::io("make a hard link to", from))?;
    Ok(Carried::Linked)
}

/// Copies a file: by sharing its blocks where the file system can (Btrfs, XFS, APFS, ReFS), else its content, of which
/// holes stay holes on Linux.
///
/// # Errors
/// When `to` exists, or a file cannot be read or written.
pub fn copy_file(from: &Path, to: &Path) -> Result<Carried> {
    let source = super::open(from)?;
    if reflink_copy::reflink(from, to).is_ok() {
        return Ok(Carried::Reflinked);
    }
    let target = File::create_new(to).map_err(Error::io("create", to))?;
    copy_content(&source, &target).map_err(Error::io("copy", from))?;
    Ok(Carried::Copied)
}

#[cfg(target_os = "linux")]
fn copy_content(source: &File, target: &File) -> std::io::Result<()> {
    use std::io::{Error, ErrorKind, Read, Seek, SeekFrom};

    let size = source.metadata()?.len();
    let mut at = 0;
    while at < size
        && let Some(start) = seek(source, at, libc::SEEK_DATA)?
    {
        let end = seek(source, start, libc::SEEK_HOLE)?.unwrap_or(size);
        let (mut from, mut to) = (source, target);
        from.seek(SeekFrom::Start(start))?;
        to.seek(SeekFrom::Start(start))?;
        if std::io::copy(&mut from.take(end - start), &mut to)? < end - start {
            return Err(Error::new(ErrorKind::UnexpectedEof, "the file became shorter while it was copied"));
        }
        at = end;
    }
    target.set_len(size)
}

#[cfg(not(target_os = "linux"))]
fn copy_content(mut source: &File, mut target: &File) -> std::io::Result<()> {
    std::io::copy(&mut source, &mut target)?;
    Ok(())
}

/// Where the next data or hole begins at or after `from`; none when there is none before the file's end.
#[cfg(target_os = "linux")]
fn seek(file: &File, from: u64, what: libc::c_int) -> std::io::Result<Option<u64>> {
    use std::os::fd::AsRawFd;

    let from = i64::try_from(from).map_err(std::io::Error::other)?;
    // SAFETY: the descriptor is open as long as `file` is borrowed, and lseek touches no memory of this process.
    let found = unsafe { libc::lseek64(file.as_raw_fd(), from, what) };
    match u64::try_from(found) {
        Ok(found) => Ok(Some(found)),
        Err(_) => match std::io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, SeekFrom, Write};

    use super::*;

    /// A file of `size` bytes that holds "data" at each of some offsets, and nothing elsewhere.
    fn sparse(path: &Path, size: u64, at: &[u64]) {
        let mut file = File::create(path).unwrap();
        file.set_len(size).unwrap();
        for &at in at {
            file.seek(SeekFrom::Start(at)).unwrap();
            file.write_all(b"data").unwrap();
        }
    }

    #[test]
    fn a_copy_holds_what_the_file_holds() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for (number, (size, data)) in
            [(0, &[][..]), (1 << 20, &[]), (4, &[0]), (3 << 20, &[0, 1 << 20, (3 << 20) - 4]), (5 << 20, &[70_000])]
                .into_iter()
                .enumerate()
        {
            let (from, to) = (at(&format!("from{number}")), at(&format!("to{number}")));
            sparse(&from, size, data);
            assert_ne!(copy_file(&from, &to).unwrap(), Carried::Linked);
            assert!(std::fs::read(&from).unwrap() == std::fs::read(&to).unwrap(), "{size} {data:?}");
            assert!(copy_file(&from, &to).is_err(), "what is there is not replaced");
        }
        assert!(copy_file(&at("missing"), &at("new")).is_err());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn holes_stay_holes() {
        use std::os::unix::fs::MetadataExt;

        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        sparse(&from, 1 << 36, &[1 << 35]);
        let on_disk = |path: &Path| std::fs::metadata(path).unwrap().blocks() * 512;
        if on_disk(&from) > 1 << 20 {
            println!("skipped: this file system has no holes");
            return;
        }
        copy_file(&from, &to).unwrap();
        assert_eq!(std::fs::metadata(&to).unwrap().len(), 1 << 36);
        assert!(on_disk(&to) <= 1 << 20, "{}", on_disk(&to));
    }

    #[test]
    fn a_link_is_the_same_file() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        std::fs::write(&from, "1").unwrap();
        assert_eq!(link_file(&from, &to).unwrap(), Carried::Linked);
        std::fs::write(&from, "2").unwrap();
        assert_eq!(std::fs::read_to_string(&to).unwrap(), "2");
        assert!(link_file(&from, &to).is_err());
    }
}
