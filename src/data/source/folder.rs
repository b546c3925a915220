//! The files that paths name.

use std::path::{Path, PathBuf};

use super::FileFormat;
use crate::data::{Error, Result};
use crate::files as disk;

/// What the files of a folder are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Training.
    Train,
    /// Evaluation.
    Eval,
}

impl Split {
    /// What the files' names may begin with, the best first.
    fn prefixes(self) -> &'static [&'static str] {
        match self {
            Self::Train => &["train"],
            Self::Eval => &["validation", "valid", "val", "dev", "eval", "test"],
        }
    }

    fn all_prefixes() -> impl Iterator<Item = &'static str> {
        [Self::Train, Self::Eval].into_iter().flat_map(Self::prefixes).copied()
    }
}

/// The files that `paths` name, in that order. A folder stands for the files of records in it, sorted by name:
///
/// - all of one format; hidden files and files of other names are passed over;
/// - where names begin with `train`, `validation`, `valid`, `val`, `dev`, `eval` or `test`, only those of the split that is
///   asked for (for [`Split::Eval`] the first of these prefixes, after `train`, that occurs);
/// - of its subfolder `data` where it holds none itself.
///
/// # Errors
/// When a path is not there, or a folder has no file of records, or files of several formats.
pub(in crate::data) fn files(paths: &[PathBuf], split: Split) -> Result<Vec<PathBuf>> {
    let mut out = Vec::new();
    for path in paths {
        if path.is_dir() {
            out.extend(shards(path, split)?);
        } else {
            std::fs::metadata(path).map_err(disk::Error::io("read", path))?;
            out.push(path.clone());
        }
    }
    Ok(out)
}

fn shards(folder: &Path, split: Split) -> Result<Vec<PathBuf>> {
    let mut found = record_files(folder)?;
    if found.is_empty() && folder.join("data").is_dir() {
        found = record_files(&folder.join("data"))?;
    }
    let fail = |reason: String, help: &str| Err(Error::File { path: folder.into(), reason, help: help.into() });
    let known = "a folder's files are .jsonl, .ndjson, .json, .csv, .tsv or .parquet";
    if found.is_empty() {
        return fail("holds no file of records".into(), known);
    }
    if found.iter().any(|file| Split::all_prefixes().any(|prefix| begins_with(file, prefix))) {
        let of = |prefix: &&&str| found.iter().any(|file| begins_with(file, prefix));
        let Some(prefix) = split.prefixes().iter().find(of) else {
            let reason = format!("holds no file whose name begins with {}", split.prefixes().join(", "));
            return fail(reason, "its files are named after splits; name the files themselves to use others");
        };
        found.retain(|file| begins_with(file, prefix));
    }
    let format = |file: &PathBuf| FileFormat::of_name(file);
    if let Some(pair) = found.windows(2).find(|pair| format(&pair[0]) != format(&pair[1])) {
        let name =
            |file: &PathBuf| file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let reason = format!("holds files of several formats, {} and {}", name(&pair[0]), name(&pair[1]));
        return fail(reason, "keep the shards of one data set in one format, or name the files themselves");
    }
    Ok(found)
}

/// Whether a file's name is a prefix, or goes on after it with something other than a letter: `train-00000-of-00002.jsonl`.
fn begins_with(file: &Path, prefix: &str) -> bool {
    let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_ascii_lowercase();
    name.strip_prefix(prefix).is_some_and(|rest| !rest.starts_with(|c: char| c.is_alphabetic()))
}

fn record_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).map_err(disk::Error::io("read", folder))?;
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(disk::Error::io("read", folder))?.path();
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if !hidden && path.is_file() && FileFormat::of_name(&path).is_some() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(present: &[&str], split: Split) -> std::result::Result<Vec<String>, String> {
        let folder = tempfile::tempdir().unwrap();
        for name in present {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        let found = files(&[folder.path().into()], split).map_err(|error| error.to_string())?;
        let name = |path: &PathBuf| path.strip_prefix(folder.path()).unwrap().display().to_string();
        Ok(found.iter().map(name).collect())
    }

    #[test]
    fn a_folder_is_its_shards_by_name() {
        let plain = ["b.jsonl", "a.jsonl", "README.md", ".c.jsonl"];
        assert_eq!(names(&plain, Split::Train).unwrap(), ["a.jsonl", "b.jsonl"]);
        assert_eq!(names(&plain, Split::Eval).unwrap(), ["a.jsonl", "b.jsonl"]);
        let splits = ["train-00001.json", "train-00000.json", "test.json", "dev.json", "trainer_state.json"];
        assert_eq!(names(&splits, Split::Train).unwrap(), ["train-00000.json", "train-00001.json"]);
        assert_eq!(names(&splits, Split::Eval).unwrap(), ["dev.json"]);
        let nested = ["README.md", "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"];
        assert_eq!(names(&nested, Split::Train).unwrap(), ["data/train-00000-of-00001.parquet"]);
    }

    #[test]
    fn a_folder_that_is_no_data_set_is_an_error() {
        assert!(names(&["README.md"], Split::Train).unwrap_err().ends_with("holds no file of records"));
        let mixed = names(&["a.jsonl", "b.csv"], Split::Train).unwrap_err();
        assert!(mixed.ends_with("holds files of several formats, a.jsonl and b.csv"), "{mixed}");
        let error = names(&["test.jsonl"], Split::Train).unwrap_err();
        assert!(error.ends_with("holds no file whose name begins with train"), "{error}");
        assert!(files(&["/nowhere/x.jsonl".into()], Split::Train).unwrap_err().to_string().contains("nowhere"));
    }
}
