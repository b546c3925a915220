//! Any model, with all that the format knows and fields that it does not: loading and saving changes nothing, and an edit
//! changes only what it names.

use proptest::collection::vec;
use proptest::prelude::*;

use super::super::def::{encode_entry, encode_opset};
use super::super::proto::{attribute, function, graph, model, node, sparse, tensor, training, types, value};
use super::super::wire::{Encoder, Field, Fields};
use super::super::{Bytes, DataType, Model, NodeDef, Patch, TensorDef, ValueDef, check};

/// Fields of the specification that prefold has no use for.
const DOC_STRING: [u32; 4] = [6, 10, 6, 12];
const NODE_METADATA: u32 = 9;
const QUANTIZATION: u32 = 14;
const GRAPH_METADATA: u32 = 16;
const FUNCTION_DOC: u32 = 8;

/// Bytes of a field that no specification has, in any wire type; the number is above all known ones.
fn unknown_field() -> impl Strategy<Value = Vec<u8>> {
    let number = 200u32..1 << 20;
    prop_oneof![
        (number.clone(), any::<i64>()).prop_map(|(number, value)| bytes(|e| e.int(number, value))),
        (number.clone(), any::<f32>()).prop_map(|(number, value)| bytes(|e| e.float(number, value))),
        (number, vec(any::<u8>(), 0..200)).prop_map(|(number, value)| bytes(|e| e.bytes(number, &value))),
    ]
}

fn bytes(fill: impl FnOnce(&mut Encoder)) -> Vec<u8> {
    let mut encoder = Encoder::default();
    fill(&mut encoder);
    encoder.into_bytes()
}

/// A message of these fields, in this order, with unknown fields before, between and after them.
fn message(fields: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let places = fields.len() + 1;
    vec(proptest::option::weighted(0.2, unknown_field()), places).prop_map(move |unknown| {
        let mut all = Vec::new();
        for (place, unknown) in unknown.iter().enumerate() {
            all.extend(unknown.iter().flatten());
            all.extend(fields.get(place).into_iter().flatten());
        }
        all
    })
}

fn nested(number: u32, content: &[u8]) -> Vec<u8> {
    bytes(|e| e.bytes(number, content))
}

/// Where external data may lie.
const LOCATIONS: [&str; 3] = ["model.onnx.data", "one file/of this tensor", "./w"];

/// Any way to keep two floats, with a doc string.
fn any_tensor(name: String) -> impl Strategy<Value = Vec<u8>> {
    let typed =
        any::<[f32; 2]>().prop_map(|values| bytes(|e| values.iter().for_each(|v| e.float(tensor::FLOAT_DATA, *v))));
    let raw = any::<[u8; 8]>().prop_map(|values| bytes(|e| e.bytes(tensor::RAW_DATA, &values)));
    let external =
        (any::<prop::sample::Index>(), any::<u32>(), any::<bool>()).prop_map(|(location, offset, has_length)| {
            let length = has_length.then(|| encode_entry("length", "8"));
            let entries = [
                encode_entry("location", LOCATIONS[location.index(LOCATIONS.len())]),
                encode_entry("offset", &offset.to_string()),
            ];
            let checksum = encode_entry("checksum", "of the file");
            bytes(|e| {
                entries
                    .iter()
                    .chain(&length)
                    .chain([&checksum])
                    .for_each(|entry| e.message(tensor::EXTERNAL_DATA, entry));
                e.int(tensor::DATA_LOCATION, tensor::LOCATION_EXTERNAL);
            })
        });
    (prop_oneof![typed, raw, external], ".{0,8}").prop_flat_map(move |(values, doc)| {
        message(vec![
            bytes(|e| e.int(tensor::DIMS, 2)),
            bytes(|e| e.int(tensor::DATA_TYPE, DataType::Float.code().into())),
            bytes(|e| e.string(tensor::NAME, &name)),
            values,
            bytes(|e| e.string(DOC_STRING[3], &doc)),
        ])
    })
}

fn any_attribute(name: String) -> impl Strategy<Value = Vec<u8>> {
    let value = prop_oneof![
        any::<f32>().prop_map(|v| bytes(|e| e.float(attribute::F, v))),
        any::<i64>().prop_map(|v| bytes(|e| e.int(attribute::I, v))),
        vec(any::<u8>(), 0..20).prop_map(|v| bytes(|e| e.bytes(attribute::S, &v))),
        vec(any::<i64>(), 1..4).prop_map(|v| bytes(|e| v.iter().for_each(|v| e.int(attribute::INTS, *v)))),
        any_tensor(String::new()).prop_map(|v| nested(attribute::T, &v)),
    ];
    value.prop_flat_map(move |value| message(vec![bytes(|e| e.string(attribute::NAME, &name)), value]))
}

/// `to = op(from, w)`, with attributes, a doc string and metadata.
fn any_node(op: &'static str, name: String, from: String, to: String) -> impl Strategy<Value = Vec<u8>> {
    let attributes = vec(any::<prop::sample::Index>(), 0..3)
        .prop_flat_map(|picks| (0..picks.len()).map(|i| any_attribute(format!("a{i}"))).collect::<Vec<_>>());
    (attributes, ".{0,12}").prop_flat_map(move |(attributes, doc)| {
        let mut fields = vec![
            bytes(|e| e.string(node::INPUT, &from)),
            bytes(|e| e.string(node::INPUT, "w")),
            bytes(|e| e.string(node::OUTPUT, &to)),
            bytes(|e| e.string(node::NAME, &name)),
            bytes(|e| e.string(node::OP_TYPE, op)),
        ];
        fields.extend(attributes.iter().map(|content| nested(node::ATTRIBUTE, content)));
        fields.push(bytes(|e| e.string(DOC_STRING[0], &doc)));
        fields.push(bytes(|e| e.message(NODE_METADATA, &encode_entry("namespace", "layer.0"))));
        message(fields)
    })
}

fn float_value(name: &str) -> Vec<u8> {
    ValueDef::new(name, DataType::Float, [2.into()]).encode().into_bytes()
}

/// An input of a type that prefold has no use for: a sequence, a map, an optional or a sparse tensor, one in the other.
fn other_input() -> impl Strategy<Value = Vec<u8>> {
    const SPARSE: u32 = 8;
    const DENOTATION: u32 = 6;
    let plain = prop_oneof![
        Just(nested(types::TENSOR_TYPE, &bytes(|e| e.int(types::ELEM_TYPE, 1)))),
        Just(nested(SPARSE, &bytes(|e| e.int(types::ELEM_TYPE, 1)))),
    ];
    let wrapped = plain.prop_recursive(3, 8, 1, |inner| {
        (inner, 0usize..3).prop_flat_map(|(inner, kind)| {
            // the field of the type, and that of its elements
            let (field, element) = [(4, 1), (9, 1), (5, 2)][kind];
            let key = if kind == 2 { bytes(|e| e.int(1, 7)) } else { Vec::new() };
            message(vec![key, nested(element, &inner)]).prop_map(move |content| nested(field, &content))
        })
    });
    wrapped.prop_flat_map(|of| {
        let denoted = message(vec![of, bytes(|e| e.string(DENOTATION, "IMAGE"))]);
        denoted.prop_flat_map(|of| message(vec![bytes(|e| e.string(value::NAME, "other")), nested(value::TYPE, &of)]))
    })
}

/// `y = … ((x + w) + w) …`, with a sparse initializer and annotations around it. In the first versions of the format constants
/// are `listed` among the inputs.
fn any_graph(listed: bool) -> impl Strategy<Value = Vec<u8>> {
    (1usize..5).prop_flat_map(move |count| {
        let tensor_at = |i: usize| {
            if i == 0 {
                "x".to_owned()
            } else if i == count {
                "y".into()
            } else {
                format!("t{i}")
            }
        };
        let nodes: Vec<_> =
            (0..count).map(|i| any_node("Add", format!("n{i}"), tensor_at(i), tensor_at(i + 1))).collect();
        let sparse = (any_tensor("s".into()), any::<bool>());
        (nodes, any_tensor("w".into()), sparse, other_input(), ".{0,12}").prop_flat_map(
            move |(nodes, w, (values, has_sparse), other, doc)| {
                let mut fields: Vec<_> = nodes.iter().map(|content| nested(graph::NODE, content)).collect();
                fields.push(bytes(|e| e.string(graph::NAME, "g")));
                fields.push(nested(graph::INITIALIZER, &w));
                fields.push(bytes(|e| e.string(DOC_STRING[1], &doc)));
                fields.push(nested(graph::INPUT, &float_value("x")));
                fields.push(nested(graph::INPUT, &other));
                if listed {
                    fields.push(nested(graph::INPUT, &float_value("w")));
                }
                fields.push(nested(graph::OUTPUT, &float_value("y")));
                fields.push(bytes(|e| e.message(QUANTIZATION, &encode_entry("w", "scale"))));
                if has_sparse {
                    let indices = TensorDef::from_i64s("", &[2], &[1, 5]).encode().unwrap().into_bytes();
                    let mut content = nested(sparse::VALUES, &values);
                    content.extend(nested(sparse::INDICES, &indices));
                    content.extend(bytes(|e| e.int(sparse::DIMS, 9)));
                    fields.push(nested(graph::SPARSE_INITIALIZER, &content));
                }
                fields.push(bytes(|e| e.message(GRAPH_METADATA, &encode_entry("made", "by a test"))));
                message(fields)
            },
        )
    })
}

fn any_function() -> impl Strategy<Value = Vec<u8>> {
    any_node("Mul", "inner".into(), "a".into(), "b".into()).prop_flat_map(|inner| {
        message(vec![
            bytes(|e| e.string(function::NAME, "Scale")),
            bytes(|e| e.string(function::INPUT, "a")),
            bytes(|e| e.string(function::INPUT, "w")),
            bytes(|e| e.string(function::OUTPUT, "b")),
            nested(function::NODE, &inner),
            bytes(|e| e.string(FUNCTION_DOC, "a function")),
            bytes(|e| e.message(function::OPSET_IMPORT, &encode_opset("", 17))),
            bytes(|e| e.string(function::DOMAIN, "local")),
        ])
    })
}

/// Any version of the format, newer than all that exist too.
fn any_model() -> impl Strategy<Value = Vec<u8>> {
    (3i64..99).prop_flat_map(model_of_version)
}

fn model_of_version(ir: i64) -> impl Strategy<Value = Vec<u8>> {
    let training = (any_graph(false), any_graph(false)).prop_map(|(first, second)| {
        let mut content = nested(training::INITIALIZATION, &first);
        content.extend(nested(training::ALGORITHM, &second));
        nested(model::TRAINING_INFO, &content)
    });
    let parts = (any_graph(ir == 3), vec(any_function(), 0..2), vec(training, 0..2), 7i64..99, any::<bool>());
    parts.prop_flat_map(move |(main, functions, training, opset, graph_first)| {
        let mut fields = vec![
            bytes(|e| e.int(model::IR_VERSION, ir)),
            bytes(|e| e.string(DOC_STRING[2], "a model")),
            bytes(|e| e.message(model::OPSET_IMPORT, &encode_opset("", opset))),
            bytes(|e| e.message(model::METADATA_PROPS, &encode_entry("key", "value"))),
        ];
        fields.extend(functions.iter().map(|content| nested(model::FUNCTIONS, content)));
        fields.extend(training);
        let place = if graph_first { 0 } else { fields.len() };
        fields.insert(place, nested(model::GRAPH, &main));
        message(fields)
    })
}

/// The bytes of a message's fields in order.
fn fields(name: &'static str, content: &[u8]) -> Vec<Vec<u8>> {
    let content = Bytes::from(content.to_vec());
    Fields::new(name, &content).map(|field| field.unwrap().raw.to_vec()).collect()
}

/// Whether `part` is in `whole` in its order, with other things between.
fn is_within(part: &[Vec<u8>], whole: &[Vec<u8>]) -> bool {
    let mut whole = whole.iter();
    part.iter().all(|wanted| whole.any(|found| found == wanted))
}

fn without(all: &[Vec<u8>], left_out: impl Fn(&Field) -> bool) -> Vec<Vec<u8>> {
    let keep = |raw: &&Vec<u8>| {
        let content = Bytes::from((*raw).clone());
        let field = Fields::new("Test", &content).next().unwrap().unwrap();
        !left_out(&field)
    };
    all.iter().filter(keep).cloned().collect()
}

fn graph_of(model: &Model) -> Vec<Vec<u8>> {
    model.graph().fields().iter().map(|field| field.raw.to_vec()).collect()
}

proptest! {
    #[test]
    fn loading_and_saving_changes_nothing(bytes in any_model()) {
        let model = Model::from_bytes(bytes.clone()).unwrap();
        check(&model).unwrap();
        prop_assert_eq!(model.to_bytes(), bytes);
    }

    #[test]
    fn an_edit_changes_what_it_names_and_nothing_else(bytes in any_model()) {
        let model = Model::from_bytes(bytes.clone()).unwrap();
        let last = model.graph().nodes().last().unwrap().id();
        let read = model.graph().node(last).unwrap().input(0).unwrap().to_owned();
        let mut patch = Patch::new("edit");
        patch
            .insert_before(last, NodeDef::new("Neg", "new").inputs([read]).outputs(["negated"]))
            .replace_input(last, 0, "negated")
            .add_initializer(TensorDef::from_f32s("extra", &[1], &[1.0]))
            .set_metadata("adapter", "one");
        let edited = patch.apply(&model).unwrap();
        let saved = edited.to_bytes();
        prop_assert_eq!(Model::from_bytes(saved.clone()).unwrap().graph().to_string(), edited.graph().to_string());

        // around the graph: everything in its place, and one metadata entry more
        let (before, after) = (fields("ModelProto", &bytes), fields("ModelProto", &saved));
        let rest = |all: &[Vec<u8>]| without(all, |field| field.number == model::GRAPH);
        prop_assert!(is_within(&rest(&before), &rest(&after)));
        prop_assert_eq!(after.len(), before.len() + 1);

        // in the graph: everything but the rewired node, which has all its other fields
        let (before, after) = (graph_of(&model), graph_of(&edited));
        let lost: Vec<_> = before.iter().filter(|field| !after.contains(field)).collect();
        let new: Vec<_> = after.iter().filter(|field| !before.contains(field)).collect();
        prop_assert_eq!((lost.len(), new.len()), (1, 3));
        prop_assert!(is_within(&without(&before, |field| *field.raw == **lost[0]), &after));
        let parts = |raw: &Vec<u8>| {
            let content = Bytes::from(raw.clone());
            let field = Fields::new("GraphProto", &content).next().unwrap().unwrap();
            fields("NodeProto", field.bytes().unwrap())
        };
        let rewired = new.iter().find(|raw| raw.windows(7).any(|w| w == b"negated") && !raw.windows(3).any(|w| w == b"Neg"));
        let (old, rewired) = (parts(lost[0]), parts(rewired.unwrap()));
        prop_assert_eq!(old.len(), rewired.len());
        prop_assert_eq!(old.iter().zip(&rewired).filter(|(a, b)| a != b).count(), 1);
    }

    /// Lengths are as short as they can be, so the way back leads to the same bytes.
    #[test]
    fn an_edit_and_its_undoing_give_the_bytes_back(bytes in any_model()) {
        let model = Model::from_bytes(bytes.clone()).unwrap();
        let first = model.graph().nodes()[0].id();
        let swap = |model: &Model, to: &str| {
            let mut patch = Patch::new("swap");
            patch.replace_input(first, 1, to);
            patch.apply(model).unwrap()
        };
        let swapped = swap(&model, "x");
        prop_assert!(swapped.to_bytes() != bytes);
        prop_assert_eq!(swap(&swapped, "w").to_bytes(), bytes);
    }

    /// A model cut anywhere is an error or a model; it is never a panic.
    #[test]
    fn a_cut_model_is_an_error_or_a_model(bytes in any_model(), cut in any::<prop::sample::Index>()) {
        let _result = super::exercise(bytes[..cut.index(bytes.len())].to_vec());
    }
}
