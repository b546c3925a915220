//! `prefold verify` as a release gate meets it: exit codes, runtimes that crash, reports, other exporters' graphs.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use prefold::runtime::library;
use serde_json::Value;

use crate::support::{arg, fixture, prefold, prefold_ok, shared};

/// The demo's base graph in a folder of its own.
fn exported() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    prefold_ok(folder.path(), &["export", "--model", arg(&fixture("demo/model")), "--out", "base"]);
    folder
}

/// Runs `verify` on the demo's graph with two short cases; its exit code and report.
fn verify(folder: &Path, more: &[&str]) -> (i32, Value, Output) {
    let model = fixture("demo/model");
    let args = ["verify", "--graph", "base", "--model", arg(&model), "--case", "one_token,cached_decode_left_padding"];
    let _ = std::fs::remove_file(folder.join("parity.json"));
    let output = prefold(folder, &[args.as_slice(), more].concat());
    let report = std::fs::read(folder.join("parity.json")).ok();
    let report = report.map_or(Value::Null, |bytes| serde_json::from_slice(&bytes).unwrap());
    (output.status.code().unwrap(), report, output)
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

pub fn ort_library() -> Option<PathBuf> {
    let found = library::find(None, &prefold::files::cache_folder().unwrap());
    found.inspect_err(|error| eprintln!("skipped: {error}")).ok()
}

/// A library with the name of ONNX Runtime's and a single function, which does `what`.
#[cfg(unix)]
fn faulty_library(folder: &Path, what: &str) -> PathBuf {
    let (source, library) = (folder.join("faulty.rs"), folder.join("libonnxruntime.so.1.99.0"));
    let text = format!("#[unsafe(no_mangle)] pub extern \"C\" fn OrtGetApiBase() -> *const u8 {{ {what} }}");
    std::fs::write(&source, text).unwrap();
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let args = ["--edition", "2024", "--crate-type", "cdylib", "-o", arg(&library), arg(&source)];
    assert!(Command::new(rustc).args(args).status().unwrap().success());
    library
}

#[cfg(unix)]
#[test]
fn a_runtime_that_crashes_or_hangs_is_a_failed_row() {
    let folder = exported();
    let at = folder.path();
    for (what, say) in [
        (
            "unsafe { core::ptr::write_volatile(core::ptr::null_mut::<u8>().wrapping_add(8), 1) }; core::ptr::null()",
            "SIGSEGV",
        ),
        (
            "unsafe extern \"C\" { fn raise(signal: i32) -> i32; } unsafe { raise(9) }; core::ptr::null()",
            "SIGKILL, as where memory has run out",
        ),
        ("eprintln!(\"the heap is on fire\"); std::process::abort()", "it said: the heap is on fire"),
        ("loop { std::thread::sleep(std::time::Duration::from_secs(1)) }", "did not answer for 3 s"),
    ] {
        let library = faulty_library(at, what);
        let (code, report, output) =
            verify(at, &["--runtime", "ort,tract", "--ort-lib", arg(&library), "--timeout", "3"]);
        assert_eq!(code, 1, "{}", text(&output));
        let [ort, tract] = [0, 1].map(|index| &report["runs"][index]);
        assert_eq!((&ort["name"], &ort["verdict"]), (&"onnxruntime".into(), &"fail".into()));
        assert!(ort["failure"].as_str().unwrap().contains(say), "{}", ort["failure"]);
        assert_eq!(tract["verdict"], "pass", "the others go on");
        assert_eq!(report["finding"]["kind"], "runtime_dependent");
    }
}

#[test]
fn what_could_not_be_told_has_an_exit_code_of_its_own() {
    let folder = exported();
    let at = folder.path();
    let (code, report, output) = verify(at, &["--runtime", "ort", "--ort-lib", "nowhere.so"]);
    assert_eq!((code, &report["verdict"]), (2, &"unknown".into()), "{}", text(&output));
    assert_eq!(report["finding"]["kind"], "could_not_tell");
    let (code, report, _) = verify(at, &["--graph", "nowhere"]);
    assert_eq!((code, report), (2, Value::Null), "no graph, no report");
    let (code, ..) = verify(at, &["--runtime", "tract", "--case", "no_such_case"]);
    assert_eq!(code, 2);
    if ort_library().is_some() {
        // the library of the tests is built for the CPU: a pass would be a silent fallback
        let (code, report, output) = verify(at, &["--runtime", "ort", "--provider", "cuda", "--allow-cpu-fallback"]);
        assert_eq!((code, &report["verdict"]), (2, &"unknown".into()), "{}", text(&output));
        assert!(report["runs"][0]["failure"].as_str().unwrap().contains("execution provider cuda"));
    }
}

#[test]
fn each_level_is_a_run_and_the_profile_tells_where_nodes_ran() {
    if ort_library().is_none() {
        return;
    }
    let folder = exported();
    let (code, report, output) = verify(folder.path(), &["--runtime", "ort", "--ort-level", "off,basic,all"]);
    assert_eq!(code, 0, "{}", text(&output));
    let runs = report["runs"].as_array().unwrap();
    let levels: Vec<_> = runs.iter().map(|run| run["runtime"]["optimization"].as_str().unwrap()).collect();
    assert_eq!(levels, ["off", "basic", "all"]);
    let nodes: Vec<u64> = runs.iter().map(|run| run["nodes"]["CPUExecutionProvider"].as_u64().unwrap()).collect();
    assert!(nodes[0] > nodes[2] && nodes[2] > 10, "{nodes:?}: fused operators are fewer");
}

/// The usable libraries of different versions that are found, at most three.
fn libraries() -> Vec<(String, PathBuf)> {
    let usable = library::list(None, &prefold::files::cache_folder().unwrap()).into_iter();
    let usable = usable.filter(|candidate| candidate.problem.is_none());
    let mut all: Vec<(String, PathBuf)> =
        usable.filter_map(|candidate| Some((candidate.version?, candidate.path))).collect();
    all.sort();
    all.dedup_by(|a, b| a.0 == b.0);
    all.truncate(3);
    all
}

#[test]
fn several_real_libraries_are_asked_side_by_side() {
    let libraries = libraries();
    if libraries.len() < 2 {
        eprintln!("skipped: one version of ONNX Runtime is here; `prefold runtime install 1.24.4` gets a second");
        return;
    }
    let folder = exported();
    let at = folder.path();
    let mut args = vec!["--runtime", "ort", "--ort-level", "off,all"];
    args.extend(libraries.iter().flat_map(|(_, path)| ["--ort-lib", arg(path)]));
    let (code, report, output) = verify(at, &args);
    assert_eq!(code, 0, "{}", text(&output));
    let runs = report["runs"].as_array().unwrap();
    let found: Vec<_> =
        runs.iter().map(|run| (run["name"].as_str().unwrap(), run["runtime"]["version"].as_str().unwrap())).collect();
    assert_eq!(found.len(), 2 * libraries.len());
    for ((version, _), pair) in libraries.iter().zip(found.chunks(2)) {
        let right = |(name, own): &(&str, &str)| own == version && name.contains(version.as_str());
        assert!(pair.iter().all(right), "each library is the one that ran: {found:?}");
    }
    for run in runs {
        let library = run["runtime"]["library"].as_str().unwrap();
        let (_, path) = libraries.iter().find(|(version, _)| *version == run["runtime"]["version"]).unwrap();
        assert_eq!(Path::new(library).canonicalize().unwrap(), path.canonicalize().unwrap());
        let cases = run["cases"].as_array().unwrap();
        assert!(cases.len() == 2 && cases.iter().all(|case| case["verdict"] == "pass"), "{run:#}");
    }
}

#[test]
fn reports_are_what_their_schema_says_and_a_worse_figure_fails() {
    let folder = exported();
    let at = folder.path();
    let all =
        ["--runtime", "tract", "--junit", "junit.xml", "--sarif", "p.sarif", "--html", "p.html", "--against", "base"];
    let (code, report, output) = verify(at, &all);
    assert_eq!(code, 0, "{}", text(&output));
    assert!(text(&output).contains("tolerance that would just pass"));
    let (_, schema) = prefold::cli::schemas().into_iter().find(|(name, _)| name.starts_with("parity")).unwrap();
    let validator = jsonschema::validator_for(schema.as_value()).unwrap();
    assert!(
        validator.is_valid(&report),
        "{:?}",
        validator.iter_errors(&report).map(|e| e.to_string()).collect::<Vec<_>>()
    );
    let case = &report["against"][0]["cases"][1];
    assert_eq!(case["figures"]["max_abs"], 0.0, "the graph is itself");
    assert!(
        case["tensors"].as_array().unwrap().iter().all(|tensor| tensor["max_abs"] == 0.0 && tensor["cosine"] == 1.0)
    );
    assert!(std::fs::read_to_string(at.join("junit.xml")).unwrap().contains("failures=\"0\""));
    let sarif: Value = serde_json::from_slice(&std::fs::read(at.join("p.sarif")).unwrap()).unwrap();
    assert!(sarif["runs"][0]["results"].as_array().unwrap().is_empty());
    assert!(std::fs::read_to_string(at.join("p.html")).unwrap().contains("Parity: pass"));

    std::fs::rename(at.join("parity.json"), at.join("before.json")).unwrap();
    let (code, ..) = verify(at, &["--runtime", "tract", "--baseline", "before.json"]);
    assert_eq!(code, 0, "as good as before");
    let mut better = report;
    better["runs"][0]["cases"][0]["figures"]["kl_mean"] = (-1.0).into();
    better["runs"][0]["cases"][0]["figures"]["max_abs"] = 0.0.into();
    better["runs"][0]["cases"][0]["allowed"] = 0.0.into();
    std::fs::write(at.join("before.json"), better.to_string()).unwrap();
    let (code, report, output) = verify(at, &["--runtime", "tract", "--baseline", "before.json"]);
    assert_eq!((code, &report["finding"]["kind"]), (1, &"regression".into()));
    assert!(text(&output).contains("checks passed, 1 figure is worse than before"), "{}", text(&output));
    assert_eq!(report["regressions"][0]["figure"], "max_abs");
}

/// A path that is no text cannot stand in a report, and is no reason to end without one. It reaches the runtime, of which tract takes
/// no weights from such a folder.
#[cfg(target_os = "linux")]
#[test]
fn a_path_that_is_no_text_ends_in_a_report() {
    let folder = exported();
    let at = folder.path();
    let graph: &std::ffi::OsStr = std::os::unix::ffi::OsStrExt::from_bytes(b"gr\xffph");
    std::fs::rename(at.join("base"), at.join(graph)).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_prefold"));
    command.current_dir(at).arg("verify").arg("--graph").arg(graph).args(["--model", arg(&fixture("demo/model"))]);
    let output = command.args(["--runtime", "tract", "--case", "one_token"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("the folder's name is not UTF-8"), "{}", text(&output));
    assert!(at.join("parity.json").exists());
}

/// The second run reads what the first one kept, and says the same.
#[test]
fn the_reference_is_computed_once() {
    let folder = exported();
    let at = folder.path();
    let model = fixture("demo/model");
    let run = |more: &[&str]| {
        let args = ["verify", "--graph", "base", "--model", arg(&model), "--runtime", "tract", "--case", "one_token"];
        let mut command = Command::new(env!("CARGO_BIN_EXE_prefold"));
        command.current_dir(at).args(args).args(more).env("PREFOLD_CACHE", at.join("cache"));
        assert!(command.output().unwrap().status.success());
        serde_json::from_slice::<Value>(&std::fs::read(at.join("parity.json")).unwrap()).unwrap()
    };
    run(&["--no-cache"]);
    assert!(!at.join("cache/references").exists());
    let first = run(&[]);
    let kept: Vec<_> = std::fs::read_dir(at.join("cache/references")).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(kept.len(), 1);
    let second = run(&[]);
    assert_eq!((&first["cases"], &first["runs"]), (&second["cases"], &second["runs"]));
    // a number that no computation gives: it can only come from the kept file
    let mut values = prefold::runtime::NamedValues::load(&kept[0]).unwrap();
    for name in ["0.reference", "0.own"] {
        let mut logits = values.take(name).unwrap().into_f64().unwrap();
        logits[[0, 0]] = 1234.5;
        values.insert(name, logits);
    }
    values.save(&kept[0]).unwrap();
    let args = ["verify", "--graph", "base", "--model", arg(&model), "--runtime", "tract", "--case", "one_token"];
    let mut command = Command::new(env!("CARGO_BIN_EXE_prefold"));
    let output = command.current_dir(at).args(args).env("PREFOLD_CACHE", at.join("cache")).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("1234.5"), "{}", text(&output));
}

#[test]
fn a_manifest_runs_its_checks_and_its_worst_verdict_counts() {
    let folder = exported();
    let at = folder.path();
    let model = fixture("demo/model");
    let check = |name: &str, graph: &str, more: &str| {
        format!("[[check]]\nname = \"{name}\"\ngraph = \"{graph}\"\nmodel = {:?}\n{more}\n", arg(&model))
    };
    let defaults = "[defaults]\nruntime = \"tract\"\ncase = [\"one_token\", \"single_row\"]\nsteps = 2\n";
    let write =
        |checks: &[String]| std::fs::write(at.join("parity.toml"), defaults.to_owned() + &checks.concat()).unwrap();
    let run = || prefold(at, &["verify", "--manifest", "parity.toml", "--out", "reports.json", "--memory", "1GB"]);
    write(&[check("a", "base", ""), check("b", "base", "seed = 3\nno-cache = true")]);
    let output = run();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert!(text(&output).contains("2 of 2 checks passed"));
    let report: Value = serde_json::from_slice(&std::fs::read(at.join("reports/b.json")).unwrap()).unwrap();
    assert_eq!(report["cases"].as_array().unwrap().len(), 2);
    write(&[check("a", "base", ""), check("absent", "nowhere", "")]);
    let output = run();
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("there is no graph"));
    for (bad, say) in [
        (check("a/b", "base", ""), "is no file name"),
        (check("a", "base", "out = \"x\""), "cannot be an option of a check"),
        (check("a", "base", "seed = {}"), "no text, number"),
    ] {
        write(&[bad]);
        let output = run();
        assert!(output.status.code() == Some(2) && text(&output).contains(say), "{}", text(&output));
    }
}

/// Proportional set sizes of a process's descendants together, in bytes.
#[cfg(target_os = "linux")]
fn memory_of_children(root: u32) -> u64 {
    let text = |path: String| std::fs::read_to_string(path).unwrap_or_default();
    let all: Vec<u32> = std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    let parent = |id: &u32| -> Option<u32> {
        text(format!("/proc/{id}/stat")).rsplit(')').next()?.split(' ').nth(2)?.parse().ok()
    };
    let parents: Vec<(u32, u32)> = all.iter().filter_map(|id| Some((*id, parent(id)?))).collect();
    let mut tree = vec![root];
    let mut at = 0;
    while let Some(id) = tree.get(at).copied() {
        tree.extend(parents.iter().filter(|(_, parent)| *parent == id).map(|(child, _)| *child));
        at += 1;
    }
    let size = |id: &u32| -> Option<u64> {
        let sizes = text(format!("/proc/{id}/smaps_rollup"));
        let line = sizes.lines().find_map(|line| line.strip_prefix("Pss:"))?;
        line.trim().strip_suffix("kB")?.trim().parse().ok()
    };
    tree.iter().skip(1).filter_map(size).sum::<u64>() * 1024
}

/// What checks need is estimated before they run; what they use is no more than the bound that they were let run by.
#[cfg(target_os = "linux")]
#[test]
fn the_processes_of_a_manifest_stay_within_its_bound() {
    const BOUND: u64 = 350_000_000;
    let folder = exported();
    let at = folder.path();
    let model = fixture("demo/model");
    let check = |name: &str| {
        format!("[[check]]\nname = \"{name}\"\ngraph = \"base\"\nmodel = {:?}\nno-cache = true\n", arg(&model))
    };
    std::fs::write(at.join("parity.toml"), ["a", "b", "c", "d"].map(check).concat()).unwrap();
    let args = ["verify", "--manifest", "parity.toml", "--out", "reports.json", "--jobs", "4"];
    let mut running = Command::new(env!("CARGO_BIN_EXE_prefold"))
        .current_dir(at)
        .args(args)
        .args(["--memory", &BOUND.to_string()])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut peak = 0;
    let status = loop {
        peak = peak.max(memory_of_children(running.id()));
        if let Some(status) = running.try_wait().unwrap() {
            break status;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    };
    eprintln!("at most {} MB of {} MB", peak / 1_000_000, BOUND / 1_000_000);
    assert!(status.success() && peak > 0 && peak <= BOUND, "{status}: {peak} of {BOUND}");
}

/// Graphs of other exporters and what they are: against float64 candle, which is PyTorch's to 1e-6 on these checkpoints.
#[test]
fn other_exporters_graphs_are_named_for_what_they_are() {
    if ort_library().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let cases = ["--case", "single_row,cached_decode"];
    let lax = [&["--max-kl", "10", "--min-top1", "0", "--max-ppl-diff", "100"][..], &cases].concat();
    for (graph, family, more, code, kind) in [
        ("optimum_with_past/llama_gqa", "llama_gqa", vec![], 0, "parity"),
        ("torch_dynamo23/gpt2", "gpt2", vec![], 0, "parity"),
        ("optimum_merged/llama_gqa/decoder_model_merged.onnx", "llama_gqa", vec![], 0, "parity"),
        // GroupQueryAttention takes rows that end in padding, and counts positions from the row's first column
        ("genai_fp32/llama_gqa", "llama_gqa", vec![], 1, "padding_only"),
        ("genai_fp32/llama_gqa", "llama_gqa", cases.to_vec(), 0, "parity"),
        // another checkpoint of the same shapes is no faithful base graph
        ("optimum_with_past/mistral", "qwen2", vec![], 1, "unfaithful_base"),
        // quantised: without thresholds nobody knows, with them it is what they say
        ("genai_int4/llama_gqa", "llama_gqa", cases.to_vec(), 2, "could_not_tell"),
        ("genai_int4/llama_gqa", "llama_gqa", lax, 0, "parity"),
        ("genai_int4/llama_gqa", "llama_gqa", [&["--max-kl", "1e-6"][..], &cases].concat(), 1, "unfaithful_base"),
    ] {
        let (Some(graph), Some(model)) = (shared(&format!("graphs/{graph}")), shared(&format!("oracles/{family}")))
        else {
            return;
        };
        let args = ["verify", "--graph", arg(&graph), "--model", arg(&model), "--runtime", "ort"];
        let output = prefold(folder.path(), &[args.as_slice(), &more].concat());
        let report: Value = serde_json::from_slice(&std::fs::read(folder.path().join("parity.json")).unwrap()).unwrap();
        assert_eq!(report["finding"]["kind"], kind, "{}: {}", graph.display(), text(&output));
        assert_eq!(output.status.code(), Some(code), "{}", graph.display());
    }
}
