//! What a folded graph says of its folds: one metadata entry for each, `prefold.fold.1` the first, with the way back to the file
//! before it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::delta::Delta;
use super::{Emission, Error, Result};
use crate::adapter::AdapterConfig;
use crate::files;
use crate::onnx::{Bytes, Model, Patch};

/// The metadata entry that names the adapters of a graph, for people.
pub const MARK: &str = "prefold.adapter";
/// What the metadata entries that remember folds begin with.
pub const RECORDS: &str = "prefold.fold.";

/// One fold, as its graph remembers it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Its place among the folds of the graph, from 1.
    #[serde(skip)]
    pub number: usize,
    /// How the adapters stand in the graph.
    pub emission: Emission,
    /// What they are; of several, the first.
    pub config: AdapterConfig,
    /// Their names; in a bank those of its rows from 1.
    pub adapters: Vec<String>,
    undo: Undo,
}

/// The file before a fold.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Undo {
    bytes: u64,
    sha256: String,
    delta: String,
}

impl Record {
    /// A fold whose way back is not known yet.
    pub(super) fn new(number: usize, emission: Emission, config: AdapterConfig, adapters: Vec<String>) -> Self {
        Self { number, emission, config, adapters, undo: Undo::default() }
    }

    fn key(&self) -> String {
        format!("{RECORDS}{}", self.number)
    }

    /// The name that a tensor or node of this fold has: those of the first are as their method gives them.
    pub(super) fn scoped(&self, name: &str) -> Option<String> {
        scoped(self.number, name)
    }

    /// The name of an input that the fold added, by its name in a first fold.
    pub fn input_name(&self, name: &str) -> String {
        self.scoped(name).unwrap_or_else(|| name.to_owned())
    }

    /// The folds of a model, the first one first.
    ///
    /// # Errors
    /// When an entry is damaged.
    pub fn all(model: &Model) -> Result<Vec<Self>> {
        let mut records = BTreeMap::new();
        for (key, value) in model.metadata_props() {
            let Some(number) = key.strip_prefix(RECORDS) else { continue };
            let damaged = |why: String| Error::Unfold { why: format!("its metadata entry `{key}` is damaged: {why}") };
            let number: u32 = number.parse().map_err(|_| damaged("it has no number".into()))?;
            let number = number as usize;
            let record: Self = serde_json::from_str(value).map_err(|error| damaged(error.to_string()))?;
            records.insert(number, Self { number, ..record });
        }
        Ok(records.into_values().collect())
    }

    /// Writes the record into `folded`, with the way back to `before`.
    ///
    /// # Errors
    /// When the entry cannot be set.
    pub(super) fn seal(mut self, before: &Model, folded: &Model) -> Result<Model> {
        let key = self.key();
        let earlier: Vec<Bytes> = before.pieces().cloned().collect();
        let delta = Delta::between(&folded.pieces_without(&key)?, &earlier);
        let delta = delta.encode().map_err(|error| Error::Unfold { why: error.to_string() })?;
        self.undo =
            Undo { bytes: before.encoded_len(), sha256: files::sha256_pieces(earlier.iter().map(|p| &**p)), delta };
        let entry = serde_json::to_string(&self).map_err(|error| Error::Unfold { why: error.to_string() })?;
        let mut patch = Patch::new("write down the fold");
        patch.set_metadata(&key, &entry);
        Ok(patch.apply(folded)?)
    }

    /// The model before this fold, which must be the last of `folded`.
    ///
    /// # Errors
    /// When the file is not as the fold left it.
    pub(super) fn undo(&self, folded: &Model) -> Result<Model> {
        let changed = || Error::Unfold {
            why: "it was changed after the fold, so its bytes are not those to go back from".into(),
        };
        let delta = Delta::decode(&self.undo.delta, folded.encoded_len());
        let delta = delta.ok_or_else(|| Error::Unfold { why: "the way back in its metadata is damaged".into() })?;
        let pieces = delta.apply(&folded.pieces_without(&self.key())?).ok_or_else(changed)?;
        let bytes: u64 = pieces.iter().map(|piece| piece.len() as u64).sum();
        if bytes != self.undo.bytes || files::sha256_pieces(pieces.iter().map(|p| &**p)) != self.undo.sha256 {
            return Err(changed());
        }
        let mut file = Vec::with_capacity(usize::try_from(bytes).unwrap_or_default());
        pieces.iter().for_each(|piece| file.extend_from_slice(piece));
        Ok(Model::from_bytes(file)?)
    }
}

/// Whether a model without a mark has nodes of a fold: some tools drop metadata.
pub(super) fn is_forgotten(model: &Model) -> bool {
    let mut found = false;
    model.graph().visit(&mut |graph| found |= graph.nodes().iter().any(|node| node.name().starts_with("/prefold.")));
    found && model.metadata(MARK).is_none()
}

/// The model before its last fold, and what that was.
///
/// # Errors
/// When there is none, or the file is not as the fold left it.
pub(super) fn last(model: &Model) -> Result<(Model, Record)> {
    let Some(record) = Record::all(model)?.pop() else {
        let why = match model.metadata(MARK) {
            Some(_) => "it was folded by a prefold that kept no way back",
            None => "it carries no adapter that prefold folded",
        };
        return Err(Error::Unfold { why: why.into() });
    };
    Ok((record.undo(model)?, record))
}

/// The name in the graph of what a method calls `name`; none where it stays.
///
/// | as a method writes it | in the first fold | in the second |
/// |---|---|---|
/// | `/prefold/layers.0/Add`, a node or what it makes | `/prefold.1/layers.0/Add` | `/prefold.2/layers.0/Add` |
/// | `prefold.layers.0.M`, a tensor | `prefold.layers.0.M` | `prefold.2.layers.0.M` |
/// | `adapter_ids` | `adapter_ids` | `adapter_ids.2` |
///
/// Every fold numbers its nodes, so that what a method adds and what the graph has never bear one name.
pub(super) fn scoped(number: usize, name: &str) -> Option<String> {
    if let Some(rest) = name.strip_prefix("/prefold/") {
        return Some(format!("/prefold.{number}/{rest}"));
    }
    if number < 2 {
        return None;
    }
    if name == super::ADAPTER_IDS {
        return Some(format!("{name}.{number}"));
    }
    let rest = name.strip_prefix("prefold").filter(|rest| rest.starts_with(['.', '/']))?;
    Some(format!("prefold.{number}{rest}"))
}
