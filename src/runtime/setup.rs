//! Which runtime, and how: data that goes to another process.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{OrtOptions, OrtSession, Result, Session, TractOptions, TractSession};

/// A runtime with its options.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "runtime", rename_all = "lowercase")]
pub enum Setup {
    /// ONNX Runtime.
    Ort {
        /// The library to load.
        library: PathBuf,
        /// How the graph is loaded.
        options: OrtOptions,
    },
    /// tract.
    Tract,
}

impl Setup {
    /// Opens a graph in this process. `fed` are inputs with a default that will be fed.
    ///
    /// # Errors
    /// See [`OrtSession::open`] and [`TractSession::open`].
    pub fn open(&self, graph: &Path, fed: &[String]) -> Result<Box<dyn Session>> {
        Ok(match self {
            Self::Ort { library, options } => Box::new(OrtSession::open(library, graph, *options)?),
            Self::Tract => Box::new(TractSession::open_fed(graph, fed, TractOptions::default())?),
        })
    }

    /// The runtime's name in messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ort { .. } => "ONNX Runtime",
            Self::Tract => "tract",
        }
    }

    /// Variables of the process that runs it. TensorRT and cuBLAS read this one, whatever a provider's options say.
    pub(super) fn environment(&self) -> Option<(&'static str, &'static str)> {
        match self {
            Self::Ort { options, .. } if !options.tf32 => Some(("NVIDIA_TF32_OVERRIDE", "0")),
            _ => None,
        }
    }
}
