//! Which files beside a model hold its tensors, and whether they can.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::external::{check_location, location_error, plain_location};
use super::proto::{function, model, training};
use super::wire::{Field, Fields};
use super::{AttributeValue, Error, Graph, Model, Node, NodeId, Result, Storage, TensorInfo};
use crate::files;

/// A file that holds tensors of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFile {
    /// Its place in the model's folder, without `.` and `..`.
    pub location: PathBuf,
    /// Where it is, links resolved.
    pub path: PathBuf,
    /// Its size in bytes.
    pub bytes: u64,
}

/// The locations of the data files that a model refers to, anywhere: initializers, attributes, nested graphs, functions,
/// training.
///
/// # Errors
/// When a location is absolute or leaves the model's folder.
pub fn external_files(model: &Model) -> Result<BTreeSet<String>> {
    let mut files = BTreeSet::new();
    visit_tensors(model, &mut |tensor| {
        let Some(external) = tensor.external() else { return Ok(()) };
        check_location(tensor.name(), &external.location)?;
        files.insert(external.location.clone());
        Ok(())
    })?;
    Ok(files)
}

/// The data files of a model in `folder`, each of which exists, lies in the folder and holds every piece that the model
/// refers to. Their content is not read. Every tensor, in a file or in the model, takes the bytes that its type and
/// dimensions say.
///
/// # Errors
/// What of this does not hold, with the first tensor concerned.
pub fn data_files(model: &Model, folder: &Path) -> Result<Vec<DataFile>> {
    let mut found: BTreeMap<PathBuf, DataFile> = BTreeMap::new();
    visit_tensors(model, &mut |tensor| {
        let external = match tensor.storage() {
            Storage::External(external) => external,
            Storage::Raw(raw) => return check_size(tensor, raw.len() as u64),
            Storage::Typed => return Ok(()),
        };
        check_location(tensor.name(), &external.location)?;
        let location = plain_location(&external.location);
        let file = match found.get(&location) {
            Some(file) => file,
            None => {
                let path = external.resolve(tensor.name(), folder)?;
                let metadata = std::fs::metadata(&path).map_err(files::Error::io("read", &path))?;
                if !metadata.is_file() {
                    return Err(location_error(tensor.name(), &external.location, "is no file"));
                }
                found.entry(location.clone()).or_insert(DataFile { location, path, bytes: metadata.len() })
            }
        };
        let length = external.length.or(tensor.byte_len()).unwrap_or(0);
        check_size(tensor, length)?;
        external.check_fits(tensor.name(), length, &folder.join(&file.location), file.bytes)
    })?;
    Ok(found.into_values().collect())
}

/// A type without a fixed size, one that is not known here for instance, is not judged.
fn check_size(tensor: &TensorInfo, found: u64) -> Result<()> {
    if tensor.data_type().bits().is_none() || tensor.byte_len() == Some(found) {
        return Ok(());
    }
    let (name, dims) = (tensor.name().to_owned(), tensor.dims().to_vec());
    let expected = tensor.byte_len();
    Err(Error::TensorSize { tensor: name, data_type: tensor.data_type(), dims, found, expected })
}

/// Calls `visit` with every constant tensor of a model.
fn visit_tensors(model: &Model, visit: &mut dyn FnMut(&TensorInfo) -> Result<()>) -> Result<()> {
    graph_tensors(model.graph(), visit)?;
    for field in model.fields() {
        match field.number {
            model::FUNCTIONS => function_tensors(field, visit)?,
            model::TRAINING_INFO => training_tensors(field, visit)?,
            _ => {}
        }
    }
    Ok(())
}

fn graph_tensors(graph: &Graph, visit: &mut dyn FnMut(&TensorInfo) -> Result<()>) -> Result<()> {
    let sparse = graph.sparse_initializers().iter().flat_map(|sparse| [&sparse.values, &sparse.indices]);
    for tensor in graph.initializers().iter().chain(sparse) {
        visit(tensor)?;
    }
    graph.nodes().iter().try_for_each(|node| node_tensors(node, visit))
}

fn node_tensors(node: &Node, visit: &mut dyn FnMut(&TensorInfo) -> Result<()>) -> Result<()> {
    for attribute in node.attributes() {
        match attribute.value() {
            AttributeValue::Tensor(tensor) => visit(tensor)?,
            AttributeValue::Tensors(tensors) => tensors.iter().try_for_each(&mut *visit)?,
            AttributeValue::SparseTensors(tensors) => {
                tensors.iter().flat_map(|sparse| [&sparse.values, &sparse.indices]).try_for_each(&mut *visit)?;
            }
            _ => attribute.graphs().iter().try_for_each(|graph| graph_tensors(graph, visit))?,
        }
    }
    Ok(())
}

fn function_tensors(function: &Field, visit: &mut dyn FnMut(&TensorInfo) -> Result<()>) -> Result<()> {
    for field in Fields::new(function::MESSAGE, function.bytes()?) {
        let field = field?;
        if field.number == function::NODE {
            node_tensors(&Node::parse(NodeId(0), field.bytes()?, 1)?, visit)?;
        }
    }
    Ok(())
}

fn training_tensors(training: &Field, visit: &mut dyn FnMut(&TensorInfo) -> Result<()>) -> Result<()> {
    for field in Fields::new(training::MESSAGE, training.bytes()?) {
        let field = field?;
        if matches!(field.number, training::INITIALIZATION | training::ALGORITHM) {
            graph_tensors(&Graph::parse(field.bytes()?, 0)?, visit)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::external::tests::model_with;
    use super::super::{DataType, ExternalRef, TensorDef};
    use super::*;

    fn tensor(name: &str, location: &str, offset: u64, length: Option<u64>) -> TensorDef {
        TensorDef::external(name, DataType::Float, &[2], ExternalRef { location: location.into(), offset, length })
    }

    #[test]
    fn every_piece_must_be_there() {
        let folder = tempfile::tempdir().unwrap();
        let find = |tensors| data_files(&model_with(tensors), folder.path());
        std::fs::create_dir(folder.path().join("sub")).unwrap();
        std::fs::write(folder.path().join("a"), [0; 16]).unwrap();
        std::fs::write(folder.path().join("sub/b"), [0; 8]).unwrap();
        let layouts =
            vec![tensor("w0", "a", 0, Some(8)), tensor("w1", "./a", 8, None), tensor("w2", "sub//b", 0, None)];
        let found = find(layouts).unwrap();
        let facts: Vec<_> = found.iter().map(|file| (file.location.to_str().unwrap(), file.bytes)).collect();
        assert_eq!(facts, [("a", 16), ("sub/b", 8)]);

        assert!(matches!(find(vec![tensor("w", "c", 0, None)]), Err(Error::NoDataFile { .. })));
        assert!(matches!(find(vec![tensor("w", "sub", 0, None)]), Err(Error::Location { .. })));
        assert!(matches!(find(vec![tensor("w", "a", 9, None)]), Err(Error::ShortDataFile { length: 8, size: 16, .. })));
        assert!(matches!(find(vec![tensor("w", "a", u64::MAX, None)]), Err(Error::ShortDataFile { .. })));
    }
}
