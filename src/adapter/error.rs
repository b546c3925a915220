//! What can go wrong with an adapter.

use std::path::PathBuf;

/// An error of the adapter room.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum Error {
    /// A file could not be read or written.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Files(#[from] crate::files::Error),
    /// The base model could not be read or run.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Base(#[from] crate::base::Error),
    /// candle refused an operation.
    #[error("candle failed while {action}: {source}")]
    #[diagnostic(code(prefold::adapter::candle))]
    Candle {
        /// What was being computed.
        action: &'static str,
        /// candle's reason.
        source: candle_core::Error,
    },
    /// The path holds no adapter.
    #[error("{} is not an adapter: {why}", path.display())]
    #[diagnostic(
        code(prefold::adapter::not_an_adapter),
        help("an adapter is a folder with adapter_config.json and adapter_model.safetensors")
    )]
    NotAnAdapter {
        /// The path.
        path: PathBuf,
        /// What is missing or damaged.
        why: String,
    },
    /// A configuration asks for what this version does not compute, or contradicts itself.
    #[error("adapter_config.json: `{field}` {why}")]
    #[diagnostic(code(prefold::adapter::config), help("{help}"))]
    Config {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        why: String,
        /// What to do.
        help: &'static str,
    },
    /// An option of an adapter that is to be trained makes no sense.
    #[error("adapter option `{field}` {why}")]
    #[diagnostic(code(prefold::adapter::option), help("{help}"))]
    Option {
        /// The option.
        field: &'static str,
        /// What is wrong with it.
        why: String,
        /// What to do.
        help: &'static str,
    },
    /// A PEFT folder asks for what prefold does not compute, or its files do not belong together.
    #[error("{} is a PEFT adapter, but {why}", path.display())]
    #[diagnostic(code(prefold::adapter::peft), help("{help}"))]
    Peft {
        /// The folder.
        path: PathBuf,
        /// What is wrong.
        why: String,
        /// What to do.
        help: String,
    },
    /// An adapter that PEFT has no form for.
    #[error("PEFT has no form for this adapter: {why}")]
    #[diagnostic(
        code(prefold::adapter::not_in_peft),
        help("PEFT folders hold lora, and prefix tuning of all layers; keep prefold's own folder for the rest")
    )]
    NotInPeft {
        /// What it cannot say.
        why: String,
    },
    /// A method that is no change of weights.
    #[error("{method} cannot be merged: it is no change of the model's weights")]
    #[diagnostic(
        code(prefold::adapter::not_merged),
        help("lora and full are; `prefold compile` puts this adapter into an ONNX graph")
    )]
    NotMerged {
        /// The method's name.
        method: &'static str,
    },
    /// The adapter's numbers differ from the model's.
    #[error("the adapter was made for another model{}: {field} is {adapter} in the adapter and {model} in the model",
        base_model.as_ref().map(|m| format!(" ({m})")).unwrap_or_default())]
    #[diagnostic(code(prefold::adapter::other_model), help("use the base model that the adapter was trained for"))]
    OtherModel {
        /// Which number.
        field: &'static str,
        /// In the adapter.
        adapter: usize,
        /// In the model.
        model: usize,
        /// The model that the adapter names.
        base_model: Option<String>,
    },
    /// A tensor is not there.
    #[error("the adapter has no tensor `{name}` of shape {shape:?}")]
    #[diagnostic(
        code(prefold::adapter::missing_tensor),
        help("adapter_config.json and adapter_model.safetensors do not belong together")
    )]
    MissingTensor {
        /// The tensor.
        name: String,
        /// The shape that it should have.
        shape: Vec<usize>,
    },
    /// A tensor that the configuration does not know.
    #[error("the adapter has a tensor `{name}` that its configuration does not ask for")]
    #[diagnostic(
        code(prefold::adapter::unknown_tensor),
        help("adapter_config.json and adapter_model.safetensors do not belong together")
    )]
    UnknownTensor {
        /// The tensor.
        name: String,
    },
    /// A tensor has another shape.
    #[error("the adapter's tensor `{name}` has shape {found:?}, its configuration asks for {expected:?}")]
    #[diagnostic(
        code(prefold::adapter::shape),
        help("adapter_config.json and adapter_model.safetensors do not belong together")
    )]
    Shape {
        /// The tensor.
        name: String,
        /// Shape in the file.
        found: Vec<usize>,
        /// Shape that the configuration implies.
        expected: Vec<usize>,
    },
    /// A tensor holds integers.
    #[error("the adapter's tensor `{name}` holds {data_type}, where floats are expected")]
    #[diagnostic(
        code(prefold::adapter::not_floats),
        help("save the adapter in float32, float16 or bfloat16; a quantised adapter must be dequantised first")
    )]
    NotFloats {
        /// The tensor.
        name: String,
        /// The type of its elements.
        data_type: &'static str,
    },
    /// A tensor holds NaN or infinity.
    #[error("the adapter's tensor `{name}` holds NaN or infinity")]
    #[diagnostic(code(prefold::adapter::not_finite), help("its training diverged: train again with a lower rate"))]
    NotFinite {
        /// The tensor.
        name: String,
    },
}

/// The result of an operation on an adapter.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Names what candle was doing when it failed.
    pub fn candle(action: &'static str) -> impl Fn(candle_core::Error) -> Self {
        move |source| Self::Candle { action, source }
    }
}
