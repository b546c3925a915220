//! The ONNX Runtime shared library: finding it, installing it, loading it once.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use ort::environment::{Environment, EnvironmentBuilder, GlobalThreadPoolOptions};

use super::{Error, Provider, Result};
use crate::files::{self, Member, Wheel};

/// The version that [`install`] gets.
pub const PINNED_VERSION: &str = "1.31.1";

/// The oldest minor version of ONNX Runtime 1 that offers the API that `ort` is built for.
const OLDEST_MINOR: u32 = ort::MINOR_VERSION;

/// The environment variable that names the library.
const PATH_VARIABLE: &str = "ORT_DYLIB_PATH";

/// Asks Python where a package lies without importing it. The current folder is left out of the search: a folder that
/// happens to be named like the package must not be loaded from.
const FIND_PACKAGE: &str = "import sys; sys.path = [p for p in sys.path if p]\n\
     import importlib.util as u; s = u.find_spec('onnxruntime')\n\
     print('\\n'.join(s.submodule_search_locations or []) if s else '')";

/// Where a library was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Named on the command line.
    Argument,
    /// Named by `ORT_DYLIB_PATH`.
    Environment,
    /// Installed by prefold.
    Cache,
    /// Part of an installed Python package.
    Python,
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Argument => "--ort-lib",
            Self::Environment => PATH_VARIABLE,
            Self::Cache => "prefold's cache",
            Self::Python => "Python package",
        })
    }
}

/// A place where the library is, or was expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Who named the place.
    pub source: Source,
    /// The library, or the place where none is.
    pub path: PathBuf,
    /// The version, where the file or folder names say it.
    pub version: Option<String>,
    /// Why it cannot be used; none when it can, as far as names tell.
    pub problem: Option<String>,
}

impl Candidate {
    /// The execution providers whose libraries stand beside this one; the CPU is in it.
    pub fn providers(&self) -> Vec<Provider> {
        match &self.problem {
            None => providers(&self.path),
            Some(_) => Vec::new(),
        }
    }

    fn at(source: Source, path: PathBuf) -> Self {
        let library = if path.is_dir() { library_in(&path) } else { path.is_file().then(|| path.clone()) };
        let Some(library) = library else {
            return Self { source, path, version: None, problem: Some("there is no ONNX Runtime library".into()) };
        };
        let version = version_of(&library);
        let problem = version.as_deref().and_then(too_old);
        Self { source, path: library, version, problem }
    }

    fn is_demanded(&self) -> bool {
        matches!(self.source, Source::Argument | Source::Environment)
    }
}

/// Every place where the library may be, in the order of preference: `argument` (`--ort-lib`), `ORT_DYLIB_PATH`, prefold's
/// cache (newest first), the `onnxruntime` package of `python3`.
pub fn list(argument: Option<&Path>, cache: &Path) -> Vec<Candidate> {
    let variable = std::env::var_os(PATH_VARIABLE).filter(|value| !value.is_empty());
    list_with(argument, variable.map(PathBuf::from), cache, python_packages)
}

fn list_with(
    argument: Option<&Path>,
    variable: Option<PathBuf>,
    cache: &Path,
    packages: impl FnOnce() -> Vec<PathBuf>,
) -> Vec<Candidate> {
    let argument = argument.map(|path| Candidate::at(Source::Argument, path.into()));
    let variable = variable.map(|path| Candidate::at(Source::Environment, path));
    let cached = cached_folders(cache).into_iter().map(|folder| Candidate::at(Source::Cache, folder));
    let packages = packages().into_iter().map(|folder| Candidate::at(Source::Python, folder.join("capi")));
    argument.into_iter().chain(variable).chain(cached).chain(packages).collect()
}

/// The library to use: the first usable one of [`list`]. One that was named by argument or variable is used or refused;
/// the search does not go on past it.
///
/// # Errors
/// When none is usable, with every place that was tried.
pub fn find(argument: Option<&Path>, cache: &Path) -> Result<PathBuf> {
    choose(list(argument, cache))
}

fn choose(candidates: Vec<Candidate>) -> Result<PathBuf> {
    let mut tried = Vec::new();
    for candidate in candidates {
        let demanded = candidate.is_demanded();
        let Candidate { source, path, problem, .. } = candidate;
        match problem {
            None => return Ok(path),
            Some(reason) if demanded => {
                return Err(Error::Library { path, reason: format!("{reason} (named by {source})") });
            }
            Some(reason) => tried.push(format!("{source}: {}: {reason}", path.display())),
        }
    }
    Err(Error::NoLibrary { tried })
}

/// The library to use for an execution provider: as [`find`], but among those that have it. For the CPU one without others
/// comes first.
///
/// # Errors
/// When none is usable, with every place that was tried.
pub fn find_with(argument: Option<&Path>, cache: &Path, provider: Provider) -> Result<PathBuf> {
    if provider == Provider::Cpu {
        return find(argument, cache);
    }
    let lacks = |mut candidate: Candidate| {
        if candidate.problem.is_none() && !candidate.providers().contains(&provider) {
            let file = file_of(provider).unwrap_or_default();
            candidate.problem = Some(format!("there is no {file} beside it"));
        }
        candidate
    };
    choose(list(argument, cache).into_iter().map(lacks).collect()).map_err(|error| match error {
        Error::NoLibrary { tried } => Error::NoProviderLibrary { provider: provider.name(), tried },
        other => other,
    })
}

/// The provider's own library, beside the main one.
fn file_of(provider: Provider) -> Option<String> {
    let name = match provider {
        Provider::Cpu => return None,
        Provider::Cuda => "onnxruntime_providers_cuda",
        Provider::TensorRt => "onnxruntime_providers_tensorrt",
    };
    let (prefix, suffix) = (std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    Some(format!("{prefix}{name}{suffix}"))
}

/// Where a provider's own library is; none of the CPU, and where it is not.
pub(super) fn provider_library(library: &Path, provider: Provider) -> Option<PathBuf> {
    let real = library.canonicalize().ok()?;
    Some(real.parent()?.join(file_of(provider)?)).filter(|path| path.is_file())
}

/// The execution providers whose libraries stand beside a main one; the CPU is in it.
pub fn providers(library: &Path) -> Vec<Provider> {
    let beside = [Provider::Cuda, Provider::TensorRt].into_iter();
    let beside = beside.filter(|provider| provider_library(library, *provider).is_some());
    std::iter::once(Provider::Cpu).chain(beside).collect()
}

/// Packages that hold ONNX Runtime, and the cache's folders of them.
const PACKAGES: [&str; 2] = ["onnxruntime", "onnxruntime-gpu"];

/// Gets a wheel with pip, the pinned one or that of `version`, `onnxruntime-gpu` with `cuda`, and unpacks its libraries into
/// `<cache>/<package>/<version>`. When they are there already nothing is done.
///
/// # Errors
/// When the version is none, or too old; when Python, pip or the package index cannot be had, there is no such wheel for this platform, or the wheel's content is
/// not what its record says.
pub fn install(cache: &Path, cuda: bool, version: Option<&str>) -> Result<PathBuf> {
    let package = PACKAGES[usize::from(cuda)];
    let version = version.unwrap_or(PINNED_VERSION);
    let target = cache.join(package).join(version);
    let plain = version.chars().all(|c| c.is_ascii_alphanumeric() || c == '.');
    let problem = if plain && minor(version).is_some() { too_old(version) } else { Some("it is no version".into()) };
    if let Some(reason) = problem {
        return Err(Error::Library { path: target, reason });
    }
    if let Some(library) = library_in(&target) {
        return Ok(library);
    }
    let requirement = format!("{package}=={version}");
    // The library inside does not depend on Python's version; an interpreter that is too old or too new for the package
    // can still download the wheel of another one.
    let mut wheel = match Wheel::download(&requirement, &[], cache) {
        Err(files::Error::NoWheel { .. }) => Wheel::download(&requirement, &["--python-version", "3.12"], cache)?,
        result => result?,
    };
    let members: Vec<Member> = wheel.members().into_iter().filter(|path| is_library_member(path)).map(member).collect();
    wheel.unpack(&members, &target)?;
    library_in(&target).ok_or_else(|| Error::Library {
        path: target,
        reason: format!("the wheel of {requirement} holds no library for this platform"),
    })
}

fn member(path: String) -> Member {
    Member { path, sha256: None }
}

fn is_library_member(path: &str) -> bool {
    let Some(name) = path.strip_prefix("onnxruntime/capi/") else { return false };
    let is_library = name.contains(".so") || name.ends_with(".dylib") || name.ends_with(".dll");
    is_library
        && (name.starts_with("libonnxruntime") || name.starts_with("onnxruntime"))
        && !name.starts_with("onnxruntime_pybind")
}

/// The environment of the library at `path`, which is loaded on the first call.
///
/// # Errors
/// When it cannot be loaded, is too old, or another one is loaded already.
pub(super) fn load(path: &Path) -> Result<Environment> {
    load_with(path, Ok)
}

/// Loads the library at `path` with one pool of threads for all sessions of this process, none for one thread per core. Each
/// session's own threads would spin for a while after a run, in the way of another session's: who measures sessions in turn
/// wants them to share. Where the library is loaded already nothing changes.
///
/// # Errors
/// When it cannot be loaded, is too old, or another one is loaded already.
pub fn share_threads(path: &Path, threads: Option<usize>) -> Result<()> {
    let shared = |builder: EnvironmentBuilder| {
        let pool = GlobalThreadPoolOptions::default().with_intra_threads(threads.unwrap_or(0))?;
        Ok(builder.with_global_thread_pool(pool.with_inter_threads(1)?))
    };
    load_with(path, shared).map(|_| ())
}

fn load_with(
    path: &Path,
    configure: impl FnOnce(EnvironmentBuilder) -> ort::Result<EnvironmentBuilder>,
) -> Result<Environment> {
    static LOADED: Mutex<Option<(PathBuf, Environment)>> = Mutex::new(None);

    let asked = path.canonicalize().map_err(files::Error::io("open", path))?;
    let mut loaded = LOADED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some((loaded, environment)) = loaded.as_ref() {
        if *loaded != asked {
            return Err(Error::LibraryLoaded { loaded: loaded.clone(), asked });
        }
        return Ok(environment.clone());
    }
    let refused = |reason: String| Error::Library { path: asked.clone(), reason };
    if let Some(reason) = version_of(&asked).as_deref().and_then(too_old) {
        return Err(refused(reason));
    }
    let builder = ort::init_from(&asked).map_err(|error| refused(error.to_string()))?;
    let builder = configure(builder.with_name("prefold").with_telemetry(false));
    let environment = builder.and_then(EnvironmentBuilder::build).map_err(|error| refused(error.to_string()))?;
    *loaded = Some((asked, environment.clone()));
    Ok(environment)
}

/// The version that a library's own name or prefold's cache folder states.
pub fn version_of(library: &Path) -> Option<String> {
    let real = library.canonicalize().unwrap_or_else(|_| library.into());
    let name = real.file_name()?.to_str()?;
    let named = name.trim_start_matches("libonnxruntime").trim_start_matches(".so").trim_end_matches(".dylib");
    let folder = real.parent().and_then(Path::file_name).and_then(|folder| folder.to_str());
    let versions = [Some(named.trim_matches('.')), folder];
    versions.into_iter().flatten().find(|text| minor(text).is_some()).map(Into::into)
}

/// The minor version of `1.MINOR.PATCH`, if the text is a version with at least two numbers.
fn minor(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split('.');
    let major = parts.next()?.parse().ok()?;
    Some((major, parts.next()?.parse().ok()?))
}

fn too_old(version: &str) -> Option<String> {
    let old = minor(version).is_some_and(|version| version < (1, OLDEST_MINOR));
    old.then(|| format!("it is version {version}, older than 1.{OLDEST_MINOR}"))
}

/// The main library of a folder; provider libraries beside it do not count.
fn library_in(folder: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(folder).ok()?;
    let mut libraries: Vec<PathBuf> = entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(is_main_library))
        .collect();
    libraries.sort();
    libraries.pop()
}

fn is_main_library(name: &str) -> bool {
    let unix =
        name.strip_prefix("libonnxruntime.").is_some_and(|rest| rest.starts_with("so") || rest.ends_with("dylib"));
    unix || name == "onnxruntime.dll"
}

/// The cache's version folders, newest first, those with CUDA last.
fn cached_folders(cache: &Path) -> Vec<PathBuf> {
    let of = |package: &&str| {
        let entries = std::fs::read_dir(cache.join(package)).into_iter().flatten();
        let mut folders: Vec<PathBuf> = entries.filter_map(|entry| entry.ok().map(|entry| entry.path())).collect();
        folders.retain(|folder| folder.is_dir());
        folders.sort_by_key(|folder| std::cmp::Reverse(folder.file_name().and_then(|name| minor(name.to_str()?))));
        folders
    };
    PACKAGES.iter().flat_map(of).collect()
}

fn python_packages() -> Vec<PathBuf> {
    // No Python is not an error here: it is one place less where the library may be.
    let Ok(output) = files::run_python(["-c".as_ref(), FIND_PACKAGE.as_ref()]) else { return Vec::new() };
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().filter(|line| !line.is_empty()).map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(folder: &Path, name: &str) -> PathBuf {
        std::fs::create_dir_all(folder).unwrap();
        let path = folder.join(name);
        std::fs::write(&path, "").unwrap();
        path
    }

    #[test]
    fn libraries_are_known_by_their_names_on_every_platform() {
        let version = |path: &str| version_of(Path::new(path));
        assert_eq!(version("/x/libonnxruntime.so.1.31.1").as_deref(), Some("1.31.1"));
        assert_eq!(version("/x/libonnxruntime.1.24.4.dylib").as_deref(), Some("1.24.4"));
        assert_eq!(version("/cache/onnxruntime/1.31.1/onnxruntime.dll").as_deref(), Some("1.31.1"));
        assert_eq!(version("/usr/lib/libonnxruntime.so"), None);
        assert!(is_main_library("libonnxruntime.so") && is_main_library("onnxruntime.dll"));
        assert!(!is_main_library("libonnxruntime_providers_shared.so"));
        assert!(is_library_member("onnxruntime/capi/libonnxruntime_providers_shared.so"));
        assert!(is_library_member("onnxruntime/capi/onnxruntime.dll"));
        assert!(!is_library_member("onnxruntime/capi/onnxruntime_pybind11_state.so"));
        assert!(!is_library_member("onnxruntime/capi/_pybind_state.py"));
    }

    #[test]
    fn places_are_tried_in_order() {
        let root = tempfile::tempdir().unwrap();
        let cache = root.path().join("cache");
        let old = place(&cache.join("onnxruntime/1.9.0"), "libonnxruntime.so.1.9.0");
        let new = place(&cache.join("onnxruntime/1.31.1"), "libonnxruntime.so.1.31.1");
        let package = root.path().join("site/onnxruntime");
        let packaged = place(&package.join("capi"), "libonnxruntime.so.1.24.4");
        let named = place(root.path(), "libonnxruntime.so.1.32.0");
        let all = |argument: Option<&Path>| list_with(argument, None, &cache, || vec![package.clone()]);

        let found = all(None);
        let paths: Vec<&Path> = found.iter().map(|candidate| candidate.path.as_path()).collect();
        assert_eq!(paths, [&*new, &*old, &*packaged]);
        assert!(found[1].problem.as_deref().unwrap().contains("older than 1.24"));
        assert_eq!(choose(found).unwrap(), new);
        assert_eq!(choose(all(Some(&named))).unwrap(), named);
        assert_eq!(choose(all(Some(root.path()))).unwrap(), named, "a folder stands for the library in it");

        let refused = choose(all(Some(&old))).unwrap_err();
        assert!(matches!(refused, Error::Library { .. }), "a named library is not passed over");
        assert!(refused.to_string().contains("--ort-lib"));
        std::fs::remove_dir_all(&cache).unwrap();
        assert_eq!(choose(all(None)).unwrap(), packaged);
        let nothing = choose(list_with(None, None, &cache, Vec::new)).unwrap_err();
        assert!(matches!(nothing, Error::NoLibrary { .. }));
        let absent = choose(list_with(None, Some(root.path().join("no.so")), &cache, Vec::new)).unwrap_err();
        assert!(absent.to_string().contains(PATH_VARIABLE), "{absent}");
    }

    #[test]
    fn a_provider_is_looked_for_beside_the_library() {
        let root = tempfile::tempdir().unwrap();
        let cache = root.path().join("cache");
        place(&cache.join("onnxruntime/1.31.1"), "libonnxruntime.so.1.31.1");
        let refused = find_with(None, &cache, Provider::TensorRt).unwrap_err();
        assert!(refused.is_unavailable());
        let with_cuda = place(&cache.join("onnxruntime-gpu/1.30.0"), "libonnxruntime.so.1.30.0");
        place(&cache.join("onnxruntime-gpu/1.30.0"), &file_of(Provider::Cuda).unwrap());
        let listed = list_with(None, None, &cache, Vec::new);
        let had: Vec<Vec<Provider>> = listed.iter().map(Candidate::providers).collect();
        assert_eq!(had, [vec![Provider::Cpu], vec![Provider::Cpu, Provider::Cuda]]);
        assert_eq!(providers(&with_cuda), [Provider::Cpu, Provider::Cuda]);
        let argument = cache.join("onnxruntime/1.31.1");
        let refused = find_with(Some(&argument), &cache, Provider::Cuda).unwrap_err();
        assert!(refused.to_string().contains("providers_cuda"), "{refused}");
    }

    #[test]
    fn a_file_that_is_no_library_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let fake = place(root.path(), "libonnxruntime.so.1.31.1");
        assert!(matches!(load(&fake), Err(Error::Library { .. } | Error::LibraryLoaded { .. })));
        assert!(matches!(load(&root.path().join("absent")), Err(Error::Files(_))));
    }

    #[test]
    fn what_is_no_version_or_too_old_is_not_downloaded() {
        for (version, say) in
            [("../1.24.4", "it is no version"), ("latest", "it is no version"), ("1.2.0", "older than")]
        {
            let error = install(Path::new("nowhere"), false, Some(version)).unwrap_err().to_string();
            assert!(error.contains(say), "{version}: {error}");
        }
    }

    /// Fills the cache that the other tests look into; run it once with `cargo test -- --ignored` where pip works.
    #[test]
    #[ignore = "downloads the onnxruntime wheel with pip"]
    fn installs_the_pinned_library() {
        let cache = files::cache_folder().unwrap();
        let path = install(&cache, false, None).unwrap();
        assert_eq!(version_of(&path).as_deref(), Some(PINNED_VERSION));
        assert_eq!(install(&cache, false, None).unwrap(), path, "a second time finds it there");
        assert_eq!(load(&path).map(|_| ()).map_err(|error| error.to_string()), Ok(()));
        let candidates = list(None, &cache);
        assert!(candidates.iter().any(|candidate| candidate.source == Source::Cache && candidate.path == path));
    }
}
