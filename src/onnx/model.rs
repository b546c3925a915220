//! A model: a graph, the operator sets it is written in, and who made it.

use std::io::Write;
use std::path::Path;

use super::graph::Graph;
use super::node::standard_domain;
use super::outgrown::externalize;
use super::proto::{model, opset};
use super::tensor::parse_entry;
use super::wire::{Encoder, Field, Fields};
use super::{Bytes, Error, Result};
use crate::files::{self, MappedFile};

/// The name of the model file in a model folder.
pub const MODEL_NAME: &str = "model.onnx";

/// Protobuf counts lengths in signed 32-bit numbers.
const MAX_BYTES: u64 = (1 << 31) - 1;

/// An operator set that a model is written in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpsetImport {
    /// The domain; empty for the standard operators.
    pub domain: String,
    /// The version.
    pub version: i64,
}

/// An ONNX model: the bytes it was read from, and a typed view of them.
#[derive(Clone, Debug)]
pub struct Model {
    fields: Vec<Field>,
    /// Tag and length of the graph, whose content is in `graph`.
    graph_header: Bytes,
    graph: Graph,
    ir_version: i64,
    producer: (String, String),
    opsets: Vec<OpsetImport>,
    metadata: Vec<(String, String)>,
}

impl Model {
    /// Opens an `.onnx` file, or the `model.onnx` of a folder. The file is memory-mapped; external data is not read.
    ///
    /// # Errors
    /// When the file cannot be read, is not an ONNX model, or is larger than protobuf allows.
    pub fn open(path: &Path) -> Result<Self> {
        let path = if path.is_dir() { path.join(MODEL_NAME) } else { path.to_owned() };
        let map = MappedFile::open(&path)?;
        let bytes = map.bytes().len() as u64;
        let parsed =
            if bytes > MAX_BYTES { Err(Error::FileTooLarge { bytes }) } else { Self::parse(&Bytes::from_map(map)) };
        parsed.map_err(|source| Error::InFile { path, source: Box::new(source) })
    }

    /// Reads a model from memory.
    ///
    /// # Errors
    /// When the bytes are not an ONNX model.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self> {
        Self::parse(&bytes.into())
    }

    fn parse(bytes: &Bytes) -> Result<Self> {
        let fields = Fields::new(model::MESSAGE, bytes).collect::<Result<Vec<_>>>()?;
        let mut graphs = fields.iter().filter(|field| field.number == model::GRAPH);
        let graph = graphs.next().ok_or(Error::NoGraph)?;
        if let Some(second) = graphs.next() {
            return Err(Error::TwoGraphs { offset: second.raw.offset() });
        }
        let header = graph.header();
        let graph = Graph::parse(graph.bytes()?, 0)?;
        Self::assemble(fields, header, graph)
    }

    fn assemble(fields: Vec<Field>, graph_header: Bytes, graph: Graph) -> Result<Self> {
        let mut ir_version = 0;
        let mut producer = (String::new(), String::new());
        let (mut opsets, mut metadata) = (Vec::new(), Vec::new());
        for field in &fields {
            match field.number {
                model::IR_VERSION => ir_version = field.int()?,
                model::PRODUCER_NAME => producer.0 = field.string()?,
                model::PRODUCER_VERSION => producer.1 = field.string()?,
                model::OPSET_IMPORT => opsets.push(parse_opset(field.bytes()?)?),
                model::METADATA_PROPS => metadata.push(parse_entry(field.bytes()?)?),
                _ => {}
            }
        }
        Ok(Self { fields, graph_header, graph, ir_version, producer, opsets, metadata })
    }

    /// The model with other fields, and with another graph where one is given.
    pub(crate) fn rebuilt(&self, fields: Vec<Field>, graph: Option<Graph>) -> Result<Self> {
        let Some(graph) = graph else {
            return Self::assemble(fields, self.graph_header.clone(), self.graph.clone());
        };
        let mut header = Encoder::default();
        header.header(model::GRAPH, graph.fields().iter().map(|field| field.raw.len() as u64).sum());
        Self::assemble(fields, header.into_bytes().into(), graph)
    }

    /// The message's fields; the graph's is the one that was read, not the one that was edited.
    pub(crate) fn fields(&self) -> &[Field] {
        &self.fields
    }

    /// The version of the ONNX format.
    pub fn ir_version(&self) -> i64 {
        self.ir_version
    }

    /// Name and version of the tool that made the model; either may be empty.
    pub fn producer(&self) -> (&str, &str) {
        (&self.producer.0, &self.producer.1)
    }

    /// The operator sets that the model imports.
    pub fn opsets(&self) -> &[OpsetImport] {
        &self.opsets
    }

    /// The version that the model imports of an operator set; the empty domain is `ai.onnx`.
    pub fn opset(&self, domain: &str) -> Option<i64> {
        let wanted = standard_domain(domain);
        self.opsets.iter().find(|import| import.domain == wanted).map(|import| import.version)
    }

    /// The model's metadata, keys and values, in file order.
    pub fn metadata_props(&self) -> &[(String, String)] {
        &self.metadata
    }

    /// The metadata value of a key.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.iter().find(|(found, _)| found == key).map(|(_, value)| value.as_str())
    }

    /// The model's graph.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// The file's content, in pieces, without the metadata entry of a key.
    pub(crate) fn pieces_without(&self, key: &str) -> Result<Vec<Bytes>> {
        let mut pieces = Vec::with_capacity(self.fields.len() + self.graph.fields().len());
        for field in &self.fields {
            if field.number == model::METADATA_PROPS && parse_entry(field.bytes()?)?.0 == key {
                continue;
            }
            pieces.extend(self.field_pieces(field).cloned());
        }
        Ok(pieces)
    }

    /// The file's content, in pieces.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = &Bytes> {
        self.fields.iter().flat_map(|field| self.field_pieces(field))
    }

    fn field_pieces<'a>(&'a self, field: &'a Field) -> impl Iterator<Item = &'a Bytes> {
        let is_graph = field.number == model::GRAPH;
        let own = if is_graph { &self.graph_header } else { &field.raw };
        let nested = if is_graph { self.graph.fields() } else { &[] };
        std::iter::once(own).chain(nested.iter().map(|field| &field.raw))
    }

    /// The size of the model in a file, external data not counted.
    pub fn encoded_len(&self) -> u64 {
        self.pieces().map(|piece| piece.len() as u64).sum()
    }

    /// The file's content: for a model that was not edited, the bytes it was read from.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.pieces().for_each(|piece| bytes.extend_from_slice(piece));
        bytes
    }

    /// Writes the model to a file, which is replaced whole or not at all. External data is not copied. Where the file
    /// would pass protobuf's limit of 2 GiB, initializers of 1 KiB and more go to a data file beside it.
    ///
    /// # Errors
    /// When the model is too large for one file without its initializers, or a file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        self.save_within(path, MAX_BYTES)
    }

    pub(super) fn save_within(&self, path: &Path, limit: u64) -> Result<()> {
        if self.encoded_len() > limit {
            let in_file = |source| Error::InFile { path: path.into(), source: Box::new(source) };
            return externalize(self, path, limit).map_err(in_file)?.write(path);
        }
        self.write(path)
    }

    fn write(&self, path: &Path) -> Result<()> {
        // The pieces may be mapped from this very file, so it is replaced by a rename and never written into.
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let staged = stage(parent).map_err(files::Error::io("create a file in", parent))?;
        let mut writer = std::io::BufWriter::new(staged.as_file());
        for piece in self.pieces() {
            writer.write_all(piece).map_err(files::Error::io("write", path))?;
        }
        writer.flush().map_err(files::Error::io("write", path))?;
        drop(writer);
        staged.persist(path).map_err(|error| files::Error::io("write", path)(error.error))?;
        Ok(())
    }
}

/// A temporary file with an ordinary file's permissions (a temporary file is private by default).
pub(super) fn stage(folder: &Path) -> std::io::Result<tempfile::NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".prefold-").suffix(".partial");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(folder)
}

fn parse_opset(body: &Bytes) -> Result<OpsetImport> {
    let mut import = OpsetImport { domain: String::new(), version: 0 };
    for field in Fields::new(opset::MESSAGE, body) {
        let field = field?;
        match field.number {
            opset::DOMAIN => import.domain = field.string()?,
            opset::VERSION => import.version = field.int()?,
            _ => {}
        }
    }
    if standard_domain(&import.domain).is_empty() {
        import.domain.clear();
    }
    Ok(import)
}
