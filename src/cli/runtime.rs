//! `prefold runtime`

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use miette::Result;
use serde::Serialize;

use super::{Context, style};
use crate::onnx::{DataType, Dim, ModelBuilder, NodeDef, ValueDef};
use crate::runtime::{Launch, OrtOptions, ProcessSession, Provider, Setup, TRACT_VERSION, library};

/// Install or list ONNX Runtime libraries
#[derive(Args, Debug)]
pub(super) struct Runtime {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Get an onnxruntime wheel with pip and unpack its library into the cache
    Install {
        /// The version, as in 1.24.4, for `verify --ort-lib` beside others [default: the one that prefold is tested with]
        // every command has a --version
        #[arg(id = "wheel", value_name = "VERSION")]
        version: Option<String>,
        /// The wheel with CUDA, onnxruntime-gpu: a download of 300 MB
        #[arg(long)]
        cuda: bool,
    },
    /// List the libraries in the order in which they are tried with the execution providers of each, and the embedded runtime
    ///
    /// Every provider is loaded in a process of its own, which runs one node; where it cannot, the reason names what is missing.
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// A library, and what of it works.
#[derive(Debug, Serialize)]
struct Listed {
    runtime: &'static str,
    version: Option<String>,
    from: String,
    path: Option<String>,
    /// Why it cannot be used.
    problem: Option<String>,
    providers: Vec<ListedProvider>,
}

#[derive(Debug, Serialize)]
struct ListedProvider {
    provider: &'static str,
    loads: bool,
    /// Why it does not load.
    reason: Option<String>,
}

impl Runtime {
    pub(super) fn run(self, context: &Context) -> Result<ExitCode> {
        match self.action {
            Action::Install { version, cuda } => {
                println!("{}", library::install(&context.cache, cuda, version.as_deref())?.display());
            }
            Action::List { json } => {
                let listed = list(context)?;
                if json {
                    println!("{:#}", serde_json::json!(listed));
                } else {
                    print(&listed);
                }
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn list(context: &Context) -> Result<Vec<Listed>> {
    let mut all = Vec::new();
    for candidate in library::list(context.ort_lib(), &context.cache) {
        let providers = candidate.providers().into_iter().map(|provider| ask(&candidate, provider));
        let providers = providers.collect::<Result<_>>()?;
        let library::Candidate { source, path, version, problem } = candidate;
        let (from, path) = (source.to_string(), Some(path.display().to_string()));
        all.push(Listed { runtime: "onnxruntime", version, from, path, problem, providers });
    }
    let version = Some(TRACT_VERSION.into());
    let providers = vec![ListedProvider { provider: "cpu", loads: true, reason: None }];
    all.push(Listed { runtime: "tract", version, from: "embedded".into(), path: None, problem: None, providers });
    Ok(all)
}

/// Runs one node in a provider, in a process that may crash.
fn ask(candidate: &library::Candidate, provider: Provider) -> Result<ListedProvider> {
    let folder = tempfile::tempdir().map_err(crate::files::Error::io("make a folder in", &std::env::temp_dir()))?;
    let graph = folder.path().join("one-node.onnx");
    let mut builder = ModelBuilder::new("one_node", 8);
    let port = |name: &str| ValueDef::new(name, DataType::Float, [Dim::Value(1)]);
    builder.opset("", 17).input(port("x")).output(port("y"));
    builder.node(NodeDef::new("Relu", "relu").inputs(["x"]).outputs(["y"]));
    builder.build()?.save(&graph)?;
    let program = std::env::current_exe().map_err(crate::files::Error::io("find", std::path::Path::new("prefold")))?;
    let launch = Launch { program, arguments: vec![super::RUNTIME_PROCESS.into()], timeout: Duration::from_secs(60) };
    let options = OrtOptions { provider, ..OrtOptions::default() };
    let setup = Setup::Ort { library: candidate.path.clone(), options };
    let reason = ProcessSession::open(&launch, &setup, &graph, &[]).err().map(|error| {
        let text = error.to_string();
        let known = format!("ONNX Runtime cannot use the execution provider {}: ", provider.name());
        text.strip_prefix(&known).unwrap_or(&text).to_owned()
    });
    Ok(ListedProvider { provider: provider.name(), loads: reason.is_none(), reason })
}

fn print(listed: &[Listed]) {
    let mut table = style::table(&["runtime", "version", "from", "usable", "path"]);
    for one in listed {
        let usable = one.problem.as_deref().map_or("yes".to_owned(), |problem| format!("no: {problem}"));
        let version = one.version.clone().unwrap_or_else(|| "?".into());
        let path = one.path.clone().unwrap_or_default();
        table.add_row([one.runtime.to_owned(), version, one.from.clone(), usable, path]);
    }
    println!("{table}");
    let mut table = style::table(&["runtime", "version", "provider", "loads"]);
    for one in listed {
        for ListedProvider { provider, reason, .. } in &one.providers {
            let version = one.version.clone().unwrap_or_else(|| "?".into());
            let loads = reason.as_deref().map_or("yes".to_owned(), |reason| format!("no: {reason}"));
            table.add_row([one.runtime.to_owned(), version, (*provider).into(), loads]);
        }
    }
    println!("{table}");
}
