//! Training on the demo's model: it learns, resumes to the same bytes, and stops with an error when it diverges.

use std::path::{Path, PathBuf};

use prefold::runtime::library;

use crate::support::{arg, fixture, prefold, prefold_ok};

const FILES: [&str; 2] = ["adapter_model.safetensors", "adapter_config.json"];

fn train<'a>(model: &'a str, data: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let args =
        ["--quiet", "train", "--model", model, "--data", data, "--out", out, "--limit", "64", "--batch-size", "4"];
    [args.as_slice(), &["--max-steps", "12", "--save-every", "5"], more].concat()
}

fn demo() -> (PathBuf, PathBuf) {
    (fixture("demo/model"), fixture("demo/train.jsonl"))
}

fn bytes(run: &Path) -> Vec<Vec<u8>> {
    FILES.iter().map(|name| std::fs::read(run.join(name)).unwrap()).collect()
}

#[test]
fn a_run_that_lost_its_end_resumes_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (model, data) = demo();
    for run in ["whole", "again", "cut"] {
        prefold_ok(folder.path(), &train(arg(&model), arg(&data), run, &["--gradient-accumulation", "2"]));
    }
    let (whole, cut) = (folder.path().join("whole"), folder.path().join("cut"));
    assert_eq!(bytes(&whole), bytes(&folder.path().join("again")), "the same run gives the same bytes");

    // as if the process had been killed between steps 5 and 10
    for name in FILES {
        std::fs::remove_file(cut.join(name)).unwrap();
    }
    std::fs::remove_dir_all(cut.join("checkpoints/step-000010")).unwrap();
    let resume = train(arg(&model), arg(&data), "cut", &["--gradient-accumulation", "2", "--resume"]);
    prefold_ok(folder.path(), &resume);
    assert_eq!(bytes(&whole), bytes(&cut));
    let steps = |run: &Path| {
        let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
        let step = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["step"].as_u64().unwrap();
        text.lines().map(step).collect::<Vec<u64>>()
    };
    assert_eq!(steps(&whole), steps(&cut), "no step is logged twice");
}

#[test]
fn a_checkpoint_of_another_run_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (model, data) = demo();
    prefold_ok(folder.path(), &train(arg(&model), arg(&data), "run", &[]));
    let before = bytes(&folder.path().join("run"));
    let other = train(arg(&model), arg(&data), "run", &["--resume", "--learning-rate", "0.5"]);
    let output = prefold(folder.path(), &other);
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("`learning_rate` differs"), "{error}");
    assert_eq!(before, bytes(&folder.path().join("run")));
}

#[test]
fn a_run_that_diverges_says_so_and_leaves_no_folder() {
    let folder = tempfile::tempdir().unwrap();
    let (model, data) = demo();
    let args = ["--quiet", "train", "--model", arg(&model), "--data", arg(&data), "--out", "run", "--limit", "8"];
    let wild = ["--learning-rate", "1e38", "--warmup-fraction", "0", "--max-grad-norm", "0", "--save-every", "0"];
    let args = [args.as_slice(), &wild].concat();
    let output = prefold(folder.path(), &args);
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("training diverged at step"), "{error}");
    assert!(error.contains("lower --learning-rate"), "{error}");
    assert!(!folder.path().join("run").exists());
}

#[test]
fn the_adapter_learns_and_the_graph_computes_it() {
    let folder = tempfile::tempdir().unwrap();
    let (model, data) = demo();
    let args = ["--quiet", "train", "--model", arg(&model), "--data", arg(&data), "--out", "run", "--limit", "32"];
    let args = [args.as_slice(), &["--batch-size", "16", "--max-steps", "30", "--learning-rate", "1e-2"]].concat();
    prefold_ok(folder.path(), &args);
    let text = std::fs::read_to_string(folder.path().join("run/metrics.jsonl")).unwrap();
    let losses: Vec<f64> =
        text.lines().filter_map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["loss"].as_f64()).collect();
    assert!(losses[29] < 0.7 * losses[0], "{} → {}", losses[0], losses[29]);

    for (dialect, precision) in [("portable", "f32"), ("portable", "f16"), ("ort", "f32"), ("ort", "f16")] {
        if dialect == "ort" && library::find(None, &prefold::files::cache_folder().unwrap()).is_err() {
            eprintln!("skipped: no ONNX Runtime here (prefold runtime install)");
            continue;
        }
        let out = format!("{dialect}-{precision}");
        let compile = ["compile", "--model", arg(&model), "--adapter", "run", "--out", &out];
        let compile = [compile.as_slice(), &["--dialect", dialect, "--precision", precision]].concat();
        let printed = prefold_ok(folder.path(), &compile);
        assert!(printed.contains("parity:"), "{printed}");
        let report = std::fs::read(folder.path().join(&out).join("parity.json")).unwrap();
        let report: serde_json::Value = serde_json::from_slice(&report).unwrap();
        assert_eq!(report["verdict"], "pass");
        assert!(!report["no_op"].as_array().unwrap().is_empty());
    }

    // without the adapter the model is another function, and verify says so
    let verify = ["verify", "--model", arg(&model), "--graph", "portable-f32", "--out", "base.json"];
    let output = prefold(folder.path(), &verify);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains("NO PARITY"));

    let before: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(before.iter().all(|name| !name.to_string_lossy().starts_with('.')), "leftovers: {before:?}");
}
