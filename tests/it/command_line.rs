//! What a user sees when something is wrong: one clear error, a non-zero exit, nothing left behind, the input untouched.

use std::path::Path;

use crate::support::{arg, fixture, prefold, prefold_ok};

/// The error text of a command that must fail with exit code 1, without paths of this machine.
fn failure(folder: &Path, args: &[&str]) -> String {
    let output = prefold(folder, args);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{args:?}: {error}");
    assert!(!error.contains("panicked"), "{error}");
    let folder = folder.display().to_string();
    let error = error.replace(&folder, "FOLDER").replace(&fixture("").display().to_string(), "FIXTURES/");
    error.lines().map(str::trim).filter(|l| !l.is_empty()).collect::<Vec<_>>().join(" ")
}

/// Names in a folder, sorted.
fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn write(folder: &Path, name: &str, content: &str) {
    let path = folder.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, content).unwrap();
}

/// A copy of the demo's model to damage.
fn copy_model(folder: &Path) {
    std::fs::create_dir(folder.join("model")).unwrap();
    for entry in std::fs::read_dir(fixture("demo/model")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.join("model").join(entry.file_name())).unwrap();
    }
}

#[test]
fn checkpoints_that_do_not_open() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let export = |model: &str| failure(at, &["export", "--model", model, "--out", "out"]);
    let mut errors = vec![export("nowhere")];
    write(at, "empty/readme", "");
    errors.push(export("./empty"));
    write(at, "unknown/config.json", r#"{"model_type": "mamba"}"#);
    std::fs::copy(fixture("demo/model/model.safetensors"), at.join("unknown/model.safetensors")).unwrap();
    errors.push(export("./unknown"));
    write(at, "broken.gguf", "GGUF");
    errors.push(export("./broken.gguf"));
    copy_model(at);
    let weights = at.join("model/model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &whole[..whole.len() / 2]).unwrap();
    errors.push(export("./model"));
    std::fs::write(&weights, &whole).unwrap();
    let config = std::fs::read_to_string(at.join("model/config.json")).unwrap();
    write(at, "model/config.json", &config.replace("\"hidden_size\": 96", "\"hidden_size\": 192"));
    errors.push(export("./model"));
    write(at, "model/config.json", "{");
    errors.push(export("./model"));
    insta::assert_snapshot!(errors.join("\n\n"), @"");
    assert_eq!(names(at), ["broken.gguf", "empty", "model", "unknown"], "nothing was left behind");
}

#[test]
fn records_that_cannot_be_learnt() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let model = fixture("demo/model");
    let train = |data: &str| {
        write(at, "data.jsonl", data);
        failure(at, &["-q", "train", "--model", arg(&model), "--data", "data.jsonl", "--out", "out"])
    };
    let good = "{\"text\": \"a\", \"label\": \"b\"}\n";
    let errors = [
        train(""),
        train("not json"),
        train(&format!("{good}{{\"text\": \"a\"}}\n")),
        train(&format!("{good}{{\"prompt\": \"a\", \"completion\": \"b\"}}\n")),
        failure(at, &["-q", "train", "--model", arg(&model), "--data", "nowhere.jsonl", "--out", "out"]),
        failure(at, &["-q", "train", "--model", arg(&model), "--out", "out"]),
        {
            write(at, "data.jsonl", good);
            write(at, "run.toml", "[train]\nlearning_rat = 1.0\n");
            failure(at, &["train", "--config", "run.toml", "--model", arg(&model), "--data", "data.jsonl", "--out", "out"])
        },
        failure(at, &["-q", "train", "--model", arg(&model), "--data", "data.jsonl", "--out", "out", "--epochs", "0"]),
        failure(at, &["-q", "train", "--model", arg(&model), "--data", "data.jsonl", "--out", "out", "--resume"]),
    ];
    insta::assert_snapshot!(errors.join("\n\n"), @"");
    assert_eq!(names(at), ["data.jsonl", "run.toml"], "nothing was left behind");
}

#[test]
fn adapters_and_graphs_that_do_not_fit() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let model = fixture("demo/model");
    prefold_ok(at, &["export", "--model", arg(&model), "--out", "base"]);
    let before = std::fs::read(at.join("base/model.onnx")).unwrap();
    let config = |layers: usize, heads: usize, width: usize| {
        format!(r#"{{"method": "prefix_plus", "num_layers": {layers}, "num_heads": {heads}, "head_dim": {width}}}"#)
    };
    let adapter = |name: &str, config: &str, layers: usize, shape: (usize, usize, usize)| {
        write(at, &format!("{name}/adapter_config.json"), config);
        let zeros = candle_core::Tensor::zeros(shape, candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
        let tensors = (0..layers).map(|i| (format!("layers.{i}.M"), zeros.clone())).collect();
        candle_core::safetensors::save(&tensors, at.join(name).join("adapter_model.safetensors")).unwrap();
    };
    adapter("deep", &config(9, 6, 16), 9, (6, 16, 16));
    adapter("lies", &config(4, 6, 16), 4, (6, 8, 8));
    adapter("short", &config(4, 6, 16), 3, (6, 16, 16));
    adapter("newer", &config(4, 6, 16).replace('{', r#"{"format_version": 2, "#), 4, (6, 16, 16));
    adapter("other", &config(4, 6, 16).replace("prefix_plus", "magic"), 4, (6, 16, 16));
    adapter("fits", &config(4, 6, 16), 4, (6, 16, 16));
    let fold = |graph: &str, adapter: &str| failure(at, &["fold", "--graph", graph, "--adapter", adapter, "--out", "out"]);
    let mut errors =
        ["nowhere", "deep", "lies", "short", "newer", "other"].map(|name| fold("base", name)).to_vec();
    errors.push(fold("nowhere", "fits"));
    write(at, "text.onnx", "this is no graph");
    errors.push(fold("text.onnx", "fits"));
    write(at, "cut/model.onnx", "");
    std::fs::write(at.join("cut/model.onnx"), &before[..before.len() / 2]).unwrap();
    errors.push(fold("cut", "fits"));
    prefold_ok(at, &["fold", "--graph", "base", "--adapter", "fits", "--out", "folded"]);
    errors.push(fold("folded", "fits"));
    errors.push(failure(at, &["fold", "--graph", "base", "--adapter", "fits", "--out", "folded"]));
    errors.push(failure(at, &["generate", "--model", arg(&model), "--adapter", "deep", "--prompt", "x"]));
    insta::assert_snapshot!(errors.join("\n\n"), @"");
    assert_eq!(before, std::fs::read(at.join("base/model.onnx")).unwrap(), "the input is untouched");
    assert!(!at.join("out").exists());
}

#[test]
fn inputs_that_cannot_be_run() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let model = fixture("demo/model");
    let forward = |ids: &[i64], more: &[&str]| {
        let ids = candle_core::Tensor::from_slice(ids, (1, ids.len()), &candle_core::Device::Cpu).unwrap();
        let inputs = std::collections::HashMap::from([("input_ids".to_owned(), ids)]);
        candle_core::safetensors::save(&inputs, at.join("in.safetensors")).unwrap();
        let args = ["forward", "--model", arg(&model), "--inputs", "in.safetensors", "--out", "out.safetensors"];
        failure(at, &[args.as_slice(), more].concat())
    };
    let errors = [
        forward(&[1, 2, 999_999], &[]),
        forward(&[1, -2], &[]),
        {
            write(at, "no.safetensors", "{}");
            failure(at, &["forward", "--model", arg(&model), "--inputs", "no.safetensors", "--out", "out.safetensors"])
        },
        failure(at, &["generate", "--graph", "nowhere", "--prompt", "x"]),
        failure(at, &["inspect", "nowhere"]),
        failure(at, &["fetch", "gpt5"]),
    ];
    insta::assert_snapshot!(errors.join("\n\n"), @"");
    assert!(!at.join("out.safetensors").exists());
}

/// A write that runs out of space: a device that is always full stands for the disk.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk() {
    let folder = tempfile::tempdir().unwrap();
    let model = fixture("demo/model");
    let verify = ["verify", "--model", arg(&model), "--graph", "base", "--runtime", "tract", "--out", "/dev/full"];
    prefold_ok(folder.path(), &["export", "--model", arg(&model), "--out", "base"]);
    let error = failure(folder.path(), &verify);
    assert!(error.contains("No space left on device") && error.contains("free some space"), "{error}");
}
