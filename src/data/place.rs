//! Where a record stands, and which name was meant.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A record's place in the files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub path: Arc<Path>,
    /// Where in it.
    pub at: At,
}

/// A place within a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// The line that the record begins in, counted from 1.
    Line(usize),
    /// The record's number, counted from 1, where a file has no lines.
    Record(usize),
}

impl Place {
    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match self.at {
            At::Line(line) => write!(formatter, "{path}:{line}"),
            At::Record(record) => write!(formatter, "{path}, record {record}"),
        }
    }
}

/// Paths as a list in a sentence.
pub(super) fn listed(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// The longest name that is compared; the distance of two texts costs the product of their lengths.
const LONGEST: usize = 64;

/// The known name that was most probably meant by `name`, by [`distance`].
pub fn nearest<'n>(name: &str, known: impl IntoIterator<Item = &'n str>) -> Option<&'n str> {
    let near = known.into_iter().filter_map(|known| Some((distance(name, known)?, known)));
    near.min_by_key(|(distance, _)| *distance).map(|(_, known)| known)
}

/// How many letters of `name` differ from `known`, neither case nor hyphens counted; none where more than a third do.
pub fn distance(name: &str, known: &str) -> Option<usize> {
    if name.len() > LONGEST || known.len() > LONGEST {
        return None;
    }
    let spelled = |text: &str| text.to_lowercase().replace('-', "_");
    let distance = strsim::damerau_levenshtein(&spelled(name), &spelled(known));
    (distance <= (known.chars().count() / 3).max(1)).then_some(distance)
}

/// `; did you mean …?`, or nothing.
pub(super) fn suggestion<'n>(name: &str, known: impl IntoIterator<Item = &'n str>) -> String {
    nearest(name, known).map(|meant| format!("; did you mean `{meant}`?")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_near() {
        let known = ["prompt", "completion", "label"];
        assert_eq!(nearest("promt", known), Some("prompt"));
        assert_eq!(nearest("Completions", known), Some("completion"));
        assert_eq!(nearest("lable", known), Some("label"));
        assert_eq!(nearest("text", known), None);
        assert_eq!(nearest(&"x".repeat(1 << 20), known), None);
    }
}
