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
    /// None for a graph that is compared with that of `against` alone.
    model: Option<String>,
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
        let program = std::env::current_exe().map_err(crate::files::Error::io("find", "prefold"))?;
        let quiet = context.global.quiet;
        let done = run_all(&jobs, self.jobs.max(1), memory, &|job| {
            let done = job.run(&program);
            if !quiet {
                eprintln!("{}: {}", job.name, done.verdict.name());
            }
            done
        });
        let lost = || Done { verdict: Verdict::Unknown, text: "the check was lost".into() };
        let done: Vec<Done> = done.into_iter().map(|done| done.unwrap_or_else(lost)).collect();
        let mut table = style::table(&["check", "memory, by estimate", "verdict", "what was found"]);
        for (job, done) in jobs.iter().zip(&done) {
            let found = done.text.lines().next().unwrap_or_default();
            table.add_row([job.name.as_str(), &style::bytes(job.memory), done.verdict.name(), found]);
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
            let model = entry.model.map(|model| {
                let path = beside.join(&model);
                if path.exists() { path.to_string_lossy().into_owned() } else { model }
            });
            let out = folder.join(format!("{}.json", entry.name));
            let mut arguments = vec!["verify".to_owned(), "--quiet".into()];
            arguments.extend(["--graph".into(), graph.to_string_lossy().into_owned()]);
            arguments.extend(model.iter().flat_map(|model| ["--model".to_owned(), model.clone()]));
            arguments.extend(["--out".into(), out.to_string_lossy().into_owned()]);
            for library in &context.global.ort_libs {
                arguments.extend(["--ort-lib".into(), library.to_string_lossy().into_owned()]);
            }
            let mut options = checks.defaults.clone();
            options.extend(entry.options);
            let number = |value: &toml::Value| match value {
                toml::Value::Integer(number) => usize::try_from(*number).ok(),
                toml::Value::String(text) => text.parse().ok(),
                _ => None,
            };
            let lengths: Vec<usize> = match options.get("lengths") {
                Some(toml::Value::Array(lengths)) => lengths.iter().filter_map(number).collect(),
                Some(length) => number(length).into_iter().collect(),
                None => Vec::new(),
            };
            let steps = options.get("steps").and_then(number).unwrap_or(CaseOptions::default().steps);
            let against = options.get("against").and_then(toml::Value::as_str).map(ToOwned::to_owned);
            for (name, value) in options {
                arguments.extend(argument(&name, &value, beside)?);
            }
            let other = against.map(|other| beside.join(other));
            let graphs: Vec<&Path> = std::iter::once(graph.as_path()).chain(other.as_deref()).collect();
            let memory = estimate(context, model.as_deref(), &graphs, &lengths, steps);
            jobs.push(Job { memory, name: entry.name, arguments, out });
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

/// What two processes hold whatever they run: programs, their threads and the library of a runtime.
const PROCESSES: u64 = 160_000_000;
/// What is kept of every logit: the reference's, candle's own and a run's.
const LOGIT: u64 = 3 * 8;

/// What a check needs with its runtime's process: the model in float64 and beside it in float32, where a departure is looked for; the
/// logits of all cases; and the graph's file twice and a quarter, as it is and packed. A model that does not open needs nothing to
/// say so.
fn estimate(context: &Context, model: Option<&str>, graphs: &[&Path], lengths: &[usize], steps: usize) -> u64 {
    let files: u64 = graphs.iter().map(|graph| graph_bytes(graph)).sum();
    let Some(model) = model else {
        return PROCESSES.saturating_add(files.saturating_mul(9) / 4);
    };
    let Ok(checkpoint) = context.checkpoint(model) else { return 0 };
    let spec = checkpoint.spec();
    let elements = |shape: &[usize]| shape.iter().map(|dim| *dim as u64).product::<u64>();
    let weights: u64 = spec.weights().iter().map(|weight| elements(&weight.shape)).sum();
    let options = CaseOptions { steps, ..CaseOptions::default() };
    let prompts = generated_prompts(spec, &options);
    let cases = standard_cases(&prompts, steps).unwrap_or_default();
    let of_case = |case: &Case| case.ids().nrows().saturating_mul(case.ids().ncols().saturating_add(case.steps()));
    let positions: usize = cases.iter().map(of_case).sum::<usize>().saturating_add(lengths.iter().sum());
    let positions =
        positions.saturating_add(if lengths.is_empty() { length_unasked(spec.into()).unwrap_or(0) } else { 0 });
    let logits = (positions as u64).saturating_mul(spec.vocab_size as u64).saturating_mul(LOGIT);
    let all = [weights.saturating_mul(8 + 4), logits, files.saturating_mul(9) / 4, PROCESSES];
    all.into_iter().fold(0, u64::saturating_add)
}

/// The bytes of a graph's files.
fn graph_bytes(graph: &Path) -> u64 {
    let graph = crate::fold::graph_file(graph);
    let size = |path: &Path| std::fs::metadata(path).map_or(0, |facts| facts.len());
    let data = Graph::open(&graph).ok().and_then(|file| external_files(&file).ok()).unwrap_or_default();
    let folder = graph.parent().unwrap_or(Path::new("."));
    size(&graph) + data.iter().map(|name| size(&folder.join(name))).sum::<u64>()
}

/// Does jobs in the order given, `most` at a time, as far as their memory fits. One that needs more than there is is done alone.
fn run_all<T: Send>(jobs: &[Job], most: usize, memory: u64, run: &(dyn Fn(&Job) -> T + Sync)) -> Vec<Option<T>> {
    let (used, freed) = (Mutex::new((0usize, 0u64)), Condvar::new());
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
            let (used, freed) = (&used, &freed);
            running.push(scope.spawn(move || {
                let done = run(job);
                let mut now = used.lock().unwrap_or_else(PoisonError::into_inner);
                *now = (now.0.saturating_sub(1), now.1.saturating_sub(job.memory));
                freed.notify_all();
                done
            }));
        }
        running.into_iter().map(|thread| thread.join().ok()).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    fn job(memory: u64) -> Job {
        Job { name: String::new(), arguments: Vec::new(), memory, out: PathBuf::new() }
    }

    /// Every job waits until others run that it fits beside, or none; the bound is passed by one that is alone only.
    #[test]
    fn what_runs_together_needs_no_more_than_the_bound() {
        let jobs: Vec<Job> = [3, 5, 4, 9, 2, 2, 2, 8, 1].map(job).into();
        let running = Mutex::new(Vec::<u64>::new());
        let seen = Mutex::new(Vec::<Vec<u64>>::new());
        let run = |job: &Job| {
            let mut now = running.lock().unwrap();
            now.push(job.memory);
            seen.lock().unwrap().push(now.clone());
            drop(now);
            std::thread::sleep(Duration::from_millis(20));
            let mut now = running.lock().unwrap();
            let place = now.iter().position(|memory| *memory == job.memory).unwrap();
            now.remove(place);
            job.memory
        };
        let done = run_all(&jobs, 3, 8, &run);
        assert_eq!(done.into_iter().flatten().collect::<Vec<_>>(), [3, 5, 4, 9, 2, 2, 2, 8, 1]);
        let seen = seen.into_inner().unwrap();
        assert!(seen.iter().all(|now| now.len() == 1 || now.len() <= 3 && now.iter().sum::<u64>() <= 8), "{seen:?}");
        assert!(seen.iter().any(|now| now.len() > 1), "some fit together: {seen:?}");
    }
}
