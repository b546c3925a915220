//! Running a graph: ONNX Runtime (found or installed, loaded at run time) and tract (embedded), behind one [`Session`],
//! and the cached decode loop over either. A [`Setup`] says which runtime and how; [`ProcessSession`] runs it in a process of
//! its own, whose crash or hang is an error here.
//!
//! Knows nothing of adapters, checkpoints or how a graph was made: it sees a file with named inputs and outputs.

mod decode;
mod frame;
mod given;
mod guard;
pub mod library;
mod ort_session;
mod process;
mod profile;
mod serve;
mod session;
mod setup;
mod tensor;
#[cfg(test)]
mod testing;
mod tract_session;
mod value;

use std::path::PathBuf;

pub use decode::{CachePort, DecoderPorts, GraphDecoder, last_logits, left_pad, positions};
pub(crate) use decode::{derived_feed, present};
pub use given::{Given, NamedGiven, WithGiven};
pub use ort_session::{Optimization, OrtOptions, OrtSession, Provider};
pub use process::{Launch, ProcessSession};
pub use serve::serve_parent;
pub use session::{Dim, Port, RuntimeInfo, Session};
pub use setup::Setup;
pub use tensor::Tensor;
pub use tract_session::{TRACT_VERSION, TractOptions, TractSession};
pub use value::{DType, NamedValues, Value};

/// What can go wrong while a graph is loaded or run.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum Error {
    /// A file could not be read, written, downloaded or unpacked.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Files(#[from] crate::files::Error),
    /// No ONNX Runtime library was found.
    #[error("no usable ONNX Runtime library was found{}", list(tried))]
    #[diagnostic(
        code(prefold::runtime::no_library),
        help(
            "run `prefold runtime install`, or name a library of ONNX Runtime 1.24 or newer with --ort-lib or \
              ORT_DYLIB_PATH"
        )
    )]
    NoLibrary {
        /// What was looked at, and why each was not usable.
        tried: Vec<String>,
    },
    /// No ONNX Runtime library with the execution provider was found.
    #[error("no ONNX Runtime library with the execution provider {provider} was found{}", list(tried))]
    #[diagnostic(
        code(prefold::runtime::no_provider_library),
        help(
            "run `prefold runtime install --cuda`, or name a library that stands beside the provider's with --ort-lib"
        )
    )]
    NoProviderLibrary {
        /// The provider.
        provider: &'static str,
        /// What was looked at, and why each was not usable.
        tried: Vec<String>,
    },
    /// The library that was asked for cannot be used.
    #[error("the ONNX Runtime library {} cannot be used: {reason}", path.display())]
    #[diagnostic(
        code(prefold::runtime::library),
        help("prefold needs ONNX Runtime 1.24 or newer, built for this platform; `prefold runtime install` gets one")
    )]
    Library {
        /// The library's path.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// Another ONNX Runtime library is loaded already.
    #[error("this process runs ONNX Runtime from {} and cannot load {} too", loaded.display(), asked.display())]
    #[diagnostic(
        code(prefold::runtime::library_loaded),
        help("ONNX Runtime is loaded once per process; start another process for the other library")
    )]
    LibraryLoaded {
        /// The library in use.
        loaded: PathBuf,
        /// The one asked for.
        asked: PathBuf,
    },
    /// A runtime refused a graph.
    #[error("{runtime} cannot load {}: {reason}", path.display())]
    #[diagnostic(
        code(prefold::runtime::load),
        help("the graph is damaged, its external data is missing, or it uses what this runtime does not support")
    )]
    Load {
        /// The runtime.
        runtime: &'static str,
        /// The graph.
        path: PathBuf,
        /// The runtime's reason.
        reason: String,
    },
    /// A runtime failed while running a graph.
    #[error("{runtime} failed while running the graph: {reason}")]
    #[diagnostic(code(prefold::runtime::run), help("the runtime gave this reason"))]
    Run {
        /// The runtime.
        runtime: &'static str,
        /// The runtime's reason.
        reason: String,
    },
    /// The execution provider that was asked for is not there.
    #[error("ONNX Runtime cannot use the execution provider {provider}: {reason}")]
    #[diagnostic(
        code(prefold::runtime::provider),
        help(
            "`prefold runtime list` says of every provider whether it loads; CUDA's libraries are looked for in LD_LIBRARY_PATH, \
             a toolkit (CUDA_HOME) and Python's nvidia packages"
        )
    )]
    Provider {
        /// The provider.
        provider: &'static str,
        /// The runtime's reason.
        reason: String,
    },
    /// The process of a runtime ended or did not answer.
    #[error("the process of {runtime} {reason}")]
    #[diagnostic(code(prefold::runtime::process), help("the graph, the library or the machine's memory is at fault"))]
    Process {
        /// The runtime.
        runtime: String,
        /// How it ended.
        reason: String,
    },
    /// A runtime in a process of its own failed.
    #[error("{message}")]
    #[diagnostic(code(prefold::runtime::remote), help("the runtime gave this reason"))]
    Remote {
        /// The error's text there.
        message: String,
        /// Whether there is no such runtime.
        unavailable: bool,
    },
    /// The tensors given to a graph are not those it takes.
    #[error("the graph cannot be fed: {reason}")]
    #[diagnostic(
        code(prefold::runtime::feed),
        help("`prefold inspect` lists a graph's inputs with their types and shapes")
    )]
    Feed {
        /// What does not fit.
        reason: String,
    },
    /// The graph is not a decoder that prefold can drive.
    #[error("the graph is not a decoder with the usual inputs and outputs: {reason}")]
    #[diagnostic(
        code(prefold::runtime::ports),
        help(
            "expected: input_ids, attention_mask, optionally position_ids and past_key_values.N.key|value -> logits, \
             present.N.key|value"
        )
    )]
    Ports {
        /// What is missing or unknown.
        reason: String,
    },
    /// Token ids or masks do not fit together, or do not fit the graph.
    #[error("the tokens do not fit: {reason}")]
    #[diagnostic(code(prefold::runtime::tokens), help("ids and mask are [batch, seq]; every row needs a real token"))]
    Tokens {
        /// What does not fit.
        reason: String,
    },
    /// A row's logits give no next token.
    #[error("row {row} of the batch has NaN among its logits")]
    #[diagnostic(code(prefold::runtime::nan), help("the graph or its weights are damaged, or f16 overflowed"))]
    NanLogits {
        /// The row of the batch.
        row: usize,
    },
    /// A set of tensors lacks a name.
    #[error("there is no tensor `{name}`, only: {}", present.join(", "))]
    #[diagnostic(code(prefold::runtime::no_value), help("check the names in the file"))]
    NoValue {
        /// The name asked for.
        name: String,
        /// The names that there are.
        present: Vec<String>,
    },
    /// Floating-point elements were needed.
    #[error("a tensor of {dtype} was given where floating-point numbers are needed")]
    #[diagnostic(code(prefold::runtime::not_float), help("give f64, f32, f16 or bf16"))]
    NotFloat {
        /// The type given.
        dtype: DType,
    },
    /// Integer elements were needed.
    #[error("a tensor of {dtype} was given where integers are needed")]
    #[diagnostic(code(prefold::runtime::not_integer), help("give i64, i32, i8, u8 or bool"))]
    NotInteger {
        /// The type given.
        dtype: DType,
    },
    /// A tensor's shape is impossible or not the one needed.
    #[error("a tensor has an impossible shape: {reason}")]
    #[diagnostic(code(prefold::runtime::shape), help("check the tensor's dimensions"))]
    Shape {
        /// What is wrong.
        reason: String,
    },
    /// A safetensors file cannot be read or written.
    #[error("cannot {action} {}: {reason}", path.display())]
    #[diagnostic(code(prefold::runtime::safetensors), help("the file is damaged, or the disk is full"))]
    Safetensors {
        /// `read` or `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The library's reason.
        reason: String,
    },
}

/// The result of loading or running a graph.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Whether the runtime is not there at all, so that nothing is known about the graph.
    pub fn is_unavailable(&self) -> bool {
        match self {
            Self::NoLibrary { .. }
            | Self::NoProviderLibrary { .. }
            | Self::Library { .. }
            | Self::LibraryLoaded { .. }
            | Self::Provider { .. } => true,
            Self::Remote { unavailable, .. } => *unavailable,
            _ => false,
        }
    }
}

fn list(tried: &[String]) -> String {
    tried.iter().map(|line| format!("\n  {line}")).collect()
}
