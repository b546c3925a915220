//! Whether a graph computes what candle computes: cases, error budget, comparison, report.
//!
//! [`Reference::compute`] runs the model in float64 over the cases; [`Check::new`] measures candle's own distance from it at
//! the graph's precision, which sets the budget; [`Check::run`] judges a graph in a runtime and [`Check::no_op`] the
//! exactness of a zero adapter; [`Check::report`] puts it all into one [`Report`].
//!
//! Every run sees the same tokens: the reference's own greedy continuation is written into a script that all others
//! replay. By induction, a run that picks the script's token at every step continues the prompt in the same way by itself.
//!
//! Knows nothing of the command line, of how a graph was made, or of how a runtime is found: sessions come from the caller.

mod baseline;
mod budget;
mod cases;
mod cause;
mod check;
mod compare;
mod figures;
mod finding;
mod graph_reference;
mod greedy;
mod in_order;
mod localise;
mod no_op;
mod reference;
mod render;
mod report;
mod reproducer;
mod rows;
mod run;
mod sites;
mod store;
#[cfg(test)]
mod testing;
mod thresholds;
mod together;

pub use baseline::Regression;
pub use budget::{Allowance, Budget};
pub use cases::{
    Case, CaseOptions, Padding, Room, adapter_cases, generated_prompts, length_cases, named_cases, select_cases,
    standard_cases,
};
pub use cause::Suspect;
pub use check::{Candidate, Check, Open};
pub use compare::Other;
pub use figures::{Figures, NonFinite, Perplexity, Spot, TensorFigures, Worst};
pub use finding::{Finding, FindingKind};
pub use greedy::{Greedy, GreedyDifference};
pub use in_order::SumOrder;
pub use localise::{Departure, Fault, LayerErrors, Localise, OpenAt, Place, Truth, Way};
pub use no_op::{FirstDifference, NoOpPair};
pub use reference::{Model, Ports, Reference};
pub use report::{
    AgainstCase, AgainstReport, CaseReport, Environment, Facts, NoOpReport, Report, RunCase, RunReport, SCHEMA_VERSION,
    Subject, Verdict,
};
pub use rows::Row;
pub use sites::{CapturedQuery, Difference, Probe, ProbeRun, QueryDistance};
pub use store::ReferenceStore;
pub use thresholds::Thresholds;
pub use together::Together;

/// What keeps parity from being judged. A graph that fails is no error but a [`Report`] that says so.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum Error {
    /// The candle model failed.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Base(#[from] crate::base::Error),
    /// candle refused an operation.
    #[error("candle failed while {action}: {source}")]
    #[diagnostic(code(prefold::parity::candle))]
    Candle {
        /// What was being computed.
        action: &'static str,
        /// candle's reason.
        source: candle_core::Error,
    },
    /// A graph failed in its runtime.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Runtime(#[from] crate::runtime::Error),
    /// A case cannot be run.
    #[error("the case `{case}` cannot be run: {why}")]
    #[diagnostic(
        code(prefold::parity::case),
        help("give prompts of at least one token that leave room for the decode steps within the model's positions")
    )]
    Case {
        /// The case.
        case: String,
        /// Why not.
        why: String,
    },
    /// An option makes no sense.
    #[error("the parity option `{option}` {why}")]
    #[diagnostic(code(prefold::parity::option), help("see `prefold verify --help`"))]
    Option {
        /// The option.
        option: &'static str,
        /// What is wrong.
        why: String,
    },
    /// Logits are not of the shape that the tokens ask for.
    #[error("the logits are {found:?}, the tokens and the model's vocabulary ask for {expected:?}")]
    #[diagnostic(code(prefold::parity::logits), help("the graph and the checkpoint are not of the same model"))]
    Logits {
        /// The shape given.
        found: Vec<usize>,
        /// `[batch, seq, vocab]` as it should be.
        expected: Vec<usize>,
    },
    /// The reference itself overflowed.
    #[error("the candle reference has {what} in the case `{case}`")]
    #[diagnostic(
        code(prefold::parity::reference),
        help("nothing can be judged against it: the checkpoint or the adapter is damaged")
    )]
    Reference {
        /// The case.
        case: String,
        /// The value and where it is.
        what: NonFinite,
    },
    /// A graph could not be edited, or read.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Graph(#[from] crate::onnx::Error),
    /// A file could not be read or written.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Files(#[from] crate::files::Error),
    /// There was nothing to judge.
    #[error("nothing was verified: no graph was run")]
    #[diagnostic(code(prefold::parity::nothing), help("name at least one runtime"))]
    Nothing,
    /// The report does not serialise.
    #[error("the parity report cannot be written: {0}")]
    #[diagnostic(code(prefold::parity::json))]
    Json(#[from] serde_json::Error),
}

/// The result of judging parity.
pub type Result<T> = std::result::Result<T, Error>;
