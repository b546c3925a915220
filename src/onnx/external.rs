//! Tensor data in files beside a model.
//!
//! <https://onnx.ai/onnx/repo-docs/ExternalData.html>. A location is a path relative to the model's folder; whatever leads out
//! of that folder is refused, since a model is data from elsewhere and must not read other files.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Component, Path, PathBuf};

use super::proto::{function, model, training};
use super::wire::{Field, Fields};
use super::{AttributeValue, DataType, Error, Graph, Model, Node, NodeId, Result, TensorDef, TensorInfo};
use crate::files;

/// Where a written tensor begins is a multiple of this: the page size that the specification asks for, so that a tensor can
/// be memory-mapped by itself. Tensors too small to be worth a page belong into the model.
pub const EXTERNAL_ALIGNMENT: u64 = 4096;

/// A piece of a data file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalRef {
    /// The file, relative to the model's folder.
    pub location: String,
    /// The first byte.
    pub offset: u64,
    /// The number of bytes; none when the model leaves it to the tensor's shape.
    pub length: Option<u64>,
}

impl ExternalRef {
    pub(crate) fn from_entries(tensor: &str, entries: &[(String, String)]) -> Result<Self> {
        let text = |key: &str| entries.iter().find(|(found, _)| found == key).map(|(_, value)| value.as_str());
        let number = |key: &'static str| match text(key) {
            None => Ok(None),
            Some(value) => value.parse().map(Some).map_err(|_| Error::ExternalEntry {
                tensor: tensor.to_owned(),
                key,
                value: value.to_owned(),
            }),
        };
        let location = text("location").unwrap_or_default().to_owned();
        Ok(Self { location, offset: number("offset")?.unwrap_or(0), length: number("length")? })
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = (&'static str, String)> {
        let length = self.length.map(|length| ("length", length.to_string()));
        [("location", self.location.clone()), ("offset", self.offset.to_string())].into_iter().chain(length)
    }

    /// The data file's path, once it is known to be in the model's folder.
    ///
    /// # Errors
    /// When the location is absolute, leads out of the folder by itself or by a link, or names no file.
    pub fn resolve(&self, tensor: &str, folder: &Path) -> Result<PathBuf> {
        check_location(tensor, &self.location)?;
        let path = folder.join(&self.location);
        let real = path.canonicalize().map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => Error::NoDataFile { tensor: tensor.to_owned(), path: path.clone() },
            _ => files::Error::io("open", &path)(source).into(),
        })?;
        let home = folder.canonicalize().map_err(files::Error::io("open", folder))?;
        if !real.starts_with(&home) {
            return Err(location_error(tensor, &self.location, "is a link that leads out of the model's folder"));
        }
        Ok(real)
    }

    /// Reads the piece, which must be `expected` bytes long.
    pub(crate) fn read(&self, tensor: &str, expected: u64, folder: &Path) -> Result<Vec<u8>> {
        let path = self.resolve(tensor, folder)?;
        let mut file = File::open(&path).map_err(files::Error::io("open", &path))?;
        let size = file.metadata().map_err(files::Error::io("read", &path))?.len();
        let length = self.length.unwrap_or(expected);
        // Checked before anything is allocated: the length is the model's word, the size is the file system's.
        if self.offset.checked_add(length).is_none_or(|end| end > size) {
            let (tensor, offset) = (tensor.to_owned(), self.offset);
            return Err(Error::ShortDataFile { tensor, path, offset, length, size });
        }
        file.seek(SeekFrom::Start(self.offset)).map_err(files::Error::io("read", &path))?;
        let mut bytes = Vec::new();
        file.take(length).read_to_end(&mut bytes).map_err(files::Error::io("read", &path))?;
        Ok(bytes)
    }
}

fn location_error(tensor: &str, location: &str, reason: &'static str) -> Error {
    Error::Location { tensor: tensor.to_owned(), location: location.to_owned(), reason }
}

/// Refuses a location that does not name a file below the model's folder, as far as its text can tell.
fn check_location(tensor: &str, location: &str) -> Result<()> {
    let refuse = |reason| Err(location_error(tensor, location, reason));
    if location.contains('\0') {
        return refuse("holds a zero byte");
    }
    let mut names = 0usize;
    for component in Path::new(location).components() {
        match component {
            Component::Normal(_) => names += 1,
            Component::CurDir => {}
            Component::ParentDir => return refuse("leads out of a folder with `..`"),
            Component::RootDir | Component::Prefix(_) => return refuse("is an absolute path"),
        }
    }
    if names == 0 { refuse("names no file") } else { Ok(()) }
}

/// The data files that a model refers to, anywhere: initializers, attributes, nested graphs, functions, training.
///
/// # Errors
/// When a location is absolute or leaves the model's folder.
pub fn external_files(model: &Model) -> Result<BTreeSet<String>> {
    let mut files = BTreeSet::new();
    graph_files(model.graph(), &mut files)?;
    for field in model.fields() {
        match field.number {
            model::FUNCTIONS => function_files(field, &mut files)?,
            model::TRAINING_INFO => training_files(field, &mut files)?,
            _ => {}
        }
    }
    Ok(files)
}

fn graph_files(graph: &Graph, files: &mut BTreeSet<String>) -> Result<()> {
    let sparse = graph.sparse_initializers().iter().flat_map(|sparse| [&sparse.values, &sparse.indices]);
    for tensor in graph.initializers().iter().chain(sparse) {
        tensor_file(tensor, files)?;
    }
    graph.nodes().iter().try_for_each(|node| node_files(node, files))
}

fn node_files(node: &Node, files: &mut BTreeSet<String>) -> Result<()> {
    for attribute in node.attributes() {
        match attribute.value() {
            AttributeValue::Tensor(tensor) => tensor_file(tensor, files)?,
            AttributeValue::Tensors(tensors) => tensors.iter().try_for_each(|tensor| tensor_file(tensor, files))?,
            AttributeValue::SparseTensors(tensors) => {
                let parts = tensors.iter().flat_map(|sparse| [&sparse.values, &sparse.indices]);
                { parts }.try_for_each(|tensor| tensor_file(tensor, files))?;
            }
            _ => attribute.graphs().iter().try_for_each(|graph| graph_files(graph, files))?,
        }
    }
    Ok(())
}

fn tensor_file(tensor: &TensorInfo, files: &mut BTreeSet<String>) -> Result<()> {
    let Some(external) = tensor.external() else { return Ok(()) };
    check_location(tensor.name(), &external.location)?;
    files.insert(external.location.clone());
    Ok(())
}

fn function_files(function: &Field, files: &mut BTreeSet<String>) -> Result<()> {
    for field in Fields::new(function::MESSAGE, function.bytes()?) {
        let field = field?;
        if field.number == function::NODE {
            node_files(&Node::parse(NodeId(0), field.bytes()?, 1)?, files)?;
        }
    }
    Ok(())
}

fn training_files(training: &Field, files: &mut BTreeSet<String>) -> Result<()> {
    for field in Fields::new(training::MESSAGE, training.bytes()?) {
        let field = field?;
        if matches!(field.number, training::INITIALIZATION | training::ALGORITHM) {
            graph_files(&Graph::parse(field.bytes()?, 0)?, files)?;
        }
    }
    Ok(())
}

/// Writes tensors one after the other into one data file, each by a callback, so that no more than one need be in memory.
#[derive(Debug)]
pub struct ExternalWriter {
    path: PathBuf,
    location: String,
    file: Counted<BufWriter<File>>,
}

impl ExternalWriter {
    /// Creates the data file `name` in the model's folder.
    ///
    /// # Errors
    /// When `name` is no plain path below the folder, or the file cannot be created.
    pub fn create(folder: &Path, name: &str) -> Result<Self> {
        check_location("", name)?;
        let path = folder.join(name);
        let file = File::create(&path).map_err(files::Error::io("create", &path))?;
        Ok(Self { path, location: name.to_owned(), file: Counted { inner: BufWriter::new(file), written: 0 } })
    }

    /// Adds a tensor: `write` gives its little-endian bytes, as many as type and dimensions say. What comes back goes into
    /// a [`ModelBuilder`](super::ModelBuilder) or a [`Patch`](super::Patch).
    ///
    /// # Errors
    /// When the file cannot be written, `write` fails, or it gives another number of bytes.
    pub fn write(
        &mut self,
        name: &str,
        data_type: DataType,
        dims: &[i64],
        write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
    ) -> Result<TensorDef> {
        let size = || Error::TensorSize { tensor: name.into(), data_type, dims: dims.into(), found: 0, expected: None };
        let expected = data_type.byte_len(dims).ok_or_else(size)?;
        self.align().map_err(files::Error::io("write", &self.path))?;
        let offset = self.file.written;
        write(&mut self.file).map_err(files::Error::io("write", &self.path))?;
        let written = self.file.written.saturating_sub(offset);
        if written != expected {
            return Err(Error::Written { tensor: name.to_owned(), written, expected });
        }
        let external = ExternalRef { location: self.location.clone(), offset, length: Some(expected) };
        Ok(TensorDef::external(name, data_type, dims, external))
    }

    /// Ends the file, and says how long it is.
    ///
    /// # Errors
    /// When what is left in the buffer cannot be written.
    pub fn finish(mut self) -> Result<u64> {
        self.file.flush().map_err(files::Error::io("write", &self.path))?;
        Ok(self.file.written)
    }

    fn align(&mut self) -> std::io::Result<()> {
        let padding = self.file.written.next_multiple_of(EXTERNAL_ALIGNMENT) - self.file.written;
        std::io::copy(&mut std::io::repeat(0).take(padding), &mut self.file)?;
        Ok(())
    }
}

/// A writer that knows how much went through it.
#[derive(Debug)]
struct Counted<W> {
    inner: W,
    written: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let taken = self.inner.write(bytes)?;
        self.written = self.written.saturating_add(taken as u64);
        Ok(taken)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}
