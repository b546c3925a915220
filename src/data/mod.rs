//! Records to token batches.
//!
//! Owns the files of records and their layouts ([`Records`]), how a record becomes a prompt and a completion ([`Format`]), the
//! examples that fit a length ([`Dataset`]), their order ([`Sampler`], [`Cursor`]) and their shape for a model ([`Batch`]).
//! [`DataConfig`] holds the options of all. Knows tokenizers, but no models and no training.
//!
//! ```text
//! JSONL, JSON, CSV, Parquet, folders
//!        │ source: rows         layout, parse
//!        ▼
//!     Records ──► Format ──► Dataset ──► Sampler ──► Batch
//!     limit, per class,      truncation,             padded, or packed
//!     holdout                packing, Report         with segments
//! ```
//!
//! A preference record is two examples, which stay together as a group: orders count groups, and a batch holds their rows
//! one after the other.

mod batch;
mod config;
mod dataset;
mod error;
mod example;
mod format;
mod layout;
mod options;
mod packing;
mod parse;
mod place;
mod record;
mod report;
mod sampler;
mod source;
mod truncation;
mod turns;

pub use batch::{Batch, IGNORED};
pub use config::{DataConfig, Paths};
pub use dataset::{Dataset, DatasetOptions};
pub use error::{Error, Result};
pub use example::Example;
pub use format::Format;
pub use layout::{Fields, Layout};
pub use options::{ChatUse, DEFAULT_TEMPLATE, FormatOptions, LabelText};
pub use parse::ReadOptions;
pub use place::{At, Place, distance, nearest};
pub use record::{Entry, Holdout, Prompt, Record, Records};
pub use report::{Dropped, Lengths, Packed, Report, Truncated};
pub use sampler::{Cursor, Sampler};
pub use source::Split;
pub use truncation::{Cut, DropReason, Truncation};
