//! Every graph of other exporters at hand, as `prefold verify` judges it: the base graph, and the same with an adapter folded in.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use serde_json::Value;

use crate::foreign::graphs;
use crate::support::{arg, prefold};
use crate::verify::ort_library;

/// The verdict and the finding in a cell of the table.
fn cell(folder: &Path, name: &str, args: &[&str]) -> String {
    let out = format!("{name}.json");
    let output = prefold(folder, &[args, &["--runtime", "ort", "--out", &out]].concat());
    let Ok(report) = std::fs::read(folder.join(out)) else {
        return format!("none: {}", String::from_utf8_lossy(&output.stderr));
    };
    let report: Value = serde_json::from_slice(&report).unwrap();
    let expected = match report["verdict"].as_str().unwrap() {
        "pass" => 0,
        "fail" => 1,
        _ => 2,
    };
    assert_eq!(output.status.code(), Some(expected), "{name}");
    let kind = report["finding"]["kind"].as_str().unwrap();
    let text = report["finding"]["text"].as_str().unwrap();
    let side = if text.contains("padding on the left") { " on the left" } else { "" };
    let cause = report["finding"]["cause"].as_str().map(|cause| format!(" ({cause})")).unwrap_or_default();
    format!("{kind}{side}{cause}")
}

fn line(folder: &Path, number: usize, name: &str, file: &Path, oracle: &Path) -> String {
    let adapter = oracle.join("adapter.safetensors");
    let model = ["--model", arg(oracle)];
    let thresholds = ["--max-kl", "0.2", "--min-top1", "0", "--max-ppl-diff", "1"];
    let more = if name.starts_with("genai_int4") { &thresholds[..] } else { &[] };
    let base = cell(folder, &format!("{number}-base"), &[&["verify", "--graph", arg(file)], &model[..], more].concat());
    let out = format!("{number}-fold");
    let folded = prefold(folder, &["fold", "--graph", arg(file), "--adapter", arg(&adapter), "--out", &out]);
    assert!(folded.status.success(), "{name}: {}", String::from_utf8_lossy(&folded.stderr));
    let args = ["verify", "--graph", &out, "--base-graph", arg(file), "--adapter", arg(&adapter)];
    let adapted = cell(folder, &format!("{number}-folded"), &[&args[..], &model, more].concat());
    format!("{name} | {base} | {adapted}")
}

#[test]
fn every_graph_is_named_for_what_it_is() {
    if ort_library().is_none() {
        return;
    }
    let mut all: Vec<(String, PathBuf, PathBuf)> = graphs();
    if all.is_empty() {
        eprintln!("skipped: no ../shared/graphs");
        return;
    }
    all.sort();
    let scratch = tempfile::tempdir().unwrap();
    let (todo, lines) = (Mutex::new(all.iter().enumerate()), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let Some((number, (name, file, oracle))) = todo.lock().unwrap().next() else { return };
                    let line = line(scratch.path(), number, name, file, oracle);
                    lines.lock().unwrap().push((number, line));
                }
            });
        }
    });
    let mut lines = lines.into_inner().unwrap();
    lines.sort();
    let table: Vec<String> = lines.into_iter().map(|(_, line)| line).collect();
    insta::assert_snapshot!(format!("graph | base graph | with an adapter\n{}", table.join("\n")));
}
