//! What is compared, and its files.

use super::*;

/// An adapter, the name that a graph may know it by, and where it is from.
pub(super) struct Adapted {
    pub(super) name: String,
    pub(super) path: PathBuf,
    pub(super) adapter: Adapter,
}

/// What is compared.
pub(super) struct Subject<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) graph: PathBuf,
    pub(super) adapters: Vec<Adapted>,
    pub(super) base_graph: Option<PathBuf>,
    /// Whether the base graph is judged too, against the checkpoint without the adapter.
    pub(super) judge_base: bool,
    /// Another graph to compare with.
    pub(super) against: Option<PathBuf>,
}

impl Subject<'_> {
    pub(super) fn kind(&self) -> parity::Subject {
        if !self.adapters.is_empty() { parity::Subject::Folded } else { parity::Subject::Base }
    }
}

/// The files that are compared.
pub(super) fn facts(subject: &Subject) -> Result<Vec<FileFact>> {
    let mut facts = vec![FileFact::of("graph", &subject.graph)?];
    let folder = subject.graph.parent().unwrap_or(Path::new("."));
    for name in external_files(&Graph::open(&subject.graph)?)? {
        facts.push(FileFact::of("external_data", &folder.join(name))?);
    }
    for (role, graph) in [("base_graph", &subject.base_graph), ("other_graph", &subject.against)] {
        if let Some(graph) = graph {
            facts.push(FileFact::of(role, graph)?);
        }
    }
    for file in subject.checkpoint.weight_files() {
        facts.push(FileFact::of("weights", &file)?);
    }
    for Adapted { path, .. } in &subject.adapters {
        if path.is_dir() {
            facts.push(FileFact::of("adapter_config", &path.join(CONFIG_NAME))?);
            facts.push(FileFact::of("adapter", &path.join(WEIGHTS_NAME))?);
        } else {
            facts.push(FileFact::of("adapter", path)?);
        }
    }
    Ok(facts)
}
