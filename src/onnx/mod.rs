//! An ONNX file as a lossless, editable graph.
//!
//! Owns the wire format, the typed view of a model, its external data, the def-use [`Index`], edits as values
//! ([`Patch`]), new models ([`ModelBuilder`]) and structural checks ([`check()`]). Knows nothing of candle, adapters or
//! runtimes.
//!
//! A [`Model`] is the file's own bytes, cut at field boundaries, with a typed view beside them. Whatever is not edited is
//! written back as the bytes it was: unknown fields, doc strings, node metadata, functions, training information. Loading
//! and saving changes nothing; replacing one input of one node encodes that one field again, and the length prefixes of the
//! messages around it.
//!
//! Field numbers are those of the specification as of IR version [`NEWEST_IR`] and operator set [`NEWEST_OPSET`]; models from
//! IR version 3 on are edited. What a newer version adds are unknown fields and operators here, and passes through.
//!
//! ```no_run
//! use prefold::onnx::{Index, Model, NodeDef, Patch};
//!
//! # fn main() -> prefold::onnx::Result<()> {
//! let model = Model::open("exported".as_ref())?;
//! let index = Index::new(model.graph());
//! let mut patch = Patch::new("negate the logits");
//! for reader in index.consumers("logits_raw") {
//!     patch.insert_before(reader.node, NodeDef::new("Neg", "negate").inputs(["logits_raw"]).outputs(["negated"]));
//!     patch.replace_input(reader.node, reader.slot, "negated");
//! }
//! patch.apply(&model)?.save("edited.onnx".as_ref())
//! # }
//! ```

mod attribute;
mod builder;
mod bytes;
mod check;
mod cut;
mod data_files;
mod data_type;
mod def;
mod error;
mod external;
mod given_out;
mod graph;
mod index;
mod inlined;
mod listing;
mod model;
mod node;
mod outgrown;
mod patch;
mod proto;
mod tensor;
mod types;
mod value;
mod wire;

#[cfg(test)]
mod tests;

/// The newest version of the format that is known here, that of the `onnx` package 1.23; newer ones pass through.
pub const NEWEST_IR: i64 = 14;

/// The newest version of the standard operators that is known here; nodes of newer ones are kept as they are.
pub const NEWEST_OPSET: i64 = 28;

pub use attribute::{Attribute, AttributeValue};
pub use builder::ModelBuilder;
pub use bytes::Bytes;
pub use check::{check, check_any_order};
pub use cut::{cut, without};
pub use data_files::{DataFile, data_files, external_files};
pub use data_type::DataType;
pub use def::{FunctionDef, NodeDef, TensorDef, ValueDef};
pub use error::{Error, Result};
pub use external::{EXTERNAL_ALIGNMENT, ExternalRef, ExternalWriter};
pub use graph::{Graph, MAX_GRAPH_DEPTH};
pub use index::{Index, Use};
pub use inlined::inlined;
pub use model::{MODEL_NAME, Model, OpsetImport};
pub use node::{Node, NodeId};
pub use patch::Patch;
pub use tensor::{SparseTensor, Storage, TensorData, TensorInfo};
pub use types::check_types;
pub use value::{Dim, ValueInfo, ValueType};
