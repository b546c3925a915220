//! Many verifications at once.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::sync::{Condvar, Mutex, PoisonError};

use serde::Deserialize;

use super::*;
use crate::cli::style;

/// What `--manifest` holds.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Checks {
    /// Options of every check, by their long names.
    #[serde(default)]
    defaults: BTreeMap<String, toml::Value>,
    /// The checks.
    check: Vec<Entry>,
}

/// One verification.
#[derive(Debug, Deserialize)]
struct Entry {
    /// Its name, and that of its files.
    name: String,
    graph: PathBuf,
    model: String,
    /// Other options of `verify`, by their long names.
    #[serde(flatten)]
    options: BTreeMap<String, toml::Value>,
}

/// Options that belong to the whole, or to the files that it writes.
const RESERVED: [&str; 7] = ["out", "manifest", "jobs", "memory", "graph", "model", "ort-lib"];

/// A check that is ready to be run.
struct Job {
    name: String,
    arguments: Vec<String>,
    /// By estimate.
    memory: u64,
    out: PathBuf,
}

struct Done {
    verdict: Verdict,
    text: String,
}

impl Verify {
    /// Runs the checks of a manifest. Reports go into the folder that `--out` names without its extension.
    pub(super) fn manifest(&self, context: &Context, path: &Path) -> Result<Verdict> {
        let folder = self.output.out.with_extension("");
        let jobs = self.jobs_of(context, path, &folder)?;
        std::fs::create_dir_all(&folder).map_err(crate::files::Error::io("create folder", &folder))?;
        let memory = output::bytes(&self.memory)?;
        let done = run_all(&jobs, self.jobs.max(1), memory, context)?;
        let mut table = style::table(&["check", "verdict", "what was found"]);
        for (job, done) in jobs.iter().zip(&done) {
            table.add_row([job.name.as_str(), done.verdict.name(), done.text.lines().next().unwrap_or_default()]);
        }
        println!("{table}");
        let passed = done.iter().filter(|done| done.verdict.passed()).count();
        println!("{passed} of {} checks passed, {}", done.len(), folder.display());
        Ok(Verdict::all(done.iter().map(|done| done.verdict)))
    }

    fn jobs_of(&self, context: &Context, path: &Path, folder: &Path) -> Result<Vec<Job>> {
        let text = String::from_utf8(crate::files::read(path)?)
            .map_err(|e| usage(format!("{} is not UTF-8: {e}", path.display()), "save it as UTF-8"))?;
        let example = "write [[check]] tables with name, graph and model, and options of `verify` by their long names";
        let checks: Checks = toml::from_str(&text)
            .map_err(|e| usage(format!("{}: {}", path.display(), e.to_string().trim()), example))?;
        // Paths in a manifest are relative to it.
        let beside = path.parent().unwrap_or(Path::new("."));
        let mut jobs: Vec<Job> = Vec::new();
        for entry in checks.check {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            if entry.name.is_empty() || entry.name.starts_with('.') || !entry.name.chars().all(plain) {
                return Err(usage(
                    format!("the check's name `{}` is no file name", entry.name),
                    "use letters, digits, - and _",
                ));
            }
            if jobs.iter().any(|job| job.name == entry.name) {
                return Err(usage(format!("two checks are named `{}`", entry.name), "name each once"));
            }
            let graph = beside.join(&entry.graph);
            let model = beside.join(&entry.model);
            let model = if model.exists() { model.to_string_lossy().into_owned() } else { entry.model };
            let out = folder.join(format!("{}.json", entry.name));
            let mut arguments = vec!["verify".to_owned(), "--quiet".into()];
            arguments.extend(["--graph".into(), graph.to_string_lossy().into_owned(), "--model".into(), model.clone()]);
            arguments.extend(["--out".into(), out.to_string_lossy().into_owned()]);
            for library in &context.global.ort_libs {
                arguments.extend(["--ort-lib".into(), library.to_string_lossy().into_owned()]);
            }
            let mut options = checks.defaults.clone();
            options.extend(entry.options);
            for (name, value) in options {
                arguments.extend(argument(&name, &value, beside)?);
            }
            jobs.push(Job { memory: estimate(context, &model, &graph), name: entry.name, arguments, out });
        }
        Ok(jobs)
    }
}

/// An option as the command line has it.
fn argument(name: &str, value: &toml::Value, beside: &Path) -> Result<Vec<String>> {
    if RESERVED.contains(&name) {
        return Err(usage(format!("`{name}` cannot be an option of a check"), "give it on the command line"));
    }
    let is_path = ["adapter", "base-graph", "against", "prompts", "baseline", "junit", "sarif", "html"].contains(&name);
    let joined = |path: &str| beside.join(path).to_string_lossy().into_owned();
    let beside_it = |name: &str, text: &str| match text.split_once('=') {
        Some((called, path)) if name == "adapter" && !beside.join(text).exists() => {
            format!("{called}={}", joined(path))
        }
        _ => joined(text),
    };
    let one = |value: &toml::Value| match value {
        toml::Value::String(text) if is_path => Ok(beside_it(name, text)),
        toml::Value::String(text) => Ok(text.clone()),
        toml::Value::Integer(number) => Ok(number.to_string()),
        toml::Value::Float(number) => Ok(number.to_string()),
        _ => Err(usage(
            format!("`{name}` has a value that is no text, number, truth or list"),
            "see `prefold verify --help`",
        )),
    };
    match value {
        toml::Value::Boolean(true) => Ok(vec![format!("--{name}")]),
        toml::Value::Boolean(false) => Ok(Vec::new()),
        toml::Value::Array(values) => values.iter().map(|value| Ok(format!("--{name}={}", one(value)?))).collect(),
        value => Ok(vec![format!("--{name}={}", one(value)?)]),
    }
}

/// What a check needs: the model in float64, and the graph twice, as its file and packed. A model that does not open needs nothing
/// to say so.
fn estimate(context: &Context, model: &str, graph: &Path) -> u64 {
    let Ok(checkpoint) = context.checkpoint(model) else { return 0 };
    let elements = |shape: &[usize]| shape.iter().map(|dim| *dim as u64).product::<u64>();
    let weights: u64 = checkpoint.spec().weights().iter().map(|weight| elements(&weight.shape)).sum();
    let graph = crate::fold::graph_file(graph);
    let size = |path: &Path| std::fs::metadata(path).map_or(0, |facts| facts.len());
    let data = Graph::open(&graph).ok().and_then(|file| external_files(&file).ok()).unwrap_or_default();
    let folder = graph.parent().unwrap_or(Path::new("."));
    let files: u64 = size(&graph) + data.iter().map(|name| size(&folder.join(name))).sum::<u64>();
    weights.saturating_mul(8).max(files.saturating_mul(2))
}

/// Runs jobs in the order given, `most` at a time, as far as their memory fits. One that needs more than there is runs alone.
fn run_all(jobs: &[Job], most: usize, memory: u64, context: &Context) -> Result<Vec<Done>> {
    let program = std::env::current_exe().map_err(crate::files::Error::io("find", "prefold"))?;
    let (used, freed) = (Mutex::new((0usize, 0u64)), Condvar::new());
    let quiet = context.global.quiet;
    std::thread::scope(|scope| {
        let mut running = Vec::new();
        for job in jobs {
            let fits = |(count, bytes): &(usize, u64)| {
                *count == 0 || *count < most && bytes.saturating_add(job.memory) <= memory
            };
            let mut now = used.lock().unwrap_or_else(PoisonError::into_inner);
            while !fits(&now) {
                now = freed.wait(now).unwrap_or_else(PoisonError::into_inner);
            }
            *now = (now.0.saturating_add(1), now.1.saturating_add(job.memory));
            drop(now);
            let (program, used, freed) = (&program, &used, &freed);
            running.push(scope.spawn(move || {
                let done = job.run(program);
                let mut now = used.lock().unwrap_or_else(PoisonError::into_inner);
                *now = (now.0.saturating_sub(1), now.1.saturating_sub(job.memory));
                freed.notify_all();
                if !quiet {
                    eprintln!("{}: {}", job.name, done.verdict.name());
                }
                done
            }));
        }
        let lost = |_| Done { verdict: Verdict::Unknown, text: "the check was lost".into() };
        Ok(running.into_iter().map(|thread| thread.join().unwrap_or_else(lost)).collect())
    })
}

impl Job {
    fn run(&self, program: &Path) -> Done {
        // A report of an earlier run must not stand for this one.
        let _ = std::fs::remove_file(&self.out);
        let output = Command::new(program).args(&self.arguments).stdin(Stdio::null()).output();
        let output = match output {
            Ok(output) => output,
            Err(error) => return Done { verdict: Verdict::Unknown, text: format!("it could not be started: {error}") },
        };
        let verdict = match output.status.code() {
            Some(0) => Verdict::Pass,
            Some(1) => Verdict::Fail,
            _ => Verdict::Unknown,
        };
        let report = std::fs::read(&self.out).ok().and_then(|bytes| serde_json::from_slice::<Report>(&bytes).ok());
        let text = match report {
            Some(report) => report.finding.text,
            None => {
                let text = String::from_utf8_lossy(&output.stderr);
                let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
                lines.join(" ")
            }
        };
        Done { verdict, text }
    }
}
