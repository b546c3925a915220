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
        help(
            "known: softmax attention of standard operators; Attention of ai.onnx; GroupQueryAttention, MultiHeadAttention \
             and Attention of com.microsoft. What stands in local functions is not looked into: inline them first, with \
             onnx.inliner.inline_local_functions"
        )
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
    #[diagnostic(
        code(prefold::fold::already_folded),
        help("pass --stack to add to it, --replace to put the new one in its place, or fold into the base graph")
    )]
    AlreadyFolded {
        /// What it says of itself.
        earlier: String,
    },
    /// Nothing was given to fold.
    #[error("there is no adapter to fold")]
    #[diagnostic(code(prefold::fold::no_adapter), help("give --adapter"))]
    NoAdapter,
    /// Several adapters for an emission of one.
    #[error("{count} adapters were given, and a graph with baked tensors holds one")]
    #[diagnostic(code(prefold::fold::one_adapter), help("give one, or fold with --emission slot or bank"))]
    OneAdapter {
        /// How many.
        count: usize,
    },
    /// An adapter's name cannot be used.
    #[error("the adapter name `{name}` {why}")]
    #[diagnostic(code(prefold::fold::name), help("give adapters names: --adapter NAME=FOLDER"))]
    Name {
        /// The name.
        name: String,
        /// What is wrong.
        why: &'static str,
    },
    /// Adapters of one graph are of different kinds.
    #[error("`{key}` is {first_value} in {first} and {other_value} in {other}")]
    #[diagnostic(
        code(prefold::fold::adapters_differ),
        help("adapters that share a graph's slots or bank have the same configuration up to their rank")
    )]
    ConfigsDiffer {
        /// The field of the configuration.
        key: String,
        /// The first adapter.
        first: String,
        /// Its value.
        first_value: String,
        /// The other adapter.
        other: String,
        /// Its value.
        other_value: String,
    },
    /// Adapters of one graph have different tensors.
    #[error("the adapters cannot share a graph: they differ in {what}")]
    #[diagnostic(code(prefold::fold::tensors_differ), help("fold adapters of one method and one base model together"))]
    AdaptersDiffer {
        /// In what.
        what: String,
    },
    /// The graph's format does not know inputs with a default.
    #[error("the graph is of IR version {found}, which knows no inputs with a default value")]
    #[diagnostic(
        code(prefold::fold::old_ir),
        help("convert it to IR version {needed} or later, or fold with --emission baked")
    )]
    OldFormat {
        /// Its version.
        found: i64,
        /// The first that does.
        needed: i64,
    },
    /// The file before a fold cannot be had.
    #[error("the graph cannot be unfolded: {why}")]
    #[diagnostic(
        code(prefold::fold::unfold),
        help("only a graph as `prefold fold` wrote it leads back; fold into the base graph instead")
    )]
    Unfold {
        /// Why not.
        why: String,
    },
    /// The graph has no bank to change.
    #[error("there is no bank to work on: {why}")]
    #[diagnostic(code(prefold::fold::no_bank), help("{help}"))]
    NoBank {
        /// Why not.
        why: &'static str,
        /// What to do.
        help: &'static str,
    },
    /// The bank has no adapter of a name.
    #[error("the bank has no adapter `{name}`")]
    #[diagnostic(code(prefold::fold::no_row), help("its adapters are {}", rows.join(", ")))]
    NoRow {
        /// The name.
        name: String,
        /// The names that it has.
        rows: Vec<String>,
    },
    /// Values do not go into a graph's slots.
    #[error("the values do not fit the graph: {why}")]
    #[diagnostic(
        code(prefold::fold::slots),
        help(
            "`prefold inspect GRAPH` lists its inputs; `prefold adapter convert --to onnx_adapter --graph GRAPH` writes values for it"
        )
    )]
    Slots {
        /// What does not fit.
        why: String,
    },
    /// A file is no `.onnx_adapter` file.
    #[error("{} is not a readable .onnx_adapter file: {why}", path.display())]
    #[diagnostic(
        code(prefold::fold::adapter_file),
        help("write it with `prefold adapter convert --to onnx_adapter` or onnxruntime.AdapterFormat")
    )]
    AdapterFile {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The graph computes in a type that an adapter cannot be written in.
    #[error("the graph computes in {found}, a type that prefold does not fold into")]
    #[diagnostic(code(prefold::fold::dtype), help("supported: float32, float16, bfloat16, float64"))]
    DataType {
        /// ONNX's name of the type.
        found: String,
    },
    /// A value of the adapter is beyond the graph's type.
    #[error("`{tensor}` has a value of {value:.3e}, and {data_type}, in which the graph computes, ends at {most:.3e}")]
    #[diagnostic(
        code(prefold::fold::too_large),
        help("fold into the float32 graph, or train with a lower rate or more weight decay")
    )]
    TooLarge {
        /// The tensor as the fold writes it.
        tensor: String,
        /// Its largest magnitude.
        value: f64,
        /// ONNX's name of the type.
        data_type: String,
        /// The type's largest number.
        most: f64,
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
    /// A data file of the graph has the name of a file that the fold writes.
    #[error("the graph keeps tensors in a file named {name}, and so is a file of the folder that is being written")]
    #[diagnostic(
        code(prefold::fold::name_taken),
        help("save the graph with its external data under another name, for instance `model.onnx.data`")
    )]
    NameTaken {
        /// The file's name.
        name: String,
    },
    /// A tensor of the adapter could not be converted.
    #[error("candle failed while converting the adapter: {0}")]
    #[diagnostic(code(prefold::fold::convert))]
    Convert(#[source] candle_core::Error),
}

/// The result of an operation of fold.
pub type Result<T> = std::result::Result<T, Error>;
