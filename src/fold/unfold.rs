//! Back out again: the file before a fold, from the folded file alone.

use std::path::Path;

use super::{Carry, Record, Result, carry, folder_of, graph_file, record};
use crate::files::Manifest;
use crate::onnx::MODEL_NAME;

/// What an unfold did.
#[derive(Clone, Debug)]
pub struct Unfolded {
    /// The folds that were taken off, the last one first.
    pub folds: Vec<Record>,
}

/// Writes the graph before its last fold, or before all of them, into a folder that exists: the bytes that it had then.
///
/// # Errors
/// When the graph carries no fold with a way back, it was changed since, or a file cannot be written.
pub fn unfold_folder(graph: &Path, all: bool, folder: &Path) -> Result<Unfolded> {
    let graph = graph_file(graph);
    let (folded, files) = carry::open(&graph, folder_of(&graph))?;
    let (mut model, first) = record::last(&folded)?;
    let mut folds = vec![first];
    while all && !Record::all(&model)?.is_empty() {
        let (before, fold) = record::last(&model)?;
        model = before;
        folds.push(fold);
    }
    let target = folder.join(MODEL_NAME);
    model.save(&target)?;
    let data = carry::carry(&model, &files, folder_of(&graph), folder, Carry::Copy)?;
    let mut manifest = Manifest::new("unfold", serde_json::json!({ "all": all }));
    manifest = manifest.input("graph", &graph)?.output("graph", &target)?;
    let folds_off: Vec<_> = folds
        .iter()
        .map(|fold| serde_json::json!({ "fold": fold.number, "emission": fold.emission, "adapters": fold.adapters }))
        .collect();
    manifest.facts = serde_json::json!({ "folds": folds_off, "external_data": data });
    manifest.write(folder)?;
    Ok(Unfolded { folds })
}
