//! `examples/ci` as a service runs it: the commands of its jobs, its manifest, and the reports where the jobs look for them.
#![cfg(unix)]

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::methods::adapter;
use crate::support::{arg, fixture, prefold_ok};

fn example(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/ci").join(file);
    std::fs::read_to_string(path).unwrap()
}

/// What a job runs once prefold and a runtime are installed.
fn commands(file: &str) -> String {
    let text = example(file);
    let lines = text.lines().map(|line| line.trim().trim_start_matches("- ").trim_start_matches("run: "));
    let ours: Vec<&str> =
        lines.filter(|line| line.starts_with("mkdir ") || line.starts_with("prefold verify ")).collect();
    assert_eq!(ours.len(), 2, "{file}: {ours:?}");
    ours.join("\n")
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for file in std::fs::read_dir(from).unwrap().map(|file| file.unwrap()) {
        std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
}

/// A repository as the manifest wants it. The graph of the quantised check is one of float32: thresholds judge that too.
fn repository() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let model = at.join("models/chat");
    copy(&fixture("demo/model"), &model);
    std::fs::create_dir(at.join("adapters")).unwrap();
    adapter(&model, &json!({}), &at.join("adapters/banking"));
    std::fs::create_dir(at.join("graphs")).unwrap();
    prefold_ok(at, &["export", "--model", arg(&model), "--out", "graphs/base-f32"]);
    let args = ["fold", "--graph", "graphs/base-f32", "--adapter", "adapters/banking", "--out", "graphs/chat-f32"];
    prefold_ok(at, &args);
    copy(&at.join("graphs/chat-f32"), &at.join("graphs/chat-int4"));
    for file in ["parity.toml", "prompts.txt"] {
        std::fs::write(at.join(file), example(file)).unwrap();
    }
    folder
}

/// Runs a script with prefold on the path; its exit code.
fn shell(at: &Path, script: &str) -> i32 {
    let program = PathBuf::from(env!("CARGO_BIN_EXE_prefold"));
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let paths = std::iter::once(program.parent().unwrap().to_owned()).chain(std::env::split_paths(&paths));
    let mut command = Command::new("sh");
    command.current_dir(at).args(["-ec", script]).env("PATH", std::env::join_paths(paths).unwrap());
    let output = command.output().unwrap();
    eprintln!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    output.status.code().unwrap()
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn the_jobs_gate_on_the_verdict_and_find_their_reports() {
    let repository = repository();
    let at = repository.path();
    let swap = |from: &str, to: &str| {
        std::fs::remove_dir_all(at.join(to)).unwrap();
        copy(&at.join(from), &at.join(to));
    };
    for job in ["github.yml", "gitlab-ci.yml"] {
        let script = commands(job);
        for folder in ["reports", "parity"] {
            let _ = std::fs::remove_dir_all(at.join(folder));
        }
        assert_eq!(shell(at, &script), 0, "{job}");
        for check in ["chat-f32", "chat-int4"] {
            for extension in ["xml", "sarif", "html"] {
                assert!(at.join(format!("reports/{check}.{extension}")).is_file(), "{job}: {check}.{extension}");
            }
            assert_eq!(read(&at.join(format!("parity/{check}.json")))["verdict"], "pass");
        }
        // the adapter is forgotten
        copy(&at.join("graphs/chat-f32"), &at.join("whole"));
        swap("graphs/base-f32", "graphs/chat-f32");
        assert_eq!(shell(at, &script), 1, "{job}");
        let logs =
            ["chat-f32", "chat-int4"].map(|check| read(&at.join(format!("reports/{check}.sarif")))["runs"][0].clone());
        assert_ne!(
            logs[0]["automationDetails"]["id"], logs[1]["automationDetails"]["id"],
            "one would replace the other"
        );
        let results = logs[0]["results"].as_array().unwrap();
        let file = &results[0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"];
        assert_eq!(file, "graphs/chat-f32/model.onnx");
        assert!(logs[1]["results"].as_array().unwrap().is_empty());
        let report = read(&at.join("parity/chat-f32.json"));
        let reproducer = report["runs"][0]["departure"]["reproducer"].as_str().unwrap();
        assert!(reproducer.starts_with("parity/") && at.join(reproducer).join("model.onnx").is_file(), "{reproducer}");
        assert_eq!(shell(at, report["command"].as_str().unwrap()), 1);
        assert_eq!(read(&at.join("parity/chat-f32.json"))["finding"], report["finding"]);
        // nothing is there to be judged
        swap("whole", "graphs/chat-f32");
        std::fs::rename(at.join("graphs/chat-int4"), at.join("elsewhere")).unwrap();
        assert_eq!(shell(at, &script), 2, "{job}");
        std::fs::rename(at.join("elsewhere"), at.join("graphs/chat-int4")).unwrap();
    }
    for (job, paths) in [
        ("github.yml", ["sarif_file: reports", "parity/", "reports/"]),
        ("gitlab-ci.yml", ["junit: reports/*.xml", "parity/", "reports/"]),
    ] {
        assert!(paths.iter().all(|path| example(job).contains(path)), "{job}");
    }
}
