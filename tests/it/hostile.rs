//! Graphs that were made to be slow: every one is refused or read in a time that grows with its size, and in its memory. Files of a
//! few megabytes at which something quadratic takes minutes.

use std::time::{Duration, Instant};

use crate::fuzzed::targets;

/// Far above what a graph takes in an unoptimised build, and far below what the square of its size does.
const LIMIT: Duration = Duration::from_secs(30);

/// The time that this thread has had a processor; where the system does not tell, that of the clock.
fn used(since: Instant) -> Duration {
    let scheduled = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
    let nanoseconds = scheduled.and_then(|text| text.split(' ').next()?.parse().ok());
    nanoseconds.map_or_else(|| since.elapsed(), Duration::from_nanos)
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

/// A length-delimited field.
fn field(number: u64, content: &[u8]) -> Vec<u8> {
    [varint(number << 3 | 2), varint(content.len() as u64), content.to_vec()].concat()
}

fn integer(number: u64, value: i64) -> Vec<u8> {
    [varint(number << 3), varint(value.cast_unsigned())].concat()
}

/// A node that is named after what it makes, with its attributes as they are encoded.
fn node_with(op: &str, inputs: &[&str], output: &str, attributes: &[u8]) -> Vec<u8> {
    let inputs: Vec<u8> = inputs.iter().flat_map(|input| field(1, input.as_bytes())).collect();
    let names = [field(2, output.as_bytes()), field(3, output.as_bytes()), field(4, op.as_bytes())].concat();
    field(1, &[inputs, names, attributes.to_vec()].concat())
}

fn node(op: &str, inputs: &[&str], output: &str) -> Vec<u8> {
    node_with(op, inputs, output, &[])
}

fn integers(name: &str, values: &[i64]) -> Vec<u8> {
    let values: Vec<u8> = values.iter().flat_map(|value| integer(8, *value)).collect();
    field(5, &[field(1, name.as_bytes()), values, integer(20, 7)].concat())
}

/// An initializer of 64-bit integers.
fn constant(name: &str, dims: &[i64], values: &[i64]) -> Vec<u8> {
    let dims: Vec<u8> = dims.iter().flat_map(|dim| integer(1, *dim)).collect();
    let values: Vec<u8> = values.iter().flat_map(|value| integer(7, *value)).collect();
    field(5, &[dims, integer(2, 7), field(8, name.as_bytes()), values].concat())
}

/// A value of this many open dimensions: an input (11), an output (12) or one in between (13).
fn value(number: u64, name: &str, rank: usize) -> Vec<u8> {
    let shape: Vec<u8> = (0..rank).flat_map(|_| field(1, &[])).collect();
    let tensor = [integer(1, 1), field(2, &shape)].concat();
    field(number, &[field(1, name.as_bytes()), field(2, &field(1, &tensor))].concat())
}

/// From `x` and an attention block's query `q` to `y`.
fn model(parts: &[Vec<u8>]) -> Vec<u8> {
    let ends = [value(11, "x", 4), value(13, "q", 4), value(12, "y", 3), constant("merged", &[3], &[0, 0, 8])];
    let weight = field(5, &[integer(1, 8), integer(1, 8), integer(2, 1), field(8, b"w"), field(9, &[0; 256])].concat());
    let graph = [parts.concat(), ends.concat(), weight, field(2, b"g")].concat();
    let microsoft = field(8, &[field(1, b"com.microsoft"), integer(2, 1)].concat());
    [integer(1, 8), field(7, &graph), field(8, &integer(2, 17)), microsoft].concat()
}

/// Softmax attention of `query` with itself.
fn block(query: &str, name: &str, output: &str) -> Vec<u8> {
    let at = |part: &str| format!("{name}_{part}");
    [
        node_with("Transpose", &[query], &at("kt"), &integers("perm", &[0, 1, 3, 2])),
        node("MatMul", &[query, &at("kt")], &at("s")),
        node("Softmax", &[&at("s")], &at("p")),
        node("MatMul", &[&at("p"), query], &at("o")),
        node_with("Transpose", &[&at("o")], &at("t"), &integers("perm", &[0, 2, 1, 3])),
        node("Reshape", &[&at("t"), "merged"], &at("m")),
        node("MatMul", &[&at("m"), "w"], output),
    ]
    .concat()
}

/// `count` nodes, each of the one before; `x` comes first and `q` last.
fn chain(count: usize, make: impl Fn(&str, &str) -> Vec<u8>) -> Vec<Vec<u8>> {
    let name = |at: usize| match at {
        0 => "x".to_owned(),
        at if at == count => "q".into(),
        at => format!("c{at}"),
    };
    (0..count).map(|at| make(&name(at), &name(at + 1))).collect()
}

fn is_quick(name: &str, bytes: &[u8]) {
    let started = Instant::now();
    let before = used(started);
    targets::graph(bytes);
    targets::fold(bytes);
    let taken = used(started).saturating_sub(before);
    assert!(taken < LIMIT, "{name}: {taken:?} for {} bytes", bytes.len());
}

#[test]
fn long_ways_are_walked_once() {
    let plain = |from: &str, to: &str| node("Neg", &[from], to);
    let twice = |from: &str, to: &str| node("Add", &[from, from], to);
    let scaled = |from: &str, to: &str| node("Mul", &[from, "half"], to);
    let angle = |from: &str, to: &str| node("Mul", &[from, "cos"], to);
    let looked_up = |from: &str, to: &str| node("Gather", &["w", from], to);
    let half = constant("half", &[], &[1]);
    let cos = node("Cos", &["x"], "cos");
    let whole = |mut parts: Vec<Vec<u8>>| {
        parts.push(block("q", "b", "y"));
        model(&parts)
    };
    is_quick("a chain", &whole(chain(20_000, plain)));
    is_quick("a chain in reverse", &whole(chain(20_000, plain).into_iter().rev().collect()));
    is_quick("a chain of diamonds", &whole(chain(20_000, twice)));
    is_quick("a chain of scales", &whole([vec![half.clone()], chain(6_000, scaled)].concat()));
    is_quick("a chain of angles", &whole([vec![cos, half], chain(6_000, angle)].concat()));
    is_quick("a chain of tables", &whole(chain(6_000, looked_up)));
}

#[test]
fn nodes_of_many_inputs_are_read_once() {
    let names: Vec<String> = (0..10_000).map(|at| format!("c{at}")).collect();
    let inputs: Vec<&str> = names.iter().map(String::as_str).collect();
    let made: Vec<Vec<u8>> = names.iter().map(|name| node("Neg", &["x"], name)).collect();
    let star = |op: &str| node(op, &inputs, "q");
    for op in ["Concat", "Add", "Mul"] {
        let late = [vec![star(op)], made.clone(), vec![block("q", "b", "y")]].concat();
        is_quick(&format!("a reversed star of {op}"), &model(&late));
    }
}

#[test]
fn a_long_cycle_is_found_at_once() {
    let mut parts = chain(20_000, |from, to| node("Neg", &[from], to));
    parts[0] = node("Neg", &["q"], "c1");
    let bytes = model(&[parts.concat(), block("q", "b", "y")]);
    is_quick("a cycle", &bytes);
    let error = prefold::onnx::check(&prefold::onnx::Model::from_bytes(bytes).unwrap()).unwrap_err().to_string();
    assert!(error.contains("cycle") && error.len() < 1000, "{} bytes of text", error.len());
}

/// Many blocks beside each other, and many behind each other.
#[test]
fn many_blocks_are_no_more_than_their_sum() {
    let beside: Vec<Vec<u8>> = (0..500).map(|at| block("q", &format!("b{at}"), &format!("y{at}"))).collect();
    let longer = chain(20_000, |from, to| node("Neg", &[from], to));
    is_quick("blocks beside each other", &model(&[longer, beside, vec![block("q", "b", "y")]].concat()));
    let behind = chain(300, |from, to| {
        let merged = format!("{to}_merged");
        let heads = node("Reshape", &[&merged, "heads"], &format!("{to}_split"));
        let first = node_with("Transpose", &[&format!("{to}_split")], to, &integers("perm", &[0, 2, 1, 3]));
        [block(from, &format!("b{to}"), &merged), heads, first].concat()
    });
    let heads = constant("heads", &[4], &[0, 0, 2, 4]);
    is_quick("blocks behind each other", &model(&[vec![heads], behind, vec![block("q", "b", "y")]].concat()));
    let more: Vec<Vec<u8>> = (0..1_100).map(|at| block("q", &format!("b{at}"), &format!("y{at}"))).collect();
    let bytes = model(&[vec![node("Neg", &["x"], "q")], more, vec![block("q", "b", "y")]].concat());
    let error =
        prefold::fold::locate::sites(&prefold::onnx::Model::from_bytes(bytes).unwrap()).unwrap_err().to_string();
    assert!(error.contains("there are 1101 attention blocks, and at most 1024 are folded"), "{error}");
}

/// A few kilobytes that would fill the memory.
#[test]
fn sizes_are_not_believed() {
    let list = constant("list", &[64], &[1; 64]);
    let repeated = vec!["list"; 20_000];
    let mut shapes = vec![list, node("Concat", &repeated, "s0")];
    for at in 1..100 {
        let before = format!("s{}", at - 1);
        shapes.push(node("Concat", &vec![before.as_str(); 100], &format!("s{at}")));
    }
    shapes.push(node("Reshape", &["x", "s99"], "r"));
    shapes.push(node("Reshape", &["r", "s0"], "q2"));
    is_quick("a long shape", &model(&[shapes, vec![block("q2", "b", "y")]].concat()));

    let many: Vec<i64> = vec![1; 20_000];
    let wide = constant("wide", &many, &[1]);
    let mut handed = vec![wide, node("Neg", &["wide"], "n0")];
    handed.extend((1..5_000).map(|at| node("Neg", &[&format!("n{}", at - 1)], &format!("n{at}"))));
    is_quick("a shape of many dimensions", &model(&[handed, vec![node("Neg", &["x"], "y")]].concat()));

    let huge = [constant("huge", &[i64::MAX, i64::MAX], &[1]), constant("less", &[-1, i64::MIN], &[1])].concat();
    let scaled = node("Mul", &["x", "huge"], "a");
    let laid = [node("Reshape", &["a", "less"], "b"), node("Mul", &["b", "less"], "q3")].concat();
    is_quick("dimensions that overflow", &model(&[huge, scaled, laid, block("q3", "b", "y")]));
}

/// The frequencies of a rotation become a constant: not as many as a file says that a head is wide.
#[test]
fn a_rotation_is_not_as_wide_as_a_file_says() {
    use prefold::fold::locate;

    let int =
        |name: &str, value: i64| field(5, &[field(1, name.as_bytes()), integer(3, value), integer(20, 2)].concat());
    let attributes = [int("num_heads", 2), int("do_rotary", 1), field(7, b"com.microsoft")].concat();
    let weights = constant("qkv", &[8, 3 << 28], &[1]);
    let attention = node_with("Attention", &["x", "qkv"], "h", &attributes);
    let bytes = model(&[weights, attention, node("MatMul", &["h", "w"], "y")]);
    let model = prefold::onnx::Model::from_bytes(bytes).unwrap();
    let sites = locate::sites(&model).unwrap();
    let error = locate::query(&model, &sites[0], prefold::adapter::Query::PostRope).unwrap_err().to_string();
    assert!(error.contains("it turns 134217728 elements of each head, and at most 65536 are followed"), "{error}");
}

/// A graph may say of itself that it was folded any number of times.
#[test]
fn the_number_of_a_fold_does_not_overflow() {
    use prefold::fold::{self, FoldOptions, NamedAdapter, Over};
    use prefold::onnx::{Model, Patch};

    let model =
        Model::from_bytes(model(&[vec![node("Neg", &["x"], "q")], vec![block("q", "b", "y")]].concat())).unwrap();
    let config = r#"{"method": "prefix_plus", "num_layers": 1, "num_heads": 2, "head_dim": 4}"#;
    let adapter = prefold::adapter::Adapter::zeros(serde_json::from_str(config).unwrap()).unwrap();
    let entry = format!(
        r#"{{"emission": "baked", "config": {config}, "adapters": [], "undo": {{"bytes": 0, "sha256": "", "delta": ""}}}}"#
    );
    let mut patch = Patch::new("mark");
    patch.set_metadata(fold::MARK, "a").set_metadata(&format!("{}{}", fold::RECORDS, u64::MAX), &entry);
    let marked = patch.apply(&model).unwrap();
    let here = std::path::Path::new(".");
    let options = FoldOptions { over: Over::Stack, ..FoldOptions::default() };
    let error = fold::fold(&marked, here, &[NamedAdapter { name: "b".into(), adapter }], options, here).unwrap_err();
    assert!(error.to_string().contains("it has no number"), "{error}");
}
