//! What can go wrong with training data.

use std::path::PathBuf;

use super::RecordKind;
use crate::base;

/// What can go wrong between a file of records and a batch.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum Error {
    /// The file could not be read.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Files(#[from] crate::files::Error),
    /// The file has no record.
    #[error("{} holds no records", path.display())]
    #[diagnostic(code(prefold::data::empty), help("write one JSON object a line: {}", RecordKind::SHAPES))]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A line is no JSON object.
    #[error("{}:{line}: {reason}", path.display())]
    #[diagnostic(code(prefold::data::json), help("every line is one JSON object: {}", RecordKind::SHAPES))]
    Json {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The parser's reason.
        reason: String,
    },
    /// The first record has the fields of no kind.
    #[error("{}:{line}: the record is of no known kind; its fields are {found}", path.display())]
    #[diagnostic(code(prefold::data::kind), help("a record is one of {}", RecordKind::SHAPES))]
    UnknownKind {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The fields it has.
        found: String,
    },
    /// A record is of another kind than the first one.
    #[error("{}:{line}: this is a {found} record, but the file began with {expected} records", path.display())]
    #[diagnostic(code(prefold::data::mixed), help("keep one kind in a file: {}", RecordKind::SHAPES))]
    Mixed {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// Its kind.
        found: RecordKind,
        /// The file's kind.
        expected: RecordKind,
    },
    /// A field is missing or holds the wrong thing.
    #[error("{}:{line}: the field `{field}` {reason}", path.display())]
    #[diagnostic(code(prefold::data::field), help("a {kind} record is {}", kind.shape()))]
    Field {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The field, `messages[2].role` if it is nested.
        field: String,
        /// What was expected and what was found, as the rest of a sentence.
        reason: String,
        /// The file's kind.
        kind: RecordKind,
    },
    /// A record could not become tokens.
    #[error("{}:{line}: {source}", path.display())]
    #[diagnostic(code(prefold::data::record), help("{}", help_of(source)))]
    Record {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// The reason.
        source: Box<Error>,
    },
    /// The tokenizer or its chat template failed.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Base(#[from] base::Error),
    /// The prompt template does not parse or does not render.
    #[error("the prompt template fails: {reason}")]
    #[diagnostic(
        code(prefold::data::template),
        help("it is a Jinja template over `text`, as in {:?}", super::DEFAULT_TEMPLATE)
    )]
    Template {
        /// The template engine's reason.
        reason: String,
    },
    /// Conversations need a chat template.
    #[error("the records are conversations, but {why}")]
    #[diagnostic(
        code(prefold::data::no_chat_template),
        help("use an instruction-tuned checkpoint, or records of the form {}", RecordKind::Completion.shape())
    )]
    NoChatTemplate {
        /// Why there is no template to use.
        why: &'static str,
    },
    /// Neither the prompt nor the tokenizer gives a first token.
    #[error("the prompt is empty, and the tokenizer has no token to begin a text with")]
    #[diagnostic(code(prefold::data::empty_prompt), help("give the record a prompt"))]
    EmptyPrompt,
    /// No example was left.
    #[error("none of the {records} records of {} fits into {max_seq_len} tokens", path.display())]
    #[diagnostic(
        code(prefold::data::too_long),
        help("the shortest completion has {shortest} tokens and needs one token of prompt; raise the sequence length")
    )]
    NothingFits {
        /// The file.
        path: PathBuf,
        /// How many records it has.
        records: usize,
        /// The longest sequence allowed.
        max_seq_len: usize,
        /// The shortest completion.
        shortest: usize,
    },
    /// A holdout that leaves one side empty or is no number.
    #[error("cannot hold out {wanted} of {available} records")]
    #[diagnostic(
        code(prefold::data::holdout),
        help("give a fraction between 0 and 1, or a count, that leaves at least one record on each side")
    )]
    Holdout {
        /// What was asked for.
        wanted: String,
        /// How many records there are.
        available: usize,
    },
    /// A class-wise selection of records without classes.
    #[error("{} holds {kind} records, which have no classes to select from", path.display())]
    #[diagnostic(
        code(prefold::data::no_classes),
        help("a number per class needs records of the form {}", RecordKind::Classification.shape())
    )]
    NoClasses {
        /// The file.
        path: PathBuf,
        /// The file's kind.
        kind: RecordKind,
    },
}

/// The result of an operation on training data.
pub type Result<T> = std::result::Result<T, Error>;

/// A record's place is added to an error; its advice stays the same.
fn help_of(error: &Error) -> String {
    miette::Diagnostic::help(error).map(|help| help.to_string()).unwrap_or_default()
}
