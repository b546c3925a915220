//! Runs shared by several processes, started as launchers start them, against the same run in one process.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::support::{arg, fixture, prefold, prefold_ok};

/// A run on the demo's model of `steps` steps over 8 examples each, however they are dealt out.
fn run(out: &str, batch: usize, accumulation: usize, more: &[&str]) -> Vec<String> {
    let [model, data, eval] = ["demo/model", "demo/train.jsonl", "demo/test.jsonl"].map(fixture);
    let (batch, accumulation) = (batch.to_string(), accumulation.to_string());
    let inputs = ["--quiet", "train", "--model", arg(&model), "--data", arg(&data), "--eval", arg(&eval), "--out", out];
    let size = ["--limit", "48", "--batch-size", &batch, "--gradient-accumulation", &accumulation, "--eval-limit", "8"];
    let pace = ["--max-steps", "8", "--learning-rate", "5e-3"];
    [inputs.as_slice(), &size, &pace, more].concat().into_iter().map(str::to_owned).collect()
}

/// Starts every argument list as one process of a group, by torchrun's variables, and waits for all.
fn together(folder: &Path, processes: &[Vec<String>]) -> Vec<Output> {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let start = |(rank, args): (usize, &Vec<String>)| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_prefold"));
        command.current_dir(folder).args(args).env("NO_COLOR", "1").stdout(Stdio::piped()).stderr(Stdio::piped());
        command.env("RANK", rank.to_string()).env("WORLD_SIZE", processes.len().to_string());
        command.env("LOCAL_RANK", rank.to_string()).env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", &port);
        command.spawn().unwrap()
    };
    let children: Vec<_> = processes.iter().enumerate().map(start).collect();
    children.into_iter().map(|child| child.wait_with_output().unwrap()).collect()
}

fn together_ok(folder: &Path, args: &[String], processes: usize) -> Vec<String> {
    let outputs = together(folder, &vec![args.to_vec(); processes]);
    let text = |output: Output| {
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    outputs.into_iter().map(text).collect()
}

fn alone(folder: &Path, args: &[String]) -> String {
    prefold_ok(folder, &args.iter().map(String::as_str).collect::<Vec<_>>())
}

fn metrics(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let timeless = |line: &str| {
        let mut value: Value = serde_json::from_str(line).unwrap();
        value.as_object_mut().unwrap().remove("seconds");
        value
    };
    text.lines().map(timeless).collect()
}

fn weights(run: &Path) -> Vec<u8> {
    std::fs::read(run.join("adapter_model.safetensors")).unwrap()
}

/// Largest difference between two adapters, of the largest value.
fn distance(a: &Path, b: &Path) -> f64 {
    let load = |run: &Path| {
        candle_core::safetensors::load(run.join("adapter_model.safetensors"), &candle_core::Device::Cpu).unwrap()
    };
    let values = |run: &Path| {
        let mut tensors: Vec<_> = load(run).into_iter().collect();
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        let flat = |t: &candle_core::Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        tensors.iter().flat_map(|(_, tensor)| flat(tensor)).collect::<Vec<f32>>()
    };
    let (a, b) = (values(a), values(b));
    assert_eq!(a.len(), b.len());
    let largest = a.iter().fold(0f32, |m, x| m.max(x.abs()));
    f64::from(a.iter().zip(&b).fold(0f32, |m, (x, y)| m.max((x - y).abs())) / largest)
}

/// Two processes end in the bytes of one process with the same global batch, and log the same figures.
#[test]
fn two_processes_end_as_one() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path();
    alone(folder, &run("one", 4, 2, &["--eval-every", "4"]));
    let said = together_ok(folder, &run("two", 4, 1, &["--eval-every", "4"]), 2);
    assert!(said[0].contains("8 steps") && said[1].is_empty(), "{said:?}");
    assert!(
        weights(&folder.join("one")) == weights(&folder.join("two")),
        "{}",
        distance(&folder.join("one"), &folder.join("two"))
    );
    assert_eq!(metrics(&folder.join("one")), metrics(&folder.join("two")));

    // with several micro-batches in each process the sums are taken in another order
    alone(folder, &run("one_of_4", 2, 4, &[]));
    together_ok(folder, &run("two_of_2", 2, 2, &[]), 2);
    let found = distance(&folder.join("one_of_4"), &folder.join("two_of_2"));
    assert!(found < 1e-4, "{found:e}");
}

/// LoRA with dropout draws the same masks, and preference pairs the same rewards.
#[test]
fn methods_and_objectives_are_shared_too() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path();
    let lora = ["--method", "lora", "--set", "adapter.lora.dropout=0.1"];
    alone(folder, &run("one", 2, 3, &lora));
    together_ok(folder, &run("three", 2, 1, &lora), 3);
    assert!(weights(&folder.join("one")) == weights(&folder.join("three")));
}

/// A run of two processes that goes on from a checkpoint ends in the same bytes; in another number it does not go on.
#[test]
fn a_shared_run_resumes() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path();
    let options = ["--save-every", "3"];
    together_ok(folder, &run("whole", 4, 1, &options), 2);
    together_ok(folder, &run("killed", 4, 1, &options), 2);
    let killed = folder.join("killed");
    for name in ["adapter_model.safetensors", "adapter_config.json"] {
        std::fs::remove_file(killed.join(name)).unwrap();
    }
    std::fs::remove_dir_all(killed.join("checkpoints/step-000006")).unwrap();
    let resumed = run("killed", 4, 1, &["--save-every", "3", "--resume"]);
    together_ok(folder, &resumed, 2);
    assert!(weights(&folder.join("whole")) == weights(&killed));

    let args: Vec<&str> = resumed.iter().map(String::as_str).collect();
    let output = prefold(folder, &args);
    let error = String::from_utf8_lossy(&output.stderr).replace('│', " ");
    let error = error.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(!output.status.success() && error.contains("run of 2 processes"), "{error}");
}

/// Processes with different options stop before the first step, and all say why.
#[test]
fn processes_with_different_options_are_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path();
    let (first, second) = (run("out", 4, 1, &[]), run("out", 4, 1, &["--seed", "7"]));
    for output in together(folder, &[first, second]) {
        let error = String::from_utf8_lossy(&output.stderr).replace('│', " ");
        let error = error.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(!output.status.success() && !error.contains("panicked"), "{error}");
        assert!(error.contains("of rank 1 differ"), "{error}");
    }
    assert!(!folder.join("out").exists(), "a run that did not begin leaves nothing");
}
