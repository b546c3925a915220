//! Training an adapter: objective, optimizer, schedule, checkpoints, the loop.
//!
//! Knows no ONNX and prints nothing: progress goes to an [`Observer`].

mod config;
mod error;
mod evaluate;
mod gradients;
mod objective;
mod optimizer;
mod run_folder;
mod schedule;
mod trainer;

pub use config::{ComputeType, TrainConfig};
pub use error::{Error, Result};
pub use evaluate::{Evaluation, evaluate};
pub use gradients::completion_gradients;
pub use objective::{CompletionLoss, batch_input, completion_loss, hidden_loss};
pub use optimizer::{AdamW, AdamWConfig, clip_gradients};
pub use run_folder::{METRICS_NAME, RunFolder};
pub use schedule::Schedule;
pub use trainer::{Observer, Outcome, Silent, StepReport, Trainer};
