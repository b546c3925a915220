//! What can go wrong while an adapter is folded.

/// An error of the fold room.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum Error {
    /// A file could not be read or written.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Files(#[from] crate::files::Error),
    /// The graph could not be read or edited.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Onnx(#[from] crate::onnx::Error),
    /// The adapter could not be read.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Adapter(#[from] crate::adapter::Error),
    /// The graph holds no attention that prefold knows.
    #[error("the graph holds no attention that prefold recognises")]
    #[diagnostic(
        code(prefold::fold::no_site),
        help("known: softmax attention of standard operators, and GroupQueryAttention that does not rotate inside")
    )]
    NoSite,
    /// An attention block was found, but not all of what the adapter needs.
    #[error("the attention around node `{anchor}` cannot carry an adapter: {reason}")]
    #[diagnostic(code(prefold::fold::site), help("{help}"))]
    Site {
        /// The node that gave the block away.
        anchor: String,
        /// How far the match got.
        reason: String,
        /// What to do.
        help: &'static str,
    },
    /// The attention blocks are not one for each layer.
    #[error("{place}, {reason}")]
    #[diagnostic(
        code(prefold::fold::layers),
        help("`prefold inspect --explain` lists every attention block that was found or not")
    )]
    Layers {
        /// What does not fit.
        reason: String,
        /// In which graph.
        place: String,
    },
    /// The graph has another number of layers than the adapter.
    #[error("the graph has {sites} attention sites, but the adapter was made for {layers} layers")]
    #[diagnostic(code(prefold::fold::site_count), help("fold an adapter of the same base model"))]
    SiteCount {
        /// In the graph.
        sites: usize,
        /// In the adapter.
        layers: usize,
    },
    /// The graph's heads are not the adapter's.
    #[error("layer {layer} of the graph has {what} {graph}, the adapter was made for {adapter}")]
    #[diagnostic(code(prefold::fold::shape), help("fold an adapter of the same base model"))]
    Shape {
        /// The layer.
        layer: usize,
        /// `num_heads` or `head_dim`.
        what: &'static str,
        /// In the graph.
        graph: i64,
        /// In the adapter.
        adapter: usize,
    },
    /// The graph carries an adapter already.
    #[error("the graph carries an adapter already ({earlier})")]
    #[diagnostic(code(prefold::fold::already_folded), help("fold into the base graph instead"))]
    AlreadyFolded {
        /// What it says of itself.
        earlier: String,
    },
    /// The graph computes in a type that an adapter cannot be written in.
    #[error("the graph computes in {found}, a type that prefold does not fold into")]
    #[diagnostic(code(prefold::fold::dtype), help("supported: float32, float16, bfloat16, float64"))]
    DataType {
        /// ONNX's name of the type.
        found: String,
    },
    /// An adapter that cannot be written into this graph.
    #[error("not yet folded: {what}")]
    #[diagnostic(code(prefold::fold::not_folded), help("{help}"))]
    NotFolded {
        /// Which adapter, or in which graph.
        what: String,
        /// What to do.
        help: &'static str,
    },
    /// The base model beside the graph could not be read.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Base(#[from] crate::base::Error),
    /// A tensor of the adapter could not be converted.
    #[error("candle failed while converting the adapter: {0}")]
    #[diagnostic(code(prefold::fold::convert))]
    Convert(#[source] candle_core::Error),
}

/// The result of an operation of fold.
pub type Result<T> = std::result::Result<T, Error>;
