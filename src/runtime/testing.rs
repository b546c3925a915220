//! Tiny ONNX models written byte by byte, so that the tests of a runtime need no file from elsewhere.

pub(super) use crate::base::testing::shared;
use std::path::{Path, PathBuf};

use ndarray::Array2;

use super::{NamedValues, Session, Value, library};

/// Tokens of the tiny models.
pub(super) const VOCAB: usize = 5;
pub(super) const DATA_NAME: &str = "model.onnx.data";

/// A language model whose next token is always the current one plus one. Without a cache its logits are
/// `table[input_ids]`; with one they are that times the sum of all token ids so far, which one cached "key" and
/// "value" per token carry.
pub(super) struct TinyModel {
    pub(super) cached: bool,
    pub(super) external: bool,
}

/// The ONNX Runtime library of this machine, or none with a message.
pub(super) fn ort_library() -> Option<PathBuf> {
    let found = crate::files::cache_folder().map_err(super::Error::from).and_then(|cache| library::find(None, &cache));
    if let Err(error) = &found {
        eprintln!("skipped: {error}; `prefold runtime install` gets it");
    }
    found.ok()
}

pub(super) fn tiny_feeds(batch: usize, length: usize) -> NamedValues {
    let ids = Array2::from_shape_fn((batch, length), |(row, column)| ((row + column) % VOCAB) as i64);
    let mask = Array2::<i64>::ones((batch, length));
    NamedValues::new().with("input_ids", ids.into_dyn()).with("attention_mask", mask.into_dyn())
}

/// Checks an uncached tiny model against what it is defined to compute.
pub(super) fn check_tiny(session: &mut dyn Session) {
    let names: Vec<&str> = session.inputs().iter().map(|port| port.name.as_str()).collect();
    assert_eq!(names, ["input_ids", "attention_mask"]);
    for (batch, length) in [(1, 1), (2, 3), (3, 7)] {
        let logits = session.run(tiny_feeds(batch, length)).unwrap().take("logits").unwrap();
        let Value::F32(logits) = logits else { panic!("logits are {:?}", logits.dtype()) };
        assert_eq!(logits.shape(), [batch, length, VOCAB]);
        for ((row, column, token), logit) in logits.into_dimensionality::<ndarray::Ix3>().unwrap().indexed_iter() {
            assert_eq!(*logit, table((row + column) % VOCAB, token));
        }
    }
}

/// The logit of `next` after `current`.
pub(super) fn table(current: usize, next: usize) -> f32 {
    if next == (current + 1) % VOCAB { 1.0 } else { 0.25 * next as f32 / VOCAB as f32 }
}

impl TinyModel {
    /// Writes the model into a folder and gives the path of its graph.
    pub(super) fn write(&self, folder: &Path) -> PathBuf {
        let path = folder.join("model.onnx");
        let table: Vec<u8> = (0..VOCAB * VOCAB).flat_map(|i| table(i / VOCAB, i % VOCAB).to_le_bytes()).collect();
        let mut table_proto = proto(&[(1, Int(5)), (1, Int(5)), (2, Int(1)), (8, Text("table"))]);
        if self.external {
            std::fs::write(folder.join(DATA_NAME), &table).unwrap();
            let entry = |key, value: &str| proto(&[(1, Text(key)), (2, Text(value))]);
            table_proto.extend(proto(&[
                (13, Bytes(&entry("location", DATA_NAME))),
                (13, Bytes(&entry("offset", "0"))),
                (13, Bytes(&entry("length", &table.len().to_string()))),
                (14, Int(1)),
            ]));
        } else {
            table_proto.extend(proto(&[(9, Bytes(&table))]));
        }
        let mut graph = proto(&[(2, Text("tiny")), (5, Bytes(&table_proto))]);
        graph.extend(if self.cached { cached_graph() } else { plain_graph() });
        let opset = proto(&[(1, Text("")), (2, Int(17))]);
        let model = proto(&[(1, Int(8)), (7, Bytes(&graph)), (8, Bytes(&opset))]);
        std::fs::write(&path, model).unwrap();
        path
    }
}

fn plain_graph() -> Vec<u8> {
    proto(&[
        (1, Bytes(&node("Gather", &["table", "input_ids"], &["logits"], &[]))),
        (11, Bytes(&info("input_ids", INT64, &["batch", "sequence"]))),
        (11, Bytes(&info("attention_mask", INT64, &["batch", "sequence"]))),
        (12, Bytes(&info("logits", FLOAT, &["batch", "sequence", "5"]))),
    ])
}

fn cached_graph() -> Vec<u8> {
    let axes = |name: &str, values: &[i64]| {
        let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        proto(&[(1, Int(values.len() as u64)), (2, Int(INT64)), (8, Text(name)), (9, Bytes(&data))])
    };
    let axis = proto(&[(1, Text("axis")), (3, Int(2)), (20, Int(2))]);
    let float = proto(&[(1, Text("to")), (3, Int(FLOAT)), (20, Int(2))]);
    let flat = proto(&[(1, Text("keepdims")), (3, Int(0)), (20, Int(2))]);
    let past = ["batch", "1", "past", "1"];
    let total = ["batch", "1", "past + sequence", "1"];
    proto(&[
        (5, Bytes(&axes("outer", &[1, 3]))),
        (5, Bytes(&axes("heads", &[1, 2]))),
        (1, Bytes(&node("Cast", &["input_ids"], &["ids"], &[&float]))),
        (1, Bytes(&node("Unsqueeze", &["ids", "outer"], &["new"], &[]))),
        (1, Bytes(&node("Concat", &["past_key_values.0.key", "new"], &["present.0.key"], &[&axis]))),
        (1, Bytes(&node("Concat", &["past_key_values.0.value", "new"], &["present.0.value"], &[&axis]))),
        (1, Bytes(&node("ReduceSum", &["present.0.key", "heads"], &["sum"], &[&flat]))),
        (1, Bytes(&node("Unsqueeze", &["sum", "last"], &["scale"], &[]))),
        (5, Bytes(&axes("last", &[2]))),
        (1, Bytes(&node("Gather", &["table", "input_ids"], &["next"], &[]))),
        (1, Bytes(&node("Mul", &["next", "scale"], &["logits"], &[]))),
        (11, Bytes(&info("input_ids", INT64, &["batch", "sequence"]))),
        (11, Bytes(&info("attention_mask", INT64, &["batch", "past + sequence"]))),
        (11, Bytes(&info("past_key_values.0.key", FLOAT, &past))),
        (11, Bytes(&info("past_key_values.0.value", FLOAT, &past))),
        (12, Bytes(&info("logits", FLOAT, &["batch", "sequence", "5"]))),
        (12, Bytes(&info("present.0.key", FLOAT, &total))),
        (12, Bytes(&info("present.0.value", FLOAT, &total))),
    ])
}

const FLOAT: u64 = 1;
const INT64: u64 = 7;

fn node(op: &str, inputs: &[&str], outputs: &[&str], attributes: &[&[u8]]) -> Vec<u8> {
    let inputs = inputs.iter().map(|name| (1, Text(name)));
    let outputs = outputs.iter().map(|name| (2, Text(name)));
    let attributes = attributes.iter().map(|attribute| (5, Bytes(attribute)));
    let fields: Vec<_> = inputs.chain(outputs).chain([(4, Text(op))]).chain(attributes).collect();
    proto(&fields)
}

fn info(name: &str, dtype: u64, dims: &[&str]) -> Vec<u8> {
    let dim = |dim: &&str| match dim.parse() {
        Ok(size) => proto(&[(1, Int(size))]),
        Err(_) => proto(&[(2, Text(dim))]),
    };
    let shape: Vec<u8> = dims.iter().flat_map(|d| proto(&[(1, Bytes(&dim(d)))])).collect();
    let tensor = proto(&[(1, Int(dtype)), (2, Bytes(&shape))]);
    proto(&[(1, Text(name)), (2, Bytes(&proto(&[(1, Bytes(&tensor))])))])
}

/// A protobuf field's content.
enum Field<'a> {
    Int(u64),
    Text(&'a str),
    Bytes(&'a [u8]),
}
use Field::{Bytes, Int, Text};

fn proto(fields: &[(u64, Field<'_>)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (number, field) in fields {
        let mut block = |bytes: &[u8]| {
            varint(number << 3 | 2, &mut out);
            varint(bytes.len() as u64, &mut out);
            out.extend_from_slice(bytes);
        };
        match field {
            Text(text) => block(text.as_bytes()),
            Bytes(bytes) => block(bytes),
            Int(value) => {
                varint(number << 3, &mut out);
                varint(*value, &mut out);
            }
        }
    }
    out
}

fn varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}
