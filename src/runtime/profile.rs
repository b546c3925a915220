//! ONNX Runtime's own profile: which execution provider ran which node.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use tempfile::TempDir;

use super::Result;
use crate::files;

/// Where the profile of one session is written.
#[derive(Debug)]
pub(super) struct Profile {
    folder: TempDir,
}

#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    cat: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    args: Args,
}

#[derive(Default, Deserialize)]
struct Args {
    provider: Option<String>,
    node_index: Option<serde_json::Value>,
}

impl Profile {
    /// A place for a profile, which goes with it.
    pub(super) fn new() -> Result<Self> {
        let folder = tempfile::tempdir();
        let folder = folder.map_err(files::Error::io("create a temporary folder in", std::env::temp_dir()))?;
        Ok(Self { folder })
    }

    /// What ONNX Runtime puts a time and `.json` behind.
    pub(super) fn prefix(&self) -> PathBuf {
        self.folder.path().join("profile")
    }

    /// How many nodes each execution provider ran.
    pub(super) fn nodes(self, path: &Path) -> Result<BTreeMap<String, usize>> {
        count(&files::read(path)?, path)
    }
}

fn count(json: &[u8], path: &Path) -> Result<BTreeMap<String, usize>> {
    let events: Vec<Event> = serde_json::from_slice(json).map_err(|source| files::Error::Json {
        path: path.into(),
        what: "an ONNX Runtime profile",
        source,
    })?;
    let nodes: BTreeSet<(String, String)> = events
        .into_iter()
        .filter(|event| event.cat == "Node")
        .filter_map(|event| {
            let index = event.args.node_index.map(|index| index.to_string()).unwrap_or_default();
            Some((event.args.provider.filter(|p| !p.is_empty())?, format!("{} {index}", event.name)))
        })
        .collect();
    let mut counts = BTreeMap::new();
    for (provider, _) in nodes {
        *counts.entry(provider).or_insert(0) += 1;
    }
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two runs of three nodes, as ONNX Runtime 1.31 writes them, shortened.
    #[test]
    fn a_node_counts_once_however_often_it_ran() {
        let node = |name: &str, index: usize, provider: &str| {
            serde_json::json!({"cat": "Node", "name": format!("{name}_kernel_time"), "dur": 3,
                "args": {"op_name": "MatMul", "provider": provider, "node_index": index.to_string()}})
        };
        let fence = serde_json::json!({"cat": "Node", "name": "a_fence_before", "args": {"op_name": "MatMul"}});
        let session = serde_json::json!({"cat": "Session", "name": "model_run", "args": {}});
        let one = [
            node("a", 0, "CUDAExecutionProvider"),
            node("", 1, "CUDAExecutionProvider"),
            node("", 2, "CPUExecutionProvider"),
            fence,
            session,
        ];
        let json = serde_json::to_vec(&[one.clone(), one].concat()).unwrap();
        let found = count(&json, Path::new("profile.json")).unwrap();
        let expected = [("CPUExecutionProvider", 1), ("CUDAExecutionProvider", 2)];
        assert_eq!(found, expected.map(|(name, n)| (name.to_owned(), n)).into());
        assert!(count(b"[", Path::new("profile.json")).is_err());
    }
}
