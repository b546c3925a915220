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
    /// The GPUs of a run's processes do not come together.
    #[error("NCCL cannot sum the gradients: {why}")]
    #[diagnostic(
        code(prefold::train::nccl),
        help("see that every process has a GPU of its own; a prefold built without the feature `nccl` sums over TCP")
    )]
    Nccl {
        /// What NCCL says.
        why: String,
    },
    /// The loss or the gradient is no longer a number, or makes no sense any more.
    #[error("training diverged at step {step}: the {what} is {value}")]
    #[diagnostic(
        code(prefold::train::diverged),
        help(
            "lower --learning-rate (now {learning_rate}; try a third of it), or lengthen the warm-up or set \
             --max-grad-norm 1{}; {}",
            if *half { "; or compute in bf16 or f32, float16 overflows" } else { "" },
            checkpoint.as_ref().map_or("no checkpoint had been written".into(), |path| {
                format!("the last checkpoint is kept: {}", path.display())
            })
        )
    )]
    Diverged {
        /// The step, counted from 1.
        step: usize,
        /// `loss`, `smoothed loss` or `gradient norm`.
        what: &'static str,
        /// What it was.
        value: f64,
        /// The highest rate of the schedule.
        learning_rate: f64,
        /// Whether the model computes in float16.
        half: bool,
        /// The newest checkpoint.
        checkpoint: Option<PathBuf>,
    },
    /// The data are not what the objective needs.
    #[error("objective `{objective}` needs {needs}, but the training records are {found}")]
    #[diagnostic(
        code(prefold::train::objective),
        help(
            "sft learns completions, labels and conversations; dpo and simpo learn records {{\"prompt\", \"chosen\", \"rejected\"}}"
        )
    )]
    ObjectiveData {
        /// The objective's name.
        objective: &'static str,
        /// What it needs.
        needs: &'static str,
        /// What there is.
        found: &'static str,
    },
    /// An option needs held-out records.
    #[error("training option `{field}` needs records to evaluate on")]
    #[diagnostic(code(prefold::train::no_held_out), help("give --eval or --holdout"))]
    NoHeldOut {
        /// The option.
        field: &'static str,
    },
    /// There is nothing to resume.
    #[error("{} holds no run to resume", path.display())]
    #[diagnostic(code(prefold::train::nothing_to_resume), help("start without --resume"))]
    NothingToResume {
        /// The run folder.
        path: PathBuf,
    },
    /// A checkpoint is damaged.
    #[error("the checkpoint {} is damaged: {why}", path.display())]
    #[diagnostic(
        code(prefold::train::checkpoint),
        help("remove this folder to go on from the checkpoint before it, or from the start where there is none")
    )]
    Checkpoint {
        /// The checkpoint.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A checkpoint has another layout.
    #[error("the checkpoint {} has layout {found}, this prefold reads {expected}", path.display())]
    #[diagnostic(
        code(prefold::train::checkpoint_version),
        help("go on with the version of prefold that the run was started with")
    )]
    CheckpointVersion {
        /// The checkpoint.
        path: PathBuf,
        /// Its layout.
        found: String,
        /// The layout that this version reads.
        expected: u64,
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
    /// A variable of the launcher cannot be used.
    #[error("the environment variable `{name}` {why}")]
    #[diagnostic(
        code(prefold::train::launch),
        help(
            "start all processes with torchrun --no-python, mpirun or srun; or unset the variable to train in one process"
        )
    )]
    Launch {
        /// The variable.
        name: &'static str,
        /// What is wrong.
        why: String,
    },
    /// The processes of a run did not find each other.
    #[error("the processes did not meet at {host}:{port}: {why}")]
    #[diagnostic(
        code(prefold::train::join),
        help(
            "MASTER_ADDR and MASTER_PORT must name an address of process 0 that all machines reach and a free port of it; look              whether another process ended before"
        )
    )]
    Join {
        /// Host of process 0.
        host: String,
        /// Its port.
        port: u16,
        /// What happened.
        why: String,
    },
    /// Another process is no longer there.
    #[error("the connection to rank {rank} broke: {source}")]
    #[diagnostic(
        code(prefold::train::peer),
        help("look at what that process printed; --resume goes on from the last checkpoint")
    )]
    Peer {
        /// Its rank.
        rank: usize,
        /// What the system says.
        source: std::io::Error,
    },
    /// Processes run different things.
    #[error("rank {rank} is not at the same place of the run")]
    #[diagnostic(
        code(prefold::train::out_of_step),
        help("start all processes with the same prefold and the same options")
    )]
    OutOfStep {
        /// The other's rank.
        rank: usize,
    },
    /// Processes were started with different things.
    #[error("the {what} of rank {rank} differ from those of rank 0")]
    #[diagnostic(
        code(prefold::train::disagree),
        help(
            "all processes need the same options, data and model, and with --resume a run folder that all of them see"
        )
    )]
    Disagree {
        /// What differs.
        what: &'static str,
        /// The rank of the other.
        rank: usize,
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
