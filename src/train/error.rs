//! What can go wrong while training.

use std::path::PathBuf;

/// An error of the training room.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum Error {
    /// A file could not be read or written.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Files(#[from] crate::files::Error),
    /// The base model failed.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Base(#[from] crate::base::Error),
    /// The adapter failed.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Adapter(#[from] crate::adapter::Error),
    /// candle refused an operation.
    #[error("candle failed while {action}: {source}")]
    #[diagnostic(code(prefold::train::candle))]
    Candle {
        /// What was being computed.
        action: &'static str,
        /// candle's reason.
        source: candle_core::Error,
    },
    /// An option makes no sense.
    #[error("training option `{field}` {why}")]
    #[diagnostic(code(prefold::train::config), help("see `prefold train --help`"))]
    Config {
        /// The option.
        field: &'static str,
        /// What is wrong.
        why: String,
    },
    /// There is nothing to train on.
    #[error("no example is left to train on")]
    #[diagnostic(
        code(prefold::train::no_examples),
        help("all records were dropped: raise --max-seq-len, or look at the data")
    )]
    NoExamples,
    /// The loss or the gradient is no longer a number.
    #[error("training diverged at step {step}: the {what} is {value}")]
    #[diagnostic(
        code(prefold::train::diverged),
        help(
            "lower --learning-rate (now {learning_rate}), or lengthen the warm-up; checkpoints written before stay as they are"
        )
    )]
    Diverged {
        /// The step, counted from 1.
        step: usize,
        /// `loss` or `gradient norm`.
        what: &'static str,
        /// What it was.
        value: f64,
        /// The highest rate of the schedule.
        learning_rate: f64,
    },
    /// There is nothing to resume.
    #[error("{} holds no run to resume", path.display())]
    #[diagnostic(code(prefold::train::nothing_to_resume), help("start without --resume"))]
    NothingToResume {
        /// The run folder.
        path: PathBuf,
    },
    /// A checkpoint cannot be continued.
    #[error("the checkpoint {} cannot be resumed: {why}", path.display())]
    #[diagnostic(
        code(prefold::train::resume),
        help("resume with the options, data and base model that the run was started with")
    )]
    Resume {
        /// The checkpoint.
        path: PathBuf,
        /// Why.
        why: String,
    },
}

/// The result of an operation of training.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Names what candle was doing when it failed.
    pub fn candle(action: &'static str) -> impl Fn(candle_core::Error) -> Self {
        move |source| Self::Candle { action, source }
    }
}
