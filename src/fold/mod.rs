//! An adapter into a graph: find the attention sites ([`locate`]), write the adapter's term at each ([`emit`]).
//!
//! ```text
//!            query ── φ ── MatMul M ──┐
//!                                     ▼
//! q, k, v ── softmax attention ───── Add ── o_proj
//! ```
//!
//! The graph is edited as a file: nodes and constants are added, the reader of each attention output reads the sum instead,
//! and every other byte stays as it is. Weights travel as files ([`Carry`]) and are never read.
//! What was folded, and the way back to the file before, stands in the graph's metadata: [`unfold_folder`] gives that file's bytes,
//! and a second fold finds the base graph's sites by it. Knows no training.

mod bank;
mod carry;
mod delta;
pub mod emit;
mod error;
pub mod locate;
pub mod onnx_adapter;
mod record;
mod slots;
mod stack;
mod unfold;

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::Serialize;

pub use bank::{BankEdit, bank_of, edit_bank};
pub use carry::{CarriedFile, Carry};
pub use emit::{ADAPTER_IDS, Emission, query_type};
pub use error::{Error, Result};
pub use locate::{Exactness, Layout, Site};
pub use onnx_adapter::{ADAPTER_EXTENSION, AdapterFile};
pub use record::{MARK, RECORDS, Record};
pub use slots::{Slot, check_adapter_file, slot_values, slots};
pub use stack::{base, sites};
pub use unfold::{Unfolded, unfold_folder};

use crate::adapter::{Adapter, AdapterConfig, CONFIG_NAME, Method, WEIGHTS_NAME, peft};
use crate::base::family;
use crate::files::{self, Manifest};
use crate::onnx::{MODEL_NAME, Model};
use emit::{Parameter, Place};

/// What to do with a graph that carries an adapter already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Over {
    /// An error that names the other two.
    #[default]
    Refuse,
    /// Add to it: at each site the terms of both adapters are summed, and each has its own slots or bank.
    Stack,
    /// Put the new adapter in the place of the last one that was folded; those below it stay.
    Replace,
}

/// How LoRA stands in a graph.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoraForm {
    /// Beside the products that it adapts, whatever their weights are kept in.
    #[default]
    Side,
    /// In new weights, which the products read instead: no node is added. The old weights stay where they are, read by
    /// nothing, so that the way back is as short as ever.
    Merge,
}

/// How to fold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FoldOptions {
    /// How the adapter stands in the graph.
    pub emission: Emission,
    /// What to do with a graph that carries an adapter already.
    pub over: Over,
    /// How the external data comes to the new folder.
    pub carry: Carry,
    /// How LoRA stands in the graph.
    pub lora: LoraForm,
}

/// An adapter with the name that a graph knows it by.
#[derive(Clone, Debug)]
pub struct NamedAdapter {
    /// The name, a file's too.
    pub name: String,
    /// The adapter.
    pub adapter: Adapter,
}

/// What a fold did.
#[derive(Clone, Debug, Serialize)]
pub struct Folded {
    /// How the adapters stand in the graph.
    pub emission: Emission,
    /// The sites that carry an adapter, by layer.
    pub sites: Vec<Site>,
    /// The names of the adapters; in a bank those of its rows from 1.
    pub adapters: Vec<String>,
    /// The slots that the graph has now.
    pub slots: Vec<Slot>,
    /// The values of its slots, by adapter.
    #[serde(skip)]
    pub slot_values: Vec<AdapterFile>,
    /// For which inputs the adapter computes what it was trained to.
    pub exactness: Exactness,
}

/// The folder and file that a graph's path names: a folder that holds `model.onnx`, or the file itself.
pub fn graph_file(path: &Path) -> PathBuf {
    if path.is_dir() { path.join(MODEL_NAME) } else { path.to_path_buf() }
}

/// Folds adapters into `model`, whose external data is in `source`. New external data, where the adapters are large, goes to
/// `folder`.
///
/// # Errors
/// When the graph's sites are not those of the adapters' model, the adapters do not go into one graph, the graph carries one
/// already and nothing is said of it, DoRA would be stacked with another adapter of the same map, or the edited graph does not
/// hold together.
pub fn fold(
    model: &Model,
    source: &Path,
    adapters: &[NamedAdapter],
    options: FoldOptions,
    folder: &Path,
) -> Result<(Model, Folded)> {
    if let Some(first) = adapters.first().filter(|_| options.over == Over::Stack) {
        check_stack(&Record::all(model)?, first.adapter.config())?;
    }
    fold_over_any(model, source, adapters, options, folder)
}

/// [`fold`] for adapters of zeros, which mean the same over any other.
pub(crate) fn fold_over_any(
    model: &Model,
    source: &Path,
    adapters: &[NamedAdapter],
    options: FoldOptions,
    folder: &Path,
) -> Result<(Model, Folded)> {
    let Some(first) = adapters.first() else { return Err(Error::NoAdapter) };
    let names: Vec<String> = adapters.iter().map(|adapter| adapter.name.clone()).collect();
    check_names(&names)?;
    if options.emission == Emission::Baked && adapters.len() > 1 {
        return Err(Error::OneAdapter { count: adapters.len() });
    }
    let merges = options.lora == LoraForm::Merge;
    if merges && !matches!(first.adapter.config().method, Method::Lora(_)) {
        return Err(Error::NotFolded {
            what: format!("{}, merged into weights", first.adapter.config().method.name()),
            help: "only LoRA is a change of weights: leave --lora out",
        });
    }
    if merges && options.emission != Emission::Baked {
        return Err(Error::NotFolded {
            what: format!("LoRA as a {}, merged into weights", options.emission),
            help: "merged weights are constants: fold with --emission baked, or with --lora side",
        });
    }
    let called = |adapter: &NamedAdapter| format!("adapter `{}`", adapter.name);
    for other in adapters {
        check_same((&called(first), first.adapter.config()), (&called(other), other.adapter.config()))?;
    }
    let replaced = match (model.metadata(MARK), options.over) {
        (Some(earlier), Over::Refuse) => return Err(Error::AlreadyFolded { earlier: earlier.to_owned() }),
        (Some(_), Over::Replace) => Some(record::last(model)?.0),
        (Some(_), Over::Stack) if Record::all(model)?.is_empty() => {
            return Err(Error::Unfold { why: "it was folded by a prefold that kept no way back".into() });
        }
        (None, _) if record::is_forgotten(model) => {
            return Err(Error::Unfold {
                why: "it carries an adapter, and another tool dropped the metadata of it".into(),
            });
        }
        _ => None,
    };
    let model = replaced.as_ref().unwrap_or(model);
    let number = Record::all(model)?.last().map_or(1, |fold| fold.number + 1);
    let config = first.adapter.config().clone();
    let record = Record::new(number, options.emission, config, names.clone());

    let sites = adapted(&sites(model)?, &first.adapter)?;
    let place = Place { model, source, sites: &sites, merge: merges.then_some(folder) };
    let opened: Vec<Adapter> = adapters.iter().map(|adapter| adapter.adapter.clone()).collect();
    let (mut patch, mut values) = emit::emit(place, &opened, options.emission, folder)?;
    patch.rename(|name| record.scoped(name));
    patch.set_metadata(MARK, &names.join(", "));
    let folded = record.clone().seal(model, &patch.apply(model)?)?;

    let mut slot_values = Vec::new();
    if options.emission == Emission::Slot {
        values = emit::padded(&values)?;
        values.iter_mut().for_each(|parameters| scope_names(&record, parameters));
        slot_values = values.into_iter().map(slots::file_of).collect();
    }
    let slots = slots(&folded);
    let exactness = locate::exactness(model);
    Ok((folded, Folded { emission: options.emission, sites, adapters: names, slots, slot_values, exactness }))
}

/// Refuses magnitudes over or under another adapter of the same map: DoRA scales the whole map, so that the two would be another
/// function in each order and form, and none of them what was trained.
fn check_stack(earlier: &[Record], config: &AdapterConfig) -> Result<()> {
    let Method::Lora(lora) = &config.method else { return Ok(()) };
    let sites = lora.sites(config);
    for fold in earlier {
        let Method::Lora(other) = &fold.config.method else { continue };
        let others = other.sites(&fold.config);
        let shared = sites.iter().find(|site| others.contains(site));
        if let Some((layer, linear)) = shared.filter(|_| lora.dora || other.dora) {
            let module = linear.module();
            return Err(Error::NotFolded {
                what: format!(
                    "a second adapter of layers.{layer}.{module}, which `{}` adapts, where one of them is DoRA",
                    fold.adapters.join("`, `")
                ),
                help: "DoRA scales the whole map, and so what another adapter adds to it: train one adapter on top of the other's \
                       merged weights, or pass --replace",
            });
        }
    }
    Ok(())
}

/// The sites of the layers that an adapter adapts.
fn adapted(sites: &[Site], adapter: &Adapter) -> Result<Vec<Site>> {
    let config = adapter.config();
    let layers = locate::num_layers(sites);
    if layers != config.num_layers {
        return Err(Error::SiteCount { sites: layers, layers: config.num_layers });
    }
    let layers = config.adapted_layers();
    Ok(sites.iter().filter(|site| layers.contains(&site.layer)).cloned().collect())
}

/// Gives parameters the names that they have in a fold.
fn scope_names(fold: &Record, parameters: &mut [Parameter]) {
    for parameter in parameters {
        if let Some(name) = fold.scoped(&parameter.name) {
            parameter.name = name;
        }
    }
}

fn check_names(names: &[String]) -> Result<()> {
    for (index, name) in names.iter().enumerate() {
        let odd = |c: char| c.is_control() || matches!(c, '/' | '\\' | ':' | '=' | ',');
        let why = match name.as_str() {
            "" => "is empty",
            name if name.contains(odd) || name.starts_with('.') => "is no file name",
            _ if names.get(..index).is_some_and(|before| before.contains(name)) => "is given twice",
            _ => continue,
        };
        return Err(Error::Name { name: name.clone(), why });
    }
    Ok(())
}

/// What may differ between adapters of one graph: a rank and what goes with it, which is computed into the tensors.
const RANK_FIELDS: [&str; 13] = [
    "format_version",
    "base_model",
    "rank",
    "alpha",
    "rslora",
    "rank_pattern",
    "alpha_pattern",
    "init",
    "prompt_scale",
    "gate",
    "num_virtual_tokens",
    "projection",
    "encoder_hidden_size",
];

/// Whether two adapters are of one kind, up to the rank.
///
/// # Errors
/// Names the first field of the configuration that differs.
fn check_same((first, a): (&str, &AdapterConfig), (other, b): (&str, &AdapterConfig)) -> Result<()> {
    let fields = |config: &AdapterConfig| match serde_json::to_value(config) {
        Ok(serde_json::Value::Object(fields)) => fields,
        _ => serde_json::Map::new(),
    };
    let (a, b) = (fields(a), fields(b));
    let keys = a.keys().chain(b.keys()).filter(|key| !RANK_FIELDS.contains(&key.as_str()));
    let value = |fields: &serde_json::Map<String, serde_json::Value>, key: &str| {
        fields.get(key).filter(|value| !value.is_null()).map_or("not given".to_owned(), ToString::to_string)
    };
    match { keys }.find(|key| value(&a, key) != value(&b, key)) {
        Some(key) => Err(Error::ConfigsDiffer {
            key: key.clone(),
            first: first.into(),
            first_value: value(&a, key),
            other: other.into(),
            other_value: value(&b, key),
        }),
        None => Ok(()),
    }
}

/// Folds the adapter at `adapter` into the graph at `graph`, baked, and writes `model.onnx`, its data and the manifest into a
/// folder that exists.
///
/// # Errors
/// As [`fold_adapters`].
pub fn fold_folder(graph: &Path, adapter: &Path, folder: &Path) -> Result<Folded> {
    fold_adapters(graph, &[(name_of(adapter), adapter.to_path_buf())], FoldOptions::default(), folder)
}

/// The name of an adapter that is given none: that of its folder, or of its file without the ending.
pub fn name_of(adapter: &Path) -> String {
    let path = adapter.canonicalize().unwrap_or_else(|_| adapter.to_path_buf());
    let name = if path.is_file() { path.file_stem() } else { path.file_name() };
    name.map_or_else(|| "adapter".to_owned(), |name| name.to_string_lossy().into_owned())
}

/// Folds adapters, each a name and a path, into the graph at `graph` and writes `model.onnx`, its data, the manifest, and for
/// slots one `.onnx_adapter` file for each adapter into a folder that exists.
///
/// # Errors
/// When graph or adapter cannot be read, [`fold`] fails, or a file cannot be written.
pub fn fold_adapters(
    graph: &Path,
    adapters: &[(String, PathBuf)],
    options: FoldOptions,
    folder: &Path,
) -> Result<Folded> {
    let graph = graph_file(graph);
    let (model, files) = carry::open(&graph, folder_of(&graph))?;
    let opened = adapters
        .iter()
        .map(|(name, path)| Ok(NamedAdapter { name: name.clone(), adapter: open_adapter(&graph, path)? }));
    let opened: Vec<NamedAdapter> = opened.collect::<Result<_>>()?;
    let (edited, folded) = fold(&model, folder_of(&graph), &opened, options, folder)?;
    let target = folder.join(MODEL_NAME);
    edited.save(&target)?;
    let data = carry::carry(&edited, &files, folder_of(&graph), folder, options.carry)?;
    let mut manifest = Manifest::new("fold", serde_json::json!({ "emission": folded.emission }));
    manifest = manifest.input("graph", &graph)?.output("graph", &target)?;
    for (name, values) in folded.adapters.iter().zip(&folded.slot_values) {
        let path = folder.join(format!("{name}.{ADAPTER_EXTENSION}"));
        values.save(&path)?;
        manifest = manifest.output("adapter", &path)?;
    }
    for (_, adapter) in adapters {
        if adapter.is_dir() {
            manifest = manifest.input("adapter_config", &adapter.join(CONFIG_NAME))?;
            manifest = manifest.input("adapter", &adapter.join(WEIGHTS_NAME))?;
        } else {
            manifest = manifest.input("adapter", adapter)?;
        }
    }
    let facts = Facts {
        sites: folded.sites.clone(),
        exactness: folded.exactness.clone(),
        external_data: data,
        adapter: opened.first().map(|adapter| adapter.adapter.config().clone()),
        adapters: folded.adapters.clone(),
        slots: folded.slots.clone(),
    };
    manifest.facts = serde_json::json!(facts);
    manifest.write(folder)?;
    Ok(folded)
}

/// What the manifest of a fold says that it found.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Facts {
    /// The sites that carry an adapter, by layer.
    pub sites: Vec<Site>,
    /// For which inputs the adapter computes what it was trained to.
    pub exactness: Exactness,
    /// The data files of the graph, and how they came to the folder.
    pub external_data: Vec<CarriedFile>,
    /// The configuration of the adapter; of several, the first's.
    pub adapter: Option<AdapterConfig>,
    /// The names of the adapters; in a bank those of its rows from 1.
    pub adapters: Vec<String>,
    /// The slots that the graph has now.
    pub slots: Vec<Slot>,
}

/// The folder that a file is in.
fn folder_of(graph: &Path) -> &Path {
    match graph.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Opens an adapter for a graph. A PEFT folder's module names are those of the model whose `config.json` is beside the graph.
///
/// # Errors
/// When it cannot be read.
pub fn open_adapter(graph: &Path, adapter: &Path) -> Result<Adapter> {
    let path = folder_of(graph).join("config.json");
    if !(peft::is_peft(adapter)? && path.is_file()) {
        return Ok(Adapter::open(adapter)?);
    }
    let config: serde_json::Value = files::read_json(&path, "a model configuration")?;
    Ok(Adapter::open_for(adapter, &family::spec_from_config(&path, &config)?)?)
}
