//! What can go wrong while a graph is written.

/// An error of the export room.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum Error {
    /// A file could not be read or written.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Files(#[from] crate::files::Error),
    /// The checkpoint failed.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Base(#[from] crate::base::Error),
    /// The graph could not be built.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Onnx(#[from] crate::onnx::Error),
    /// A weight has another shape than the decoder's description says.
    #[error("`{tensor}` has shape {found:?} where the decoder needs {expected:?}")]
    #[diagnostic(code(prefold::export::shape), help("take weights and description from the same model"))]
    Shape {
        /// The weight.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that it should have.
        expected: Vec<usize>,
    },
    /// The attention operator cannot count the tokens of rows by itself.
    #[error("a graph for padding on the right alone cannot be written: {reason}")]
    #[diagnostic(
        code(prefold::export::right_padding),
        help(
            "leave --right-padding-only out; with it goes --dialect ort, and a model whose heads the operator rotates"
        )
    )]
    RightPadding {
        /// Why not.
        reason: String,
    },
    /// A weight could not be converted.
    #[error("candle failed while converting `{tensor}`: {source}")]
    #[diagnostic(code(prefold::export::convert))]
    Convert {
        /// The weight.
        tensor: String,
        /// candle's reason.
        source: candle_core::Error,
    },
}

/// The result of an operation of export.
pub type Result<T> = std::result::Result<T, Error>;
