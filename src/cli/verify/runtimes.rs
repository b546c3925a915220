//! Which runtimes a verification asks, and the processes that they run in.

use std::collections::BTreeSet;

use super::*;
use crate::runtime::NamedGiven;
use crate::runtime::{Launch, Optimization, ProcessSession, Provider, Setup};

/// An optimisation level of ONNX Runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum LevelArg {
    /// The graph as it is written.
    Off,
    /// Rewrites that keep the meaning exactly.
    Basic,
    /// Everything, fused operators included.
    All,
}

/// An execution provider of ONNX Runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum ProviderArg {
    /// The CPU.
    Cpu,
    /// CUDA.
    Cuda,
    /// TensorRT, and CUDA for what it leaves.
    Tensorrt,
}

/// A runtime that is asked, with its name in the report.
#[derive(Clone)]
pub(super) struct Chosen {
    pub(super) name: String,
    launch: Launch,
    setup: std::result::Result<Setup, Missing>,
}

/// Why there is no such runtime: an error that is made anew for each use.
#[derive(Clone)]
enum Missing {
    Library(Vec<String>),
    Provider(&'static str, Vec<String>),
    Named(PathBuf, String),
}

impl Missing {
    fn of(error: runtime::Error, named: Option<&Path>) -> Self {
        match error {
            runtime::Error::NoLibrary { tried } => Self::Library(tried),
            runtime::Error::NoProviderLibrary { provider, tried } => Self::Provider(provider, tried),
            runtime::Error::Library { path, reason } => Self::Named(path, reason),
            error => Self::Named(named.unwrap_or(Path::new("")).to_owned(), error.to_string()),
        }
    }

    fn error(&self) -> runtime::Error {
        match self.clone() {
            Self::Library(tried) => runtime::Error::NoLibrary { tried },
            Self::Provider(provider, tried) => runtime::Error::NoProviderLibrary { provider, tried },
            Self::Named(path, reason) => runtime::Error::Library { path, reason },
        }
    }
}

impl Chosen {
    /// Opens a graph in a process of its own.
    pub(super) fn open<'a>(&'a self, graph: &'a Path) -> Open<'a> {
        self.open_given(graph, &[])
    }

    /// Opens a graph in a process of its own, with inputs that are given with every run, by model.
    pub(super) fn open_given<'a>(&'a self, graph: &'a Path, given: &'a [NamedGiven]) -> Open<'a> {
        Box::new(move || {
            let fed: BTreeSet<String> = given.iter().flatten().map(|(name, _)| name.clone()).collect();
            let fed: Vec<String> = fed.into_iter().collect();
            let session = self.open_fed(graph, &fed)?;
            if fed.is_empty() { Ok(session) } else { Ok(Box::new(WithGiven::switching(session, given.to_vec())?)) }
        })
    }

    /// Opens a graph in a process of its own, of whose optional inputs these will be fed.
    pub(super) fn open_fed(&self, graph: &Path, fed: &[String]) -> runtime::Result<Box<dyn Session>> {
        match &self.setup {
            Ok(setup) => Ok(Box::new(ProcessSession::open(&self.launch, setup, graph, fed)?)),
            Err(missing) => Err(missing.error()),
        }
    }
}

/// The chosen runtimes, and after them those to ask for a second opinion: tract, and ONNX Runtime with nothing fused.
pub(super) fn with_others(context: &Context, chosen: &[Chosen]) -> Vec<Chosen> {
    let mut all = chosen.to_vec();
    let Some(first) = chosen.first() else { return all };
    let is_tract = |chosen: &Chosen| matches!(chosen.setup, Ok(Setup::Tract));
    let options = OrtOptions { optimization: Optimization::Off, ..OrtOptions::default() };
    let asked = chosen.iter().find_map(|chosen| match &chosen.setup {
        Ok(Setup::Ort { library, options }) => Some((library.clone(), options.optimization)),
        _ => None,
    });
    let unfused = match asked {
        Some((_, Optimization::Off)) => None,
        Some((library, _)) => Some(library),
        None => context.global.ort_libs.first().cloned().or_else(|| library::find(None, &context.cache).ok()),
    };
    let unfused = unfused.map(|library| Setup::Ort { library, options });
    let tract = (!chosen.iter().any(is_tract)).then_some(Setup::Tract);
    for (setup, name) in [(tract, "tract"), (unfused, "onnxruntime with nothing fused")] {
        let setup = setup.map(Ok);
        all.extend(setup.map(|setup| Chosen { name: name.into(), launch: first.launch.clone(), setup }));
    }
    all
}

/// The runtime that runs a graph as it is written, for one that is the reference: ONNX Runtime with nothing fused where it is found
/// and another is not asked for, else tract.
pub(super) fn plainest(context: &Context, options: &VerifyArgs) -> Result<Chosen> {
    let named = context.global.ort_libs.first().map(PathBuf::as_path);
    let found = library::find(named, &context.cache);
    let setup = match (options.reference_runtime, found) {
        (Some(Engine::Tract), _) | (None, Err(_)) => Ok(Setup::Tract),
        (_, found) => {
            let options = OrtOptions { optimization: Optimization::Off, ..OrtOptions::default() };
            found.map(|library| Setup::Ort { library, options }).map_err(|error| Missing::of(error, named))
        }
    };
    Ok(Chosen { name: "the reference".into(), launch: launch(options)?, setup })
}

fn launch(options: &VerifyArgs) -> Result<Launch> {
    let timeout = Duration::try_from_secs_f64(options.timeout).ok().filter(|timeout| !timeout.is_zero());
    let timeout = timeout.ok_or_else(|| usage("--timeout is no time", "give seconds, more than 0"))?;
    let program = std::env::current_exe().map_err(crate::files::Error::io("find", "prefold"))?;
    Ok(Launch { program, arguments: vec![crate::cli::RUNTIME_PROCESS.into()], timeout })
}

/// The runtimes asked for, or those that are at hand and know the graph's operators.
pub(super) fn chosen(context: &Context, graph: &Graph, options: &VerifyArgs) -> Result<Vec<Chosen>> {
    let launch = launch(options)?;
    let mut all = Vec::new();
    for engine in engines(context, graph, &options.runtime) {
        match engine {
            Engine::Tract => {
                all.push(Chosen { name: engine.name().into(), launch: launch.clone(), setup: Ok(Setup::Tract) });
            }
            Engine::Ort => {
                let providers = if options.provider.is_empty() { &[ProviderArg::Cpu][..] } else { &options.provider };
                all.extend(ort(context, options, providers, &launch));
            }
            Engine::OrtCuda => all.extend(ort(context, options, &[ProviderArg::Cuda], &launch)),
        }
    }
    Ok(all)
}

/// ONNX Runtime, once for each library, level and provider.
fn ort(context: &Context, options: &VerifyArgs, providers: &[ProviderArg], launch: &Launch) -> Vec<Chosen> {
    let named = context.global.ort_libs.iter().map(|path| Some(path.as_path()));
    let named: Vec<Option<&Path>> = if context.global.ort_libs.is_empty() { vec![None] } else { named.collect() };
    let levels = if options.ort_level.is_empty() { &[LevelArg::All][..] } else { &options.ort_level };
    let mut all = Vec::new();
    for (index, library) in named.iter().enumerate() {
        for (level, provider) in levels.iter().flat_map(|level| providers.iter().map(move |p| (*level, *p))) {
            let optimization = match level {
                LevelArg::Off => Optimization::Off,
                LevelArg::Basic => Optimization::Basic,
                LevelArg::All => Optimization::All,
            };
            let provider = match provider {
                ProviderArg::Cpu => Provider::Cpu,
                ProviderArg::Cuda => Provider::Cuda,
                ProviderArg::Tensorrt => Provider::TensorRt,
            };
            let found = library::find_with(*library, &context.cache, provider);
            let found = found.map_err(|error| Missing::of(error, *library));
            let mut name = Engine::Ort.name().to_owned();
            if named.len() > 1 {
                let version = found.as_ref().ok().and_then(|library| library::version_of(library));
                name += &format!(" {}", version.unwrap_or_else(|| format!("#{}", index.saturating_add(1))));
            }
            if levels.len() > 1 || optimization != Optimization::All {
                name += &format!(", {}", optimization.name());
            }
            if providers.len() > 1 || provider != Provider::Cpu {
                name += &format!(", {}", provider.name());
            }
            let options = OrtOptions {
                optimization,
                threads: None,
                provider,
                tf32: options.allow_tf32,
                cpu_fallback: options.allow_cpu_fallback,
                profile: true,
            };
            let setup = found.map(|library| Setup::Ort { library, options });
            all.push(Chosen { name, launch: launch.clone(), setup });
        }
    }
    unique(&mut all);
    all
}

/// Tells runs of one name apart: two libraries may be of one version.
fn unique(all: &mut [Chosen]) {
    let names: Vec<String> = all.iter().map(|chosen| chosen.name.clone()).collect();
    for (index, chosen) in all.iter_mut().enumerate() {
        let earlier = names.iter().take(index).filter(|name| **name == chosen.name).count();
        if earlier > 0 {
            chosen.name += &format!(" ({})", earlier.saturating_add(1));
        }
    }
}

fn engines(context: &Context, graph: &Graph, asked: &[Engine]) -> Vec<Engine> {
    if !asked.is_empty() {
        return asked.to_vec();
    }
    let has_ort = !context.global.ort_libs.is_empty() || library::find(None, &context.cache).is_ok();
    let is_fused = graph.opset("com.microsoft").is_some();
    match (is_fused, has_ort) {
        (true, _) => vec![Engine::Ort],
        (false, true) => vec![Engine::Tract, Engine::Ort],
        (false, false) => {
            tracing::warn!(
                "no ONNX Runtime library was found, so tract alone is asked; `prefold runtime install` gets one"
            );
            vec![Engine::Tract]
        }
    }
}
