//! What can go wrong with an ONNX file.

use std::path::PathBuf;

/// An error of this room. Byte offsets count from the start of the file.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum Error {
    /// A file could not be read or written.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Files(#[from] crate::files::Error),
    /// Something is wrong with the model in a file.
    #[error("{}: {source}", path.display())]
    #[diagnostic(forward(source))]
    InFile {
        /// The model file.
        path: PathBuf,
        /// What is wrong.
        source: Box<Self>,
    },
    /// A patch could not be applied.
    #[error("the edit `{label}` does not fit this graph: {source}")]
    #[diagnostic(forward(source))]
    Patch {
        /// The patch's label.
        label: String,
        /// What does not fit.
        source: Box<Self>,
    },

    /// The bytes are not a protobuf message.
    #[error("not an ONNX model: at byte {offset}, in {message}, {reason}")]
    #[diagnostic(code(prefold::onnx::not_protobuf), help("{NOT_ONNX_HELP}"))]
    NotProtobuf {
        /// The message being read.
        message: &'static str,
        /// Where.
        offset: usize,
        /// What was found.
        reason: &'static str,
    },
    /// A message ends before its content does.
    #[error("truncated: {message} at byte {offset} lacks at least {missing} bytes")]
    #[diagnostic(code(prefold::onnx::truncated), help("the file is cut off or damaged; fetch or export it again"))]
    Truncated {
        /// The message being read.
        message: &'static str,
        /// Where.
        offset: usize,
        /// How many bytes are not there.
        missing: u64,
    },
    /// A known field has another wire type than the specification says.
    #[error("field {field} of {message} at byte {offset} should be {expected}")]
    #[diagnostic(code(prefold::onnx::wire_type), help("{NOT_ONNX_HELP}"))]
    WireType {
        /// The message being read.
        message: &'static str,
        /// The field's number.
        field: u32,
        /// Where.
        offset: usize,
        /// What the specification says.
        expected: &'static str,
    },
    /// A string is not UTF-8.
    #[error("field {field} of {message} at byte {offset} is not UTF-8 text")]
    #[diagnostic(code(prefold::onnx::utf8), help("{NOT_ONNX_HELP}"))]
    NotUtf8 {
        /// The message being read.
        message: &'static str,
        /// The field's number.
        field: u32,
        /// Where.
        offset: usize,
    },
    /// Messages are nested deeper than any real model.
    #[error("nested more than {limit} levels deep at byte {offset}")]
    #[diagnostic(code(prefold::onnx::too_deep), help("no exporter writes this; the file is damaged or hostile"))]
    TooDeep {
        /// Where the limit was reached.
        offset: usize,
        /// The limit.
        limit: usize,
    },
    /// There is no graph in the model.
    #[error("the model holds no graph")]
    #[diagnostic(code(prefold::onnx::no_graph), help("{NOT_ONNX_HELP}"))]
    NoGraph,
    /// There are two graphs in the model.
    #[error("the model holds a second graph at byte {offset}")]
    #[diagnostic(code(prefold::onnx::two_graphs), help("save it again with one graph, for instance with `onnx.save`"))]
    TwoGraphs {
        /// Where the second begins.
        offset: usize,
    },
    /// The model is larger than protobuf allows.
    #[error("the model would take {bytes} bytes in one file without its initializers, and protobuf ends at 2 GiB")]
    #[diagnostic(
        code(prefold::onnx::too_large),
        help("turn constant nodes that hold weights into initializers, which can be external")
    )]
    TooLarge {
        /// The size it would have.
        bytes: u64,
    },

    /// A file is larger than protobuf allows.
    #[error("the file has {bytes} bytes, and a protobuf message ends at 2 GiB: no runtime reads it")]
    #[diagnostic(
        code(prefold::onnx::file_too_large),
        help(
            "export it again with its weights as external data, for instance `onnx.save(…, save_as_external_data=True)`"
        )
    )]
    FileTooLarge {
        /// Its size.
        bytes: u64,
    },

    /// A name is defined twice.
    #[error("tensor `{tensor}` is defined twice: as {first} and as {second}")]
    #[diagnostic(code(prefold::onnx::duplicate), help("every tensor name in a graph has one definition; rename one"))]
    Duplicate {
        /// The name.
        tensor: String,
        /// Its first definition.
        first: String,
        /// Its second definition.
        second: String,
    },
    /// Two nodes have one name.
    #[error("a node named `{node}` is in the graph already")]
    #[diagnostic(code(prefold::onnx::duplicate_node), help("give the new node another name"))]
    DuplicateNode {
        /// The name.
        node: String,
    },
    /// A node reads a tensor that a later node makes.
    #[error("{node} reads `{tensor}` before {producer} makes it")]
    #[diagnostic(
        code(prefold::onnx::order),
        help("the nodes of a graph stand in topological order; move the reader down")
    )]
    UseBeforeDefinition {
        /// The reader.
        node: String,
        /// The tensor.
        tensor: String,
        /// The node that makes it.
        producer: String,
    },
    /// A node reads a tensor that nothing makes.
    #[error("{node} reads `{tensor}`, which is no input, no initializer and no node's output")]
    #[diagnostic(code(prefold::onnx::undefined), help("check the name; a nested graph also sees the names around it"))]
    Undefined {
        /// The reader.
        node: String,
        /// The tensor.
        tensor: String,
    },
    /// Nodes depend on each other in a circle.
    #[error("the graph has a cycle: {}", circle(nodes))]
    #[diagnostic(code(prefold::onnx::cycle), help("a graph is acyclic; one of these nodes must read another tensor"))]
    Cycle {
        /// The nodes of the circle, each read by the next; the first is also the last.
        nodes: Vec<String>,
    },
    /// A graph output that nothing makes.
    #[error("graph `{graph}` gives out `{tensor}`, which nothing makes")]
    #[diagnostic(code(prefold::onnx::output), help("name a node's output, an input or an initializer"))]
    OutputUndefined {
        /// The graph's name.
        graph: String,
        /// The output's name.
        tensor: String,
    },
    /// An initializer that format versions before 4 also want as an input.
    #[error("initializer `{tensor}` is no graph input, as IR version {ir_version} wants")]
    #[diagnostic(code(prefold::onnx::old_ir), help("convert the model to IR version 4 or later"))]
    InitializerNotInput {
        /// The initializer.
        tensor: String,
        /// The model's version.
        ir_version: i64,
    },
    /// A node's operator set is not imported.
    #[error("{node} is of the operator set `{domain}`, which the model does not import")]
    #[diagnostic(code(prefold::onnx::no_opset), help("import the operator set (a patch does it with `require_opset`)"))]
    NoOpset {
        /// The node.
        node: String,
        /// The domain; the empty name is `ai.onnx`.
        domain: String,
    },
    /// Two tensors that a node wants of one type are of two.
    #[error("{node} is given {first} of type {first_type} and `{second}` of type {second_type}")]
    #[diagnostic(code(prefold::onnx::types), help("cast one of them"))]
    TypeConflict {
        /// The node, or the input or output that is declared otherwise.
        node: String,
        /// The first tensor.
        first: String,
        /// Its type.
        first_type: super::DataType,
        /// The second tensor.
        second: String,
        /// Its type.
        second_type: super::DataType,
    },
    /// Shapes do not go together.
    #[error("{node}: {reason}")]
    #[diagnostic(code(prefold::onnx::shapes), help("the tensors are of another model, or in another layout"))]
    ShapeConflict {
        /// The node, or the input or output that is declared otherwise.
        node: String,
        /// What does not fit.
        reason: String,
    },
    /// The model imports an operator set older than needed.
    #[error("the model imports version {found} of the operator set `{domain}`, and version {needed} is needed")]
    #[diagnostic(code(prefold::onnx::old_opset), help("export the model again at operator set {needed} or later"))]
    OldOpset {
        /// The domain.
        domain: String,
        /// The version that the model imports.
        found: i64,
        /// The lowest version that serves.
        needed: i64,
    },
    /// An edit replaces a constant that is not there.
    #[error("the graph has no initializer `{tensor}` to replace")]
    #[diagnostic(
        code(prefold::onnx::no_initializer),
        help("the edit was made for another graph; look the name up again")
    )]
    NoInitializer {
        /// The name.
        tensor: String,
    },
    /// An edit names a node that is not there.
    #[error("node number {index} does not exist; the graph has {nodes} nodes")]
    #[diagnostic(code(prefold::onnx::no_node), help("the edit was made for another graph; look the node up again"))]
    NoNode {
        /// The node's number.
        index: usize,
        /// How many there are.
        nodes: usize,
    },
    /// A tensor is in a graph that runs any number of times.
    #[error("`{tensor}` cannot be given out of the model: it is in a graph nested in {node}")]
    #[diagnostic(code(prefold::onnx::not_given_out), help("only the branches of an If are run once at most"))]
    NotGivenOut {
        /// The tensor.
        tensor: String,
        /// The node around it.
        node: String,
    },
    /// An edit names an input slot that is not there.
    #[error("{node} has no input {slot}; it has {inputs}")]
    #[diagnostic(code(prefold::onnx::no_slot), help("replace an input that exists"))]
    NoSlot {
        /// The node.
        node: String,
        /// The slot asked for.
        slot: usize,
        /// How many inputs it has.
        inputs: usize,
    },
    /// An edit replaces one input twice.
    #[error("input {slot} of node number {index} is replaced twice, by `{first}` and by `{second}`")]
    #[diagnostic(code(prefold::onnx::replaced_twice), help("apply one patch after the other, or drop one replacement"))]
    ReplacedTwice {
        /// The node's number.
        index: usize,
        /// The slot.
        slot: usize,
        /// The first replacement.
        first: String,
        /// The second replacement.
        second: String,
    },

    /// A tensor's values are not of the kind asked for.
    #[error("tensor `{tensor}` is of type {found}, and {wanted} were asked for")]
    #[diagnostic(code(prefold::onnx::values), help("read it by its own type"))]
    ValueType {
        /// The tensor.
        tensor: String,
        /// Its type.
        found: super::DataType,
        /// What was asked for.
        wanted: &'static str,
    },
    /// A tensor's data has not the size that its type and dimensions say.
    #[error("tensor `{tensor}`, {data_type}{dims:?}, holds {found} bytes{}", expected.map_or_else(String::new, |n| format!(", not {n}")))]
    #[diagnostic(code(prefold::onnx::size), help("the model is damaged, or its data file belongs to another model"))]
    TensorSize {
        /// The tensor.
        tensor: String,
        /// Its type.
        data_type: super::DataType,
        /// Its dimensions.
        dims: Vec<i64>,
        /// Bytes that are there.
        found: u64,
        /// Bytes that should be there; none when the dimensions give no size.
        expected: Option<u64>,
    },
    /// A tensor's values lie in another file.
    #[error("the values of tensor `{tensor}` lie in the file `{location}`")]
    #[diagnostic(code(prefold::onnx::external), help("read it with the model's folder"))]
    IsExternal {
        /// The tensor.
        tensor: String,
        /// The data file.
        location: String,
    },
    /// An external data file is named in a way that is not followed.
    #[error("tensor `{tensor}` keeps its data in `{location}`, which {reason}")]
    #[diagnostic(
        code(prefold::onnx::location),
        help(
            "data files lie in the model's own folder; copy them there (`cp -rL` resolves links) and save the model again"
        )
    )]
    Location {
        /// The tensor.
        tensor: String,
        /// The location as it stands in the model.
        location: String,
        /// Why it is refused.
        reason: &'static str,
    },
    /// A number of an external data entry cannot be read.
    #[error("tensor `{tensor}` has external data with {key} `{value}`, which is no byte count")]
    #[diagnostic(code(prefold::onnx::external_entry), help("the model is damaged; export it again"))]
    ExternalEntry {
        /// The tensor.
        tensor: String,
        /// The entry.
        key: &'static str,
        /// Its text.
        value: String,
    },
    /// An external data file is not there.
    #[error("tensor `{tensor}` keeps its data in {}, which does not exist", path.display())]
    #[diagnostic(code(prefold::onnx::no_data_file), help("copy the data file beside the model; both belong together"))]
    NoDataFile {
        /// The tensor.
        tensor: String,
        /// The file looked for.
        path: PathBuf,
    },
    /// An external data file ends too early.
    #[error("tensor `{tensor}` needs bytes {offset}+{length} of {}, which has {size}", path.display())]
    #[diagnostic(code(prefold::onnx::short_data_file), help("the data file is cut off or belongs to another model"))]
    ShortDataFile {
        /// The tensor.
        tensor: String,
        /// The data file.
        path: PathBuf,
        /// First byte wanted.
        offset: u64,
        /// Bytes wanted.
        length: u64,
        /// The file's size.
        size: u64,
    },
    /// A tensor that is being written gave another number of bytes than its type and dimensions say.
    #[error("tensor `{tensor}` wrote {written} bytes, not {expected}")]
    #[diagnostic(code(prefold::onnx::written), help("the weight's shape or type differs from what was declared"))]
    Written {
        /// The tensor.
        tensor: String,
        /// Bytes written.
        written: u64,
        /// Bytes declared.
        expected: u64,
    },
}

const NOT_ONNX_HELP: &str = "the file is damaged or not an ONNX model (a Git LFS pointer or a web page saved in its \
                             place looks like this); fetch or export it again";

/// The nodes of a circle; the middle of a long one is left out.
fn circle(nodes: &[String]) -> String {
    const ENDS: usize = 8;
    let middle = nodes.len().saturating_sub(2 * ENDS);
    match (nodes.get(..ENDS), nodes.get(nodes.len().saturating_sub(ENDS)..)) {
        (Some(first), Some(last)) if middle > 0 => {
            format!("{} → ({middle} more) → {}", first.join(" → "), last.join(" → "))
        }
        _ => nodes.join(" → "),
    }
}

/// The result of an operation of this room.
pub type Result<T> = std::result::Result<T, Error>;
