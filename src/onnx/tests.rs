//! What holds for whole files: nothing is lost, and nothing that a file holds makes the reader panic.

mod lossless;

use std::path::{Path, PathBuf};
use std::process::Command;

use proptest::prelude::*;

use super::def::encode_entry;
use super::proto::{attribute, graph, model, node, tensor, types, value};
use super::wire::Encoder;
use super::{
    DataType, Error, Graph, Index, Model, ModelBuilder, Node, NodeDef, Patch, TensorDef, ValueDef, check,
    check_any_order, check_types, data_files, external_files,
};

/// A field number that no ONNX message has.
const UNKNOWN: u32 = 1000;

/// Five standard nodes: `y[batch, 2] = left + reshape(right)` of the halves of `x · w`.
pub(super) fn small_model() -> Model {
    let weight = [1.0, 0.0, 0.0, 0.5, 0.0, 1.0, 0.5, 0.0];
    let mut builder = ModelBuilder::new("small", 8);
    builder
        .producer("prefold", "test")
        .opset("", 17)
        .metadata("task", "demo")
        .initializer(TensorDef::from_f32s("w", &[2, 4], &weight))
        .initializer(TensorDef::from_f32s("a_much_longer_name_is_not_needed_but_right", &[2], &[0.0, 1.0]))
        .input(ValueDef::new("x", DataType::Float, ["batch".into(), 2.into()]))
        .output(ValueDef::new("y", DataType::Float, ["batch".into(), 2.into()]))
        .value_info(ValueDef::new("h", DataType::Float, ["batch".into(), 4.into()]))
        .node(NodeDef::new("MatMul", "project").inputs(["x", "w"]).outputs(["h"]))
        .node(NodeDef::new("Split", "split").inputs(["h"]).outputs(["left", "right"]).attr_int("axis", -1))
        .node(
            NodeDef::new("Constant", "shape")
                .outputs(["target"])
                .attr_tensor("value", TensorDef::from_i64s("", &[2], &[0, -1])),
        )
        .node(NodeDef::new("Reshape", "pick").inputs(["right", "target"]).outputs(["right_2d"]))
        .node(NodeDef::new("Add", "join").inputs(["left", "right_2d"]).outputs(["y"]));
    builder.build().unwrap()
}

/// A model file of these nodes, not checked.
pub(super) fn raw_model(nodes: &[Encoder], inputs: &[&str], outputs: &[&str]) -> Vec<u8> {
    let mut graph = Encoder::default();
    nodes.iter().for_each(|node| graph.message(graph::NODE, node));
    graph.string(graph::NAME, "g");
    let value = |name: &&str| ValueDef::new(*name, DataType::Float, []).encode();
    inputs.iter().for_each(|name| graph.message(graph::INPUT, &value(name)));
    outputs.iter().for_each(|name| graph.message(graph::OUTPUT, &value(name)));
    let mut model = Encoder::default();
    model.int(model::IR_VERSION, 8);
    model.message(model::GRAPH, &graph);
    model.message(model::OPSET_IMPORT, &super::def::encode_opset("", 17));
    model.into_bytes()
}

/// A branch that copies a tensor from around it.
pub(super) fn identity_branch(from: &str, to: &str) -> Encoder {
    let mut branch = Encoder::default();
    branch.message(graph::NODE, &NodeDef::new("Identity", "").inputs([from]).outputs([to]).encode().unwrap());
    branch.string(graph::NAME, "branch");
    branch.message(graph::OUTPUT, &ValueDef::new(to, DataType::Float, []).encode());
    branch
}

/// An `If` with one branch.
pub(super) fn if_node(branch: &Encoder, condition: &str, output: &str) -> Encoder {
    let mut attribute = Encoder::default();
    attribute.string(attribute::NAME, "then_branch");
    attribute.message(attribute::G, branch);
    attribute.int(attribute::TYPE, attribute::TYPE_GRAPH);
    let mut node = NodeDef::new("If", "branching").inputs([condition]).outputs([output]).encode().unwrap();
    node.message(node::ATTRIBUTE, &attribute);
    node
}

/// Lets the reference implementation judge a file, where there is a Python that has it: full check with shape inference,
/// and serializing it again gives the same bytes.
pub(super) fn reference_check(path: &Path) {
    let has_onnx = Command::new("python3").args(["-c", "import onnx"]).output();
    if !has_onnx.is_ok_and(|output| output.status.success()) {
        println!("skipped: no python3 with the `onnx` package, so {} is not judged by it", path.display());
        return;
    }
    let script = "import onnx, sys\n\
                  onnx.checker.check_model(sys.argv[1], full_check=True)\n\
                  model = onnx.load(sys.argv[1], load_external_data=False)\n\
                  assert model.SerializeToString() == open(sys.argv[1], 'rb').read(), 'other bytes'";
    let output = Command::new("python3").args(["-c", script]).arg(path).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A model with fields of all wire types that no specification knows, at every level, and a length that takes more bytes
/// than it needs.
fn model_with_unknown_fields() -> Vec<u8> {
    let unknown = |encoder: &mut Encoder| {
        encoder.int(UNKNOWN, -7);
        encoder.float(UNKNOWN + 1, 0.25);
        encoder.string(UNKNOWN + 2, "kept");
    };
    let with = |mut encoder: Encoder| {
        unknown(&mut encoder);
        encoder
    };
    let mut tensor = TensorDef::from_f32s("w", &[2], &[1.0, 2.0]).encode().unwrap();
    unknown(&mut tensor);
    tensor.string(tensor::NAME, "w");
    let mut value_type = Encoder::default();
    value_type.message(types::TENSOR_TYPE, &with(Encoder::default()));
    let mut input = Encoder::default();
    unknown(&mut input);
    input.string(value::NAME, "x");
    input.message(value::TYPE, &with(value_type));
    let mut attribute = Encoder::default();
    unknown(&mut attribute);
    attribute.string(attribute::NAME, "alpha");
    attribute.float(attribute::F, 1.5);
    let mut add = with(NodeDef::new("Add", "add").inputs(["x", "w"]).outputs(["y"]).encode().unwrap());
    add.message(node::ATTRIBUTE, &attribute);
    add.string(6, "a doc string");
    add.message(9, &with(encode_entry("namespace", "layer.0")));
    let branch = if_node(&with(identity_branch("y", "inner")), "x", "z");

    let mut graph = Encoder::default();
    graph.string(graph::NAME, "g");
    graph.message(graph::INPUT, &input);
    unknown(&mut graph);
    graph.message(graph::NODE, &add);
    graph.message(graph::INITIALIZER, &tensor);
    graph.message(graph::NODE, &with(branch));
    graph.message(graph::OUTPUT, &with(ValueDef::new("z", DataType::Float, []).encode()));
    let graph = graph.into_bytes();

    let mut head = Encoder::default();
    unknown(&mut head);
    head.int(model::IR_VERSION, 10);
    head.message(model::FUNCTIONS, &with(Encoder::default()));
    let mut bytes = head.into_bytes();
    // Tag of the graph, then its length in five bytes.
    bytes.push((model::GRAPH << 3 | 2) as u8);
    bytes.extend((0..4).map(|byte| (graph.len() >> (7 * byte)) as u8 & 0x7f | 0x80));
    bytes.push(0);
    bytes.extend(graph);
    let mut tail = Encoder::default();
    tail.message(model::OPSET_IMPORT, &with(super::def::encode_opset("ai.onnx", 17)));
    tail.message(model::METADATA_PROPS, &with(encode_entry("key", "value")));
    unknown(&mut tail);
    bytes.extend(tail.into_bytes());
    // A group, field 1001, around an integer.
    bytes.extend([0xcb, 0x3e, 0x08, 0x01, 0xcc, 0x3e]);
    bytes
}

#[test]
fn unknown_fields_survive_loading_saving_and_editing() {
    let bytes = model_with_unknown_fields();
    let model = Model::from_bytes(bytes.clone()).unwrap();
    check(&model).unwrap();
    assert_eq!(model.to_bytes(), bytes);

    let swap = |model: &Model, tensor: &str, value: &str| {
        let mut patch = Patch::new("swap");
        patch.replace_input(model.graph().nodes()[0].id(), 1, tensor).set_metadata("key", value);
        patch.apply(model).unwrap()
    };
    let edited = swap(&model, "x", "other");
    let marks = |bytes: &[u8]| bytes.windows(4).filter(|window| window == b"kept").count();
    assert_eq!(marks(&edited.to_bytes()), marks(&bytes));
    assert_eq!(edited.graph().nodes()[0].attribute("alpha").unwrap().as_float(), Some(1.5));
    let back = swap(&edited, "w", "value").to_bytes();
    let reparsed = Model::from_bytes(back.clone()).unwrap();
    assert_eq!(reparsed.graph().to_string(), model.graph().to_string());
    // All but the graph's length in five bytes, and the place of the metadata value, which moved to the entry's end.
    assert_eq!((marks(&back), back.len()), (marks(&bytes), bytes.len() - 3));
}

/// The models in `../shared/graphs`, from many exporters.
fn corpus() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/graphs");
    let folders = |path: &Path| -> Vec<PathBuf> {
        std::fs::read_dir(path).map_or(Vec::new(), |entries| entries.map(|entry| entry.unwrap().path()).collect())
    };
    let files = folders(&root).into_iter().flat_map(|exporter| folders(&exporter)).flat_map(|model| folders(&model));
    let mut models: Vec<_> =
        files.filter(|path| path.extension().is_some_and(|extension| extension == "onnx")).collect();
    models.sort();
    if models.is_empty() {
        println!("skipped: {} is absent", root.display());
    }
    models
}

#[test]
fn real_models_are_read_checked_and_written_byte_for_byte() {
    for path in corpus() {
        let model = Model::open(&path).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert!(model.to_bytes() == bytes, "{}", path.display());
        check_any_order(&model).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        // The 16-bit converter puts its casts at the end; `onnx.checker` refuses that one too.
        let sorted = !path.components().any(|part| part.as_os_str() == "optimum_fp16");
        assert_eq!(check(&model).is_ok(), sorted, "{}", path.display());
        let folder = path.parent().unwrap();
        let data = data_files(&model, folder).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert_eq!(data.len(), external_files(&model).unwrap().len(), "{}", path.display());
        check_types(&model).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        for tensor in model.graph().initializers() {
            tensor.data_in(folder).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        }
        edit_and_undo(&model, &path);
    }
}

/// Lets a node read a copy of its input, then the input again: but for the copying node, these are the old fields.
fn edit_and_undo(model: &Model, path: &Path) {
    let index = Index::new(model.graph());
    let reader = model.graph().nodes().iter().rev().find(|node| node.input(0).is_some()).unwrap();
    let tensor = reader.input(0).unwrap();
    assert!(index.consumers(tensor).iter().any(|used| used.node == reader.id() && used.slot == 0));
    let mut patch = Patch::new("copy");
    patch.insert_before(
        reader.id(),
        NodeDef::new("Identity", "prefold/copy").inputs([tensor]).outputs(["prefold/copied"]),
    );
    patch.replace_input(reader.id(), 0, "prefold/copied");
    let edited = patch.apply(model).unwrap();
    assert_eq!(edited.graph().nodes().len(), model.graph().nodes().len() + 1);
    let changed = edited.graph().fields().iter().filter(|field| !model.graph().fields().contains(field)).count();
    assert_eq!(changed, 2, "{}", path.display());

    let reader_again = edited.graph().nodes()[reader.id().index() + 1].id();
    let mut patch = Patch::new("undo");
    patch.replace_input(reader_again, 0, tensor);
    let undone = patch.apply(&edited).unwrap();
    let fields = undone.graph().fields().iter().filter(|field| !field.raw.ends_with(b"Identity"));
    assert!(fields.eq(model.graph().fields()), "{}", path.display());
}

/// Everything that reads a model, on a model that may be anything.
fn exercise(bytes: Vec<u8>) -> Result<(), Error> {
    let model = Model::from_bytes(bytes.clone())?;
    assert!(model.to_bytes() == bytes);
    let _listing = model.graph().to_string();
    let _files = (external_files(&model), data_files(&model, Path::new("/nonexistent")), check_types(&model));
    let index = Index::new(model.graph());
    for tensor in model.graph().initializers() {
        let _values = (tensor.to_f32s(), tensor.to_i64s(), tensor.data_in(Path::new("/nonexistent")));
    }
    if let Some(node) = model.graph().nodes().last() {
        let _found = node.inputs().iter().map(|name| index.producer(name).map(Node::id)).collect::<Vec<_>>();
        let mut patch = Patch::new("any");
        patch.replace_input(node.id(), 0, "x").set_metadata("key", "value").require_opset("", 1);
        let _patched = patch.apply(&model);
    }
    check(&model)
}

#[test]
fn a_file_cut_anywhere_is_an_error_or_a_model() {
    let bytes = model_with_unknown_fields();
    exercise(bytes.clone()).unwrap();
    let whole: Vec<_> = (0..bytes.len()).filter(|&end| exercise(bytes[..end].to_vec()).is_ok()).collect();
    assert!(whole.len() < 10, "cuts that still pass the check: {whole:?}");
}

proptest! {
    #[test]
    fn flipped_bytes_never_make_it_panic(flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        for mut bytes in [model_with_unknown_fields(), small_model().to_bytes()] {
            for (at, value) in &flips {
                let at = at.index(bytes.len());
                bytes[at] = *value;
            }
            let _result = exercise(bytes);
        }
    }
}

#[test]
fn deep_nesting_is_an_error_and_no_overflow() {
    let nested = |depth: usize| {
        let mut branch = identity_branch("x", "t");
        for level in 0..depth {
            let name = format!("t{level}");
            let mut outer = Encoder::default();
            outer.message(graph::NODE, &if_node(&branch, "x", &name));
            outer.message(graph::OUTPUT, &ValueDef::new(&name, DataType::Float, []).encode());
            branch = outer;
        }
        Model::from_bytes(raw_model(&[if_node(&branch, "x", "y")], &["x"], &["y"]))
    };
    let model = nested(20).unwrap();
    check(&model).unwrap();
    let mut graphs = 0;
    model.graph().visit(&mut |_: &Graph| graphs += 1);
    assert_eq!(graphs, 22);
    assert!(matches!(nested(40), Err(Error::TooDeep { .. })));
    assert!(matches!(nested(1000), Err(Error::TooDeep { .. })));
}

#[test]
fn what_is_no_model_is_said_to_be_none() {
    let error = |bytes: &[u8]| Model::from_bytes(bytes.to_vec()).unwrap_err();
    assert!(matches!(error(b""), Error::NoGraph));
    assert!(matches!(error(b"version https://git-lfs.github.com/spec/v1\n"), Error::NotProtobuf { .. }));
    assert!(matches!(error(b"<!DOCTYPE html>"), Error::NotProtobuf { .. } | Error::Truncated { .. }));
    assert!(matches!(error(b"\x3a\x00\x3a\x00"), Error::TwoGraphs { offset: 2 }));
    let folder = tempfile::tempdir().unwrap();
    let missing = Model::open(folder.path()).unwrap_err().to_string();
    assert!(missing.contains("model.onnx"), "{missing}");
    let path = folder.path().join("model.onnx");
    std::fs::write(&path, b"\x08\x0a\x3a\x05\x0a").unwrap();
    let cut = Model::open(&path).unwrap_err();
    assert!(cut.to_string().contains("model.onnx: truncated: ModelProto at byte 4"), "{cut}");
    assert_eq!(miette::Diagnostic::code(&cut).unwrap().to_string(), "prefold::onnx::truncated");
}

/// A file of 2 GiB of zeros is sparse: neither disk nor memory is needed for it.
#[test]
fn a_file_past_the_limit_of_protobuf_is_said_to_be_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large.onnx");
    let mut head = Encoder::default();
    head.header(model::GRAPH, (1 << 31) + 20);
    head.header(graph::INITIALIZER, (1 << 31) + 14);
    head.header(tensor::RAW_DATA, (1 << 31) + 8);
    std::fs::write(&path, head.into_bytes()).unwrap();
    let head_len = 18;
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(head_len + (1 << 31) + 8).unwrap();
    let error = Model::open(&path).unwrap_err();
    assert_eq!(miette::Diagnostic::code(&error).unwrap().to_string(), "prefold::onnx::file_too_large");
    assert!(error.to_string().contains("large.onnx: the file has 2147483674 bytes"), "{error}");
}

/// A file that is mapped can be saved onto itself.
#[test]
fn an_open_model_is_saved_in_place() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    small_model().save(&path).unwrap();
    let model = Model::open(&path).unwrap();
    model.save(&path).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), model.to_bytes());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn ten_thousand_nodes_are_no_matter() {
    let mut builder = ModelBuilder::new("long", 8);
    builder.opset("", 17).input(ValueDef::new("t0", DataType::Float, []));
    for step in 0..10_000 {
        let (from, to) = (format!("t{step}"), format!("t{}", step + 1));
        builder.node(NodeDef::new("Neg", format!("n{step}")).inputs([from]).outputs([to]));
    }
    let start = std::time::Instant::now();
    let model = builder.output(ValueDef::new("t10000", DataType::Float, [])).build().unwrap();
    let index = Index::new(model.graph());
    assert_eq!(index.producer("t9000").unwrap().name(), "n8999");
    assert_eq!(index.consumers("t9000").len(), 1);
    // Takes 0.02 s in a debug build; the bound only tells linear from quadratic.
    assert!(start.elapsed().as_secs() < 10);
}
