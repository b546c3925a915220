//! An adapter into a graph: find the attention sites ([`locate`]), write the adapter's term at each ([`emit`]).
//!
//! ```text
//!            query ── φ ── MatMul M ──┐
//!                                     ▼
//! q, k, v ── softmax attention ───── Add ── o_proj
//! ```
//!
//! The graph is edited as a file: nodes and constants are added, the reader of each attention output reads the sum instead,
//! and every other byte stays as it is. Weights are linked or copied as files and never read. Knows no training.

pub mod emit;
mod error;
pub mod locate;

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use error::{Error, Result};
pub use locate::{Exactness, Layout, Site};

use crate::adapter::{Adapter, CONFIG_NAME, WEIGHTS_NAME, peft};
use crate::base::family;
use crate::files::{self, Manifest};
use crate::onnx::{MODEL_NAME, Model, external_files};

/// How an adapter stands in a graph.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Emission {
    /// Its tensors are constants of the graph.
    #[default]
    Baked,
}

/// What a fold did.
#[derive(Clone, Debug, Serialize)]
pub struct Folded {
    /// How the adapter stands in the graph.
    pub emission: Emission,
    /// The sites that carry the adapter, by layer.
    pub sites: Vec<Site>,
    /// For which inputs the adapter computes what it was trained to.
    pub exactness: Exactness,
}

/// The folder and file that a graph's path names: a folder that holds `model.onnx`, or the file itself.
pub fn graph_file(path: &Path) -> PathBuf {
    if path.is_dir() { path.join(MODEL_NAME) } else { path.to_path_buf() }
}

/// Folds `adapter` into `model`, whose external data is in `source`. New external data, where the adapter is large, goes to
/// `folder`.
///
/// # Errors
/// When the graph's sites are not those of the adapter's model, or the edited graph does not hold together.
pub fn fold(model: &Model, source: &Path, adapter: &Adapter, folder: &Path) -> Result<(Model, Folded)> {
    if let Some(earlier) = model.metadata(emit::MARK) {
        return Err(Error::AlreadyFolded { earlier: earlier.to_owned() });
    }
    let config = adapter.config();
    let sites = locate::sites(model)?;
    let layers = locate::num_layers(&sites);
    if layers != config.num_layers {
        return Err(Error::SiteCount { sites: layers, layers: config.num_layers });
    }
    let adapted = config.adapted_layers();
    let sites: Vec<Site> = sites.into_iter().filter(|site| adapted.contains(&site.layer)).collect();
    let patch = emit::baked(model, source, adapter, &sites, folder)?;
    Ok((patch.apply(model)?, Folded { emission: Emission::Baked, sites, exactness: locate::exactness(model) }))
}

/// Folds the adapter at `adapter` into the graph at `graph` and writes `model.onnx`, its data and the manifest into a
/// folder that exists.
///
/// # Errors
/// When either cannot be read, [`fold`] fails, or a file cannot be written.
pub fn fold_folder(graph: &Path, adapter: &Path, folder: &Path) -> Result<Folded> {
    let graph = graph_file(graph);
    let model = Model::open(&graph)?;
    let opened = open_adapter(&graph, adapter)?;
    let (edited, folded) = fold(&model, folder_of(&graph), &opened, folder)?;
    let target = folder.join(MODEL_NAME);
    edited.save(&target)?;
    let data = carry_files(&model, &graph, folder)?;
    let options = serde_json::json!({ "emission": folded.emission });
    let mut manifest = Manifest::new("fold", options).input("graph", &graph)?.output("graph", &target)?;
    if adapter.is_dir() {
        manifest = manifest.input("adapter_config", &adapter.join(CONFIG_NAME))?;
        manifest = manifest.input("adapter", &adapter.join(WEIGHTS_NAME))?;
    } else {
        manifest = manifest.input("adapter", adapter)?;
    }
    manifest.facts = serde_json::json!({ "sites": folded.sites, "exactness": folded.exactness, "external_data": data, "adapter": opened.config() });
    manifest.write(folder)?;
    Ok(folded)
}

/// The folder that a file is in.
fn folder_of(graph: &Path) -> &Path {
    match graph.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// A PEFT folder's module names are those of the model whose `config.json` is beside the graph.
fn open_adapter(graph: &Path, adapter: &Path) -> Result<Adapter> {
    let path = folder_of(graph).join("config.json");
    if !(peft::is_peft(adapter)? && path.is_file()) {
        return Ok(Adapter::open(adapter)?);
    }
    let config: serde_json::Value = files::read_json(&path, "a model configuration")?;
    Ok(Adapter::open_for(adapter, &family::spec_from_config(&path, &config)?)?)
}

/// Files that travel with a graph beside its data.
const COMPANIONS: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "genai_config.json",
];

/// Links, or else copies, the graph's external data and companions; returns the names of the data files.
fn carry_files(model: &Model, graph: &Path, folder: &Path) -> Result<Vec<String>> {
    let source = folder_of(graph);
    let data: Vec<String> = external_files(model)?.into_iter().collect();
    for name in &data {
        let (from, to) = (source.join(name), folder.join(name));
        if let Some(parent) = to.parent() {
            std::fs::create_dir_all(parent).map_err(files::Error::io("create folder", parent))?;
        }
        link_or_copy(&from, &to)?;
    }
    for name in COMPANIONS {
        let from = source.join(name);
        if from.is_file() {
            std::fs::copy(&from, folder.join(name)).map_err(files::Error::io("copy", &from))?;
        }
    }
    Ok(data)
}

fn link_or_copy(from: &Path, to: &Path) -> Result<()> {
    let real = from.canonicalize().map_err(files::Error::io("find the external data", from))?;
    if std::fs::hard_link(&real, to).is_ok() {
        return Ok(());
    }
    std::fs::copy(&real, to).map_err(files::Error::io("copy", from))?;
    Ok(())
}
