//! A folder of bad graphs: `prefold fold` gives one clear error for each and leaves nothing behind.

use std::path::{Path, PathBuf};

use prefold::base::Checkpoint;
use prefold::export::{ExportOptions, export};
use prefold::fold::fold_folder;

use crate::command_line::{failure, names};
use crate::support::{arg, fixture};

/// A length-delimited protobuf field.
fn field(number: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![number << 3 | 2];
    let mut length = content.len();
    while length >= 0x80 {
        bytes.push(length as u8 | 0x80);
        length >>= 7;
    }
    bytes.push(length as u8);
    bytes.extend(content);
    bytes
}

fn node(op: &str, input: &str, output: &str) -> Vec<u8> {
    let name = field(3, format!("{op}_{output}").as_bytes());
    field(1, &[field(1, input.as_bytes()), field(2, output.as_bytes()), name, field(4, op.as_bytes())].concat())
}

/// A model of IR version 8 and operator set 17: `x` → `y`.
fn model(inside: &[Vec<u8>]) -> Vec<u8> {
    let named = |number, name: &str| field(number, &field(1, name.as_bytes()));
    let graph = [inside.concat(), field(2, b"g"), named(11, "x"), named(12, "y")].concat();
    [vec![0x08, 8], field(7, &graph), field(8, &[0x10, 17])].concat()
}

/// An initializer of float32 with these dimensions and bytes.
fn initializer(name: &str, dims: &[i64], raw: &[u8]) -> Vec<u8> {
    let mut tensor = Vec::new();
    for dim in dims {
        tensor.push(0x08);
        let mut rest = dim.cast_unsigned();
        while rest >= 0x80 {
            tensor.push(rest as u8 | 0x80);
            rest >>= 7;
        }
        tensor.push(rest as u8);
    }
    field(5, &[tensor, vec![0x10, 1], field(8, name.as_bytes()), field(9, raw)].concat())
}

/// An `If` in an `If` in an `If`, …
fn nested(depth: usize) -> Vec<u8> {
    let mut graph = field(2, b"innermost");
    for _ in 0..depth {
        let branch = field(5, &[field(1, b"then_branch"), field(6, &graph), vec![0xa0, 0x01, 5]].concat());
        graph = field(1, &[field(4, b"If"), branch].concat());
    }
    [vec![0x08, 8], field(7, &graph), field(8, &[0x10, 17])].concat()
}

/// A whole graph with its weights in `model.onnx.data`.
fn good_graph(folder: &Path) -> PathBuf {
    let folder = folder.join("good");
    std::fs::create_dir(&folder).unwrap();
    let checkpoint = Checkpoint::open(&fixture("oracles/llama_bias")).unwrap();
    export(&checkpoint, &ExportOptions { external_data_threshold: 0, ..ExportOptions::default() }, &folder).unwrap()
}

#[test]
fn files_that_are_no_graphs() {
    let folder = tempfile::tempdir().unwrap();
    let good = std::fs::read(good_graph(folder.path())).unwrap();
    let whole = model(&[node("Neg", "x", "y")]);
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("empty", Vec::new()),
        ("page", b"<!DOCTYPE html><html></html>".to_vec()),
        ("pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n".to_vec()),
        ("cut", good[..good.len() / 2].to_vec()),
        ("long", [vec![0x3a], vec![0xff; 9], vec![1]].concat()),
        ("overlong", vec![0x08; 40]),
        ("two", [whole.clone(), field(7, b"")].concat()),
        ("deep", nested(60)),
        ("cycle", model(&[node("Neg", "b", "a"), node("Neg", "a", "b"), node("Add", "b", "y")])),
        ("dangling", model(&[node("Neg", "nowhere", "y")])),
        ("twice", model(&[node("Neg", "x", "y"), node("Abs", "x", "y")])),
        ("no_output", model(&[node("Neg", "x", "z")])),
        ("huge", model(&[initializer("w", &[1 << 40, 1 << 40], &[]), node("Neg", "x", "y")])),
        ("negative", model(&[initializer("w", &[-2], &[0; 8]), node("Neg", "x", "y")])),
        ("short", model(&[initializer("w", &[4], &[0; 8]), node("Neg", "x", "y")])),
        ("no_attention", whole),
    ];
    let mut errors = Vec::new();
    let before = names(folder.path());
    for (name, bytes) in cases {
        let name = format!("{name}.onnx");
        let path = folder.path().join(&name);
        std::fs::write(&path, &bytes).unwrap();
        let adapter = fixture("oracles/llama_bias/adapter.safetensors");
        errors
            .push(failure(folder.path(), &["fold", "--graph", arg(&path), "--adapter", arg(&adapter), "--out", "out"]));
        assert_eq!(std::fs::read(&path).unwrap(), bytes, "the input is untouched");
        std::fs::remove_file(&path).unwrap();
    }
    assert_eq!(names(folder.path()), before, "nothing was left behind");
    insta::assert_snapshot!(errors.join("\n\n"));
}

/// Locations are replaced by others of the same length.
#[test]
fn external_data_that_cannot_be() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let good = good_graph(at);
    let (graph, data) = (std::fs::read(&good).unwrap(), std::fs::read(at.join("good/model.onnx.data")).unwrap());
    std::fs::write(at.join("outside.data"), &data).unwrap();
    let adapter = fixture("oracles/llama_bias/adapter.safetensors");
    let before = names(at);
    let fold = || failure(at, &["fold", "--graph", "good/model.onnx", "--adapter", arg(&adapter), "--out", "out"]);
    let mut errors = Vec::new();
    let located = |location: &str| {
        let mut bytes = graph.clone();
        let found: Vec<usize> = (0..bytes.len() - 15).filter(|&i| &bytes[i..i + 15] == b"model.onnx.data").collect();
        assert!(found.len() > 2 && location.len() == 15);
        found.iter().for_each(|&i| bytes[i..i + 15].copy_from_slice(location.as_bytes()));
        bytes
    };
    for location in ["../outside.data", "sub/../../x.dat", "/data/out.data/", "C:\\outside.data", "..\\outside.data"] {
        std::fs::write(&good, located(location)).unwrap();
        errors.push(fold());
    }
    std::fs::rename(at.join("good/model.onnx.data"), at.join("good/prefold.json")).unwrap();
    std::fs::write(&good, located(".//prefold.json")).unwrap();
    errors.push(fold());
    std::fs::write(&good, &graph).unwrap();
    errors.push(fold());
    std::fs::write(at.join("good/model.onnx.data"), &data[..data.len() - 1]).unwrap();
    errors.push(fold());
    #[cfg(unix)]
    {
        std::fs::remove_file(at.join("good/model.onnx.data")).unwrap();
        std::os::unix::fs::symlink("../outside.data", at.join("good/model.onnx.data")).unwrap();
        errors.push(fold());
    }
    assert_eq!(names(at), before, "nothing was left behind");
    insta::assert_snapshot!(errors.join("\n\n"));
}

#[test]
fn adapters_of_other_models_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    good_graph(folder.path());
    let mut errors = Vec::new();
    for other in ["llama_head_dim", "qwen3"] {
        let adapter = fixture(&format!("oracles/{other}/adapter.safetensors"));
        let args = ["fold", "--graph", "good/model.onnx", "--adapter", arg(&adapter), "--out", "out"];
        errors.push(format!("{other}: {}", failure(folder.path(), &args)));
    }
    assert_eq!(names(folder.path()), ["good"], "nothing was left behind");
    insta::assert_snapshot!(errors.join("\n\n"));
}

/// Protobuf has no end mark: a message cut between two fields is a message. What is left then is no whole graph.
#[test]
fn a_graph_cut_anywhere_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let good = good_graph(folder.path());
    let bytes = std::fs::read(&good).unwrap();
    let adapter = fixture("oracles/llama_bias/adapter.safetensors");
    for cut in (0..bytes.len()).step_by(bytes.len() / 400) {
        std::fs::write(&good, &bytes[..cut]).unwrap();
        let out = tempfile::tempdir_in(folder.path()).unwrap();
        assert!(fold_folder(&good, &adapter, out.path()).is_err(), "cut at {cut} of {}", bytes.len());
    }
}
