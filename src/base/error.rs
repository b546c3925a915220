//! What can go wrong while a base model is opened or run.

use std::path::PathBuf;

/// An error of the base room.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum Error {
    /// A file could not be read.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Files(#[from] crate::files::Error),
    /// candle refused an operation.
    #[error("candle failed while {action}: {source}")]
    #[diagnostic(code(prefold::base::candle))]
    Candle {
        /// What was being computed.
        action: &'static str,
        /// candle's reason.
        source: candle_core::Error,
    },
    /// The path holds no checkpoint.
    #[error("{} is not a checkpoint: {why}", path.display())]
    #[diagnostic(
        code(prefold::base::not_a_checkpoint),
        help("a checkpoint is a Hugging Face folder (config.json, *.safetensors, tokenizer.json) or a .gguf file")
    )]
    NotACheckpoint {
        /// The path.
        path: PathBuf,
        /// What is missing.
        why: String,
    },
    /// A configuration lacks a field, or it holds something that cannot be used.
    #[error("{}: `{field}` {why}", path.display())]
    #[diagnostic(code(prefold::base::config), help("{help}"))]
    Config {
        /// The configuration file.
        path: PathBuf,
        /// The field concerned.
        field: String,
        /// What is wrong with it.
        why: String,
        /// What to do.
        help: String,
    },
    /// A family that no file under `base/family` maps.
    #[error("{}: model_type `{family}` is not a family that prefold knows", path.display())]
    #[diagnostic(code(prefold::base::family), help("known families: {known}"))]
    Family {
        /// The configuration file.
        path: PathBuf,
        /// The unknown family.
        family: String,
        /// The known ones.
        known: String,
    },
    /// A safetensors file does not parse.
    #[error("{} is not a whole safetensors file: {why}", path.display())]
    #[diagnostic(code(prefold::base::safetensors), help("it is truncated or damaged; fetch or write it again"))]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// The parser's reason.
        why: String,
    },
    /// A tensor that the configuration asks for is not in the checkpoint.
    #[error("the checkpoint {} has no tensor `{name}`", path.display())]
    #[diagnostic(
        code(prefold::base::missing_tensor),
        help("config.json and the weights do not belong together, or a shard is missing")
    )]
    MissingTensor {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// A tensor has another shape than the configuration says.
    #[error("{}: tensor `{name}` has shape {found:?}, the configuration asks for {expected:?}", path.display())]
    #[diagnostic(code(prefold::base::shape), help("config.json and the weights do not belong together"))]
    Shape {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Shape in the file.
        found: Vec<usize>,
        /// Shape that the configuration implies.
        expected: Vec<usize>,
    },
    /// A tensor's data type is not one that prefold reads.
    #[error("{}: tensor `{name}` has dtype {found}", path.display())]
    #[diagnostic(code(prefold::base::dtype), help("weights may be F64, F32, BF16 or F16"))]
    Dtype {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Data type in the file.
        found: String,
    },
    /// The inputs of a forward pass do not fit each other or the model.
    #[error("the model's inputs do not fit: {why}")]
    #[diagnostic(code(prefold::base::input), help("{help}"))]
    Input {
        /// What does not fit.
        why: String,
        /// What to do.
        help: &'static str,
    },
}

/// The result of an operation on a base model.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Names what candle was doing when it failed.
    pub fn candle(action: &'static str) -> impl Fn(candle_core::Error) -> Self {
        move |source| Self::Candle { action, source }
    }
}
