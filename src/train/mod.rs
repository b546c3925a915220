//! Training an adapter: objectives, optimizer, schedule, checkpoints, the loop.
//!
//! Knows no ONNX and prints nothing: progress goes to an [`Observer`].
//!
//! ```text
//! Trainer::run ──► step (step.rs): batches ──► Objective ──► gradients ──► AdamW
//!      │
//!      ├── parallel/      several processes, one run
//!      ├── evaluate/      held-out loss, accuracy, classes
//!      ├── control.rs     best adapter, patience, a loss that explodes
//!      ├── checkpoint.rs  state of the run, whole or not at all
//!      └── run_folder.rs  metrics.jsonl, report.html (curves.rs), tensorboard/ (tensorboard.rs)
//! ```

mod checkpoint;
mod config;
mod control;
mod curves;
mod error;
mod estimate;
mod evaluate;
mod fingerprint;
mod gradients;
mod objective;
mod optimizer;
mod pages;
mod parallel;
mod run_folder;
mod schedule;
mod step;
mod tensorboard;
mod trainer;

pub use config::{BestBy, ComputeType, TrainConfig};
pub use control::Best;
pub use curves::REPORT_NAME;
pub use error::{Error, Result};
pub use estimate::{MemoryEstimate, Workload};
pub use evaluate::{ClassScore, Classification, Confusion, EvalBy, Evaluation, Evaluator, Scores};
pub use fingerprint::Fingerprint;
pub use gradients::{BatchGradients, batch_gradients};
pub use objective::{
    BatchLoss, CompletionLoss, DpoConfig, Models, Objective, ObjectiveKind, Sft, SimpoConfig, batch_input,
    completion_loss,
};
pub use optimizer::{AdamW, AdamWConfig, clip_gradients};
pub use pages::{keep_freed_pages, prepare_memory};
pub use parallel::{Group, Launch};
pub use run_folder::{EVALUATION_NAME, METRICS_NAME, RunFolder};
pub use schedule::{LrScheduler, Schedule};
pub use step::StepReport;
pub use tensorboard::EventWriter;
pub use trainer::{Ended, Inputs, Observer, Outcome, Silent, Trainer, check_data, check_method, evaluated_groups};
