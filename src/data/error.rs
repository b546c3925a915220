//! What can go wrong with training data.

use std::path::PathBuf;

use super::{Layout, Place};
use crate::base;

/// What can go wrong between a file of records and a batch.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum Error {
    /// The file could not be read.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Files(#[from] crate::files::Error),
    /// A file or folder cannot be used as data.
    #[error("{} {reason}", path.display())]
    #[diagnostic(code(prefold::data::file), help("{help}"))]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it, as the rest of a sentence.
        reason: String,
        /// What to do.
        help: String,
    },
    /// There is no record.
    #[error("{paths} holds no records")]
    #[diagnostic(code(prefold::data::empty), help("a record is one of {}", Layout::SHAPES))]
    Empty {
        /// The files or folders.
        paths: String,
    },
    /// A line or an element is no JSON object.
    #[error("{place}: {reason}")]
    #[diagnostic(code(prefold::data::json), help("every record is one JSON object: {}", Layout::SHAPES))]
    Json {
        /// Where it stands.
        place: Place,
        /// The parser's reason.
        reason: String,
    },
    /// A row of a table does not fit its header, or is no text.
    #[error("{place}: {reason}")]
    #[diagnostic(
        code(prefold::data::table),
        help("a table begins with a header; fields with a delimiter, a quote or a line break stand in double quotes")
    )]
    Table {
        /// Where it stands.
        place: Place,
        /// What is wrong.
        reason: String,
    },
    /// The first record has the fields of no layout.
    #[error("{place}: the record is of no known layout; its fields are {found}")]
    #[diagnostic(
        code(prefold::data::layout),
        help(
            "a record is one of {}; other names of fields are given as `fields = {{ prompt = \"question\" }}`",
            Layout::SHAPES
        )
    )]
    UnknownLayout {
        /// Where it stands.
        place: Place,
        /// The fields it has, and perhaps what was meant.
        found: String,
    },
    /// A record is of another layout than the first one.
    #[error(
        "{place}: this is a {found} record, but {} {expected} records",
        if *asked_for { "the options ask for" } else { "the file began with" }
    )]
    #[diagnostic(code(prefold::data::mixed), help("keep one layout in a data set; this one's is {}", expected.shape()))]
    Mixed {
        /// Where it stands.
        place: Place,
        /// Its layout.
        found: Layout,
        /// The layout of those before it, or that of the options.
        expected: Layout,
        /// Whether the options say the layout.
        asked_for: bool,
    },
    /// A field is missing or holds the wrong thing.
    #[error("{place}: the field `{field}` {reason}")]
    #[diagnostic(code(prefold::data::field), help("a record of the layout `{layout}` is {}", layout.shape()))]
    Field {
        /// Where the record stands.
        place: Place,
        /// The field, `messages[2].role` if it is nested.
        field: String,
        /// What was expected and what was found, as the rest of a sentence.
        reason: String,
        /// The layout of the records.
        layout: Layout,
    },
    /// A record could not become tokens.
    #[error("{place}: {source}")]
    #[diagnostic(code(prefold::data::record), help("{}", help_of(source)))]
    Record {
        /// Where it stands.
        place: Place,
        /// The reason.
        source: Box<Error>,
    },
    /// The tokenizer or its chat template failed.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Base(#[from] base::Error),
    /// A prompt template does not parse or does not render.
    #[error("the option `{option}` fails as a template: {reason}")]
    #[diagnostic(code(prefold::data::template), help("it is a Jinja template over {variables}"))]
    Template {
        /// The option that holds it.
        option: &'static str,
        /// The template engine's reason.
        reason: String,
        /// What it may use.
        variables: &'static str,
    },
    /// Conversations need a chat template.
    #[error("the records are conversations, but {why}")]
    #[diagnostic(
        code(prefold::data::no_chat_template),
        help("use an instruction-tuned checkpoint, or records of the form {}", Layout::Completion.shape())
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
    #[error("none of the {records} records of {paths} can be used at {max_seq_len} tokens: {why}")]
    #[diagnostic(
        code(prefold::data::nothing_left),
        help("raise max_seq_len, choose another `truncation`, or look at the records with `prefold data preview`")
    )]
    NothingLeft {
        /// The files.
        paths: String,
        /// How many records there are.
        records: usize,
        /// The longest sequence allowed.
        max_seq_len: usize,
        /// Why they were dropped.
        why: String,
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
    #[error("{paths} holds {layout} records, which have no classes to select from")]
    #[diagnostic(
        code(prefold::data::no_classes),
        help("a number per class needs records of the form {}", Layout::Classification.shape())
    )]
    NoClasses {
        /// The files.
        paths: String,
        /// Their layout.
        layout: Layout,
    },
    /// An option makes no sense, alone or with these records.
    #[error("data option `{option}` {reason}")]
    #[diagnostic(code(prefold::data::option), help("{help}"))]
    Option {
        /// The option.
        option: &'static str,
        /// What is wrong with it, as the rest of a sentence.
        reason: String,
        /// What to do.
        help: &'static str,
    },
}

/// The result of an operation on training data.
pub type Result<T> = std::result::Result<T, Error>;

/// A record's place is added to an error; its advice stays the same.
fn help_of(error: &Error) -> String {
    miette::Diagnostic::help(error).map(|help| help.to_string()).unwrap_or_default()
}
