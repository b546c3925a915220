//! A graph that gives its inner tensors out, run over a case.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::branches::{Branches, GivenOut};
use crate::files::TemporaryFolder;
use crate::onnx::{MODEL_NAME, Model, data_files};
use crate::parity::run::{GraphRunner, Script, replay};
use crate::parity::{Ports, Result};
use crate::runtime::{self, NamedGiven, NamedValues, Port, RuntimeInfo, Session, Tensor, WithGiven};

/// A copy of a graph in a folder of its own that gives more tensors out.
pub(super) struct Tapped {
    folder: TemporaryFolder,
    pub(super) given: GivenOut,
}

impl Tapped {
    /// Adds outputs to a copy of the graph `file`, tensors by branch. Its data files are linked to, and copied only where they cannot be.
    pub(super) fn new(file: &Path, branches: &Branches, tensors: &[BTreeSet<String>]) -> Result<Self> {
        let (model, given) = branches.give_out(tensors)?;
        let source = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let folder = beside(&model, source)?;
        model.save(&folder.path().join(MODEL_NAME))?;
        Ok(Self { folder, given })
    }

    pub(super) fn path(&self) -> PathBuf {
        self.folder.path().join(MODEL_NAME)
    }

    /// Runs a script with what the models are given; what goes in and out of each call.
    pub(super) fn run(
        &self,
        session: Box<dyn Session>,
        given: &[NamedGiven],
        script: &Script,
        ports: Ports,
    ) -> Result<(RuntimeInfo, Vec<Seen>)> {
        let watcher = Watcher { inner: session, calls: Vec::new() };
        let mut runner = GraphRunner::new(WithGiven::switching(watcher, given.to_vec())?, ports.head_dim)?;
        replay(&mut runner, script, ports.vocab)?;
        let watcher = runner.into_session().into_session();
        let seen = watcher.calls.into_iter().map(|(feeds, outputs)| {
            let (branch, outputs) = self.given.within(outputs);
            Seen { branch, feeds, outputs }
        });
        Ok((watcher.inner.info(), seen.collect()))
    }
}

/// A temporary folder in which the data files of a model are.
fn beside(model: &Model, source: &Path) -> Result<TemporaryFolder> {
    let failed = |error| crate::files::Error::io("create a temporary folder in", std::env::temp_dir())(error);
    let files = data_files(model, source)?;
    let folder = TemporaryFolder::new().map_err(&failed)?;
    for file in files {
        let to = folder.path().join(&file.location);
        if let Some(parent) = to.parent() {
            std::fs::create_dir_all(parent).map_err(&failed)?;
        }
        if std::fs::hard_link(&file.path, &to).is_err() {
            reflink_copy::reflink_or_copy(&file.path, &to).map_err(crate::files::Error::io("copy", &file.path))?;
        }
    }
    Ok(folder)
}

/// What went in and out of a call.
pub(super) struct Seen {
    /// The branch that it took.
    pub(super) branch: usize,
    pub(super) feeds: NamedValues,
    pub(super) outputs: NamedValues,
}

impl Seen {
    pub(super) fn get(&self, name: &str) -> Option<&runtime::Value> {
        self.outputs.get(name).or_else(|| self.feeds.get(name))
    }
}

/// A session with a copy of everything that it takes and gives.
struct Watcher {
    inner: Box<dyn Session>,
    calls: Vec<(NamedValues, NamedValues)>,
}

impl Session for Watcher {
    fn inputs(&self) -> &[Port] {
        self.inner.inputs()
    }

    fn optional_inputs(&self) -> &[Port] {
        self.inner.optional_inputs()
    }

    fn outputs(&self) -> &[Port] {
        self.inner.outputs()
    }

    fn info(&self) -> RuntimeInfo {
        self.inner.info()
    }

    fn run_tensors(&mut self, feeds: Vec<(String, Tensor)>) -> runtime::Result<Vec<(String, Tensor)>> {
        let host = |tensors: Vec<(String, Tensor)>| -> runtime::Result<NamedValues> {
            tensors.into_iter().map(|(name, tensor)| Ok((name, tensor.into_value()?))).collect()
        };
        let tensors = |values: NamedValues| values.into_iter().map(|(name, value)| (name, value.into())).collect();
        let feeds = host(feeds)?;
        let outputs = host(self.inner.run_tensors(tensors(feeds.clone()))?)?;
        self.calls.push((feeds, outputs.clone()));
        Ok(tensors(outputs))
    }
}
