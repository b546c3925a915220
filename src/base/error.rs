//! What can go wrong with a pretrained model.

use std::path::PathBuf;

/// What can go wrong with a checkpoint, a tokenizer or a chat template.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum Error {
    /// A file or folder could not be read or written.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Files(#[from] crate::files::Error),
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
        supported: &'static [&'static str],
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

/// The result of an operation on a pretrained model.
pub type Result<T> = std::result::Result<T, Error>;
