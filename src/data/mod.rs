//! Records to token batches.
//!
//! Owns the JSONL formats ([`Records`]), how a record becomes a prompt and a completion ([`Format`]), the examples that
//! fit a length ([`Dataset`]), their order ([`Sampler`], [`Cursor`]) and their shape for a model ([`Batch`]).
//! Knows tokenizers, but no models and no training.
//!
//! ```text
//! records.jsonl ──► Records ──► Format ──► Dataset ──► Sampler ──► Batch
//!                   limit, per class, holdout   │
//!                                               └──► Report
//! ```

mod batch;
mod dataset;
mod error;
mod format;
mod record;
mod sampler;

pub use batch::{Batch, IGNORED};
pub use dataset::{Dataset, Lengths, Report};
pub use error::{Error, Result};
pub use format::{ChatUse, DEFAULT_TEMPLATE, Example, Format, FormatOptions, LabelText};
pub use record::{Entry, Holdout, Record, RecordKind, Records, read_jsonl};
pub use sampler::{Cursor, Sampler};
