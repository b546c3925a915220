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
    /// A device cannot be used.
    #[error("{device} cannot be used: {why}")]
    #[diagnostic(code(prefold::base::device), help("{help}"))]
    Device {
        /// The device that was asked for.
        device: String,
        /// Why.
        why: String,
        /// What to do.
        help: String,
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
    /// A GGUF file breaks its own format.
    #[error("{} is not a readable GGUF file: {reason}", path.display())]
    #[diagnostic(code(prefold::base::gguf), help("the file is damaged, truncated or no GGUF file: fetch it again"))]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where in the file.
        reason: String,
    },
    /// A GGUF file is sound, but stores something that prefold cannot read.
    #[error("cannot read {}: {reason}", path.display())]
    #[diagnostic(code(prefold::base::gguf_unsupported), help("{help}"))]
    GgufUnsupported {
        /// The file.
        path: PathBuf,
        /// What is not supported.
        reason: String,
        /// What to do about it.
        help: &'static str,
    },
    /// A metadata entry of a GGUF file is missing, or has another type or value than it must.
    #[error("{}: the metadata entry `{key}` {reason}", path.display())]
    #[diagnostic(
        code(prefold::base::gguf_metadata),
        help("the file was not written for this kind of model, or by a converter that left this entry out")
    )]
    Metadata {
        /// The file.
        path: PathBuf,
        /// The entry's key.
        key: String,
        /// What is wrong with it, as the rest of a sentence.
        reason: String,
    },
    /// A GGUF file holds a model of an architecture that prefold does not know.
    #[error("{} holds a model of the architecture `{found}`", path.display())]
    #[diagnostic(code(prefold::base::architecture), help("supported in GGUF files: {}", supported.join(", ")))]
    Architecture {
        /// The file.
        path: PathBuf,
        /// The architecture's name in the file.
        found: String,
        /// The names that are supported.
        supported: Vec<&'static str>,
    },
    /// A tensor is not in the checkpoint.
    #[error("{} has no tensor `{name}`", path.display())]
    #[diagnostic(
        code(prefold::base::tensor_missing),
        help("the checkpoint is incomplete, or its configuration belongs to another model")
    )]
    TensorMissing {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor's name in the Hugging Face convention.
        name: String,
    },
    /// A tensor is there but cannot be read.
    #[error("cannot read the tensor `{name}` of {}: {reason}", path.display())]
    #[diagnostic(code(prefold::base::tensor), help("the checkpoint is damaged: fetch it again"))]
    Tensor {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor's name in the Hugging Face convention.
        name: String,
        /// What went wrong.
        reason: String,
    },
    /// A tokenizer cannot be built.
    #[error("cannot build the tokenizer of {}: {reason}", path.display())]
    #[diagnostic(
        code(prefold::base::tokenizer),
        help("the tokenizer's files are damaged, or of a kind that prefold does not know")
    )]
    Tokenizer {
        /// The file or folder it comes from.
        path: PathBuf,
        /// What went wrong.
        reason: String,
    },
    /// A GGUF file names a pre-tokenizer that is not known, so its tokens would be wrong.
    #[error("{} uses the pre-tokenizer `{found}`, which prefold does not know", path.display())]
    #[diagnostic(
        code(prefold::base::pre_tokenizer),
        help("known: {}. Use the model's Hugging Face folder, which carries a tokenizer.json", known.join(", "))
    )]
    PreTokenizer {
        /// The file.
        path: PathBuf,
        /// The name in the file.
        found: String,
        /// The names that are known.
        known: Vec<&'static str>,
    },
    /// A text could not be turned into tokens, or tokens into text.
    #[error("cannot {action}: {reason}")]
    #[diagnostic(code(prefold::base::tokenize), help("the tokenizer gave this reason; check its files"))]
    Tokenize {
        /// `encode a text` or `decode tokens`.
        action: &'static str,
        /// The tokenizer's reason.
        reason: String,
    },
    /// The tokenizer made an id that the model has no embedding for.
    #[error(
        "the text {text:?} holds the token {token:?} with id {id}, but the model's vocabulary has {vocab_size} entries"
    )]
    #[diagnostic(
        code(prefold::base::vocabulary),
        help("the tokenizer belongs to another model, or tokens were added without resizing the model's embeddings")
    )]
    Vocabulary {
        /// The beginning of the text.
        text: String,
        /// The token's text.
        token: String,
        /// The token's id.
        id: u32,
        /// How many ids the model knows.
        vocab_size: usize,
    },
    /// A chat template does not parse.
    #[error("the chat template does not parse: {reason}")]
    #[diagnostic(
        code(prefold::base::chat_template),
        help("prefold reads templates as transformers does (Jinja); mend the template, or do not use it")
    )]
    TemplateSyntax {
        /// The parser's reason, with the line.
        reason: String,
    },
    /// A chat template refused the messages.
    #[error("the chat template refused the conversation: {reason}")]
    #[diagnostic(
        code(prefold::base::chat_render),
        help("many templates want the roles to alternate, user first, and some know no system message")
    )]
    TemplateRender {
        /// The template's reason.
        reason: String,
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
