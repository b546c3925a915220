//! LoRA.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use super::PREFIX;
use super::config::Config;
use super::modules::{Module, find, modules};
use super::targets::{self, Targets};
use crate::adapter::{Adapter, AdapterConfig, Error, Lora, LoraMap, Method, Result, Target, Tensors, module_name};
use crate::base::{DecoderSpec, Linear};

const FIELDS: [&str; 8] =
    ["r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias", "lora_bias"];

/// The tensors of a module by PEFT's names of them.
#[derive(Default)]
struct Found<'a> {
    a: Option<&'a Tensor>,
    b: Option<&'a Tensor>,
    magnitude: Option<&'a Tensor>,
}

pub(super) fn read(config: &Config, tensors: &Tensors, spec: &DecoderSpec) -> Result<Adapter> {
    config.check_fields(&FIELDS)?;
    let all = modules(spec);
    let mut lora = Lora {
        rank: config.count("r")?,
        alpha: config.number("lora_alpha")?,
        rslora: config.flag("use_rslora")?,
        dora: config.flag("use_dora")?,
        dropout: match config.get("lora_dropout") {
            Some(_) => config.number("lora_dropout")?,
            None => 0.0,
        },
        ..Lora::default()
    };
    let (ranks, alphas) = (config.pattern("rank_pattern")?, config.pattern("alpha_pattern")?);
    let (targeted, layers) = (Targets::of(config)?, targets::layers(config)?);
    let mut native = Tensors::new();
    let mut sites = BTreeSet::new();
    let mut beside = 0;
    for (path, found) in by_module(config, tensors)? {
        if spec.names.is_beside(path) {
            beside += 1;
            continue;
        }
        let Some(module) = find(&all, path, &spec.names) else {
            let help = "prefold adapts the linear maps of the layers; merge the rest with merge_and_unload()";
            return config.fail(format!("it adapts `{path}`, which is no linear map of a layer"), help);
        };
        if !targeted.contain(path) || layers.as_ref().is_some_and(|layers| !layers.contains(&module.layer)) {
            let why = format!("it has tensors of `{path}`, which its configuration does not target");
            return config.fail(why, "adapter_config.json and adapter_model.safetensors do not belong together");
        }
        let rank = targets::lookup(config, &ranks, path)?.map_or(lora.rank, |rank| rank as usize);
        let alpha = targets::lookup(config, &alphas, path)?.unwrap_or(lora.alpha);
        let a = tensor(config, path, "lora_A", found.a, &[rank, module.shape[1]])?;
        let b = tensor(config, path, "lora_B", found.b, &[module.shape[0], rank])?;
        let magnitude = match lora.dora {
            true => Some(tensor(config, path, "lora_magnitude_vector", found.magnitude, &[module.shape[0]])?),
            false => None,
        };
        for part in &module.parts {
            let name = module_name(module.layer, part.linear);
            let rows = |whole: &Tensor| part.rows_of(whole).map_err(Error::candle("reading a PEFT adapter"));
            native.insert(format!("{name}.lora_A"), a.clone());
            native.insert(format!("{name}.lora_B"), rows(&b)?);
            if let Some(magnitude) = &magnitude {
                native.insert(format!("{name}.magnitude"), rows(magnitude)?);
            }
            if rank != lora.rank {
                lora.rank_pattern.insert(name.clone(), rank);
            }
            if alpha != lora.alpha {
                lora.alpha_pattern.insert(name.clone(), alpha);
            }
            sites.insert((module.layer, part.linear));
        }
    }
    if sites.is_empty() {
        return config.fail("it has no tensors of the decoder", "save it in PEFT again");
    }
    if beside > 0 {
        let folder = config.folder.display();
        tracing::warn!("{folder}: {beside} adapted modules lie outside of the text model and were left out");
    }
    let layers = describe(&mut lora, &sites, spec.num_layers);
    let base_model = config.get("base_model_name_or_path").and_then(Value::as_str).map(str::to_owned);
    let config = AdapterConfig { layers, ..AdapterConfig::new(Method::Lora(lora), spec, base_model) };
    Adapter::new(config, native)
}

fn by_module<'a>(config: &Config, tensors: &'a Tensors) -> Result<BTreeMap<&'a str, Found<'a>>> {
    let mut modules: BTreeMap<&str, Found> = BTreeMap::new();
    for (name, tensor) in tensors {
        let stem = name.strip_suffix(".weight").unwrap_or(name);
        let Some((path, kind)) = stem.rsplit_once('.') else {
            return config.fail(format!("`{name}` is no tensor of LoRA"), "save it in PEFT again");
        };
        let found = modules.entry(path.strip_prefix(PREFIX).unwrap_or(path)).or_default();
        match kind {
            "lora_A" => found.a = Some(tensor),
            "lora_B" => found.b = Some(tensor),
            "lora_magnitude_vector" => found.magnitude = Some(tensor),
            _ => {
                let help = "prefold reads lora_A, lora_B and lora_magnitude_vector of linear maps";
                return config.fail(format!("`{name}` is no tensor of a linear map's LoRA"), help);
            }
        }
    }
    Ok(modules)
}

fn tensor(config: &Config, path: &str, kind: &str, found: Option<&Tensor>, shape: &[usize]) -> Result<Tensor> {
    match found {
        Some(tensor) if tensor.dims() == shape => Ok(tensor.clone()),
        Some(tensor) => config.fail(
            format!("`{path}.{kind}` has shape {:?}, the model and configuration ask for {shape:?}", tensor.dims()),
            "use the base model that the adapter was trained for",
        ),
        None => config.fail(format!("`{path}` has no {kind}"), "save it in PEFT again"),
    }
}

/// Says which maps are adapted, by layers and targets where these make a grid; returns the layers.
fn describe(lora: &mut Lora, sites: &BTreeSet<(usize, Linear)>, num_layers: usize) -> Option<Vec<usize>> {
    let layers: BTreeSet<usize> = sites.iter().map(|(layer, _)| *layer).collect();
    let targets: BTreeSet<Target> = sites.iter().map(|(_, linear)| (*linear).into()).collect();
    if layers.len() * targets.len() != sites.len() {
        lora.modules = Some(sites.iter().map(|(layer, linear)| module_name(*layer, *linear)).collect());
    }
    lora.targets = Some(targets.into_iter().collect());
    (layers.len() != num_layers).then(|| layers.into_iter().collect())
}

pub(super) fn write(adapter: &Adapter, lora: &Lora, spec: &DecoderSpec) -> Result<(Value, Tensors)> {
    let sites: BTreeSet<(usize, Linear)> = lora.sites(adapter.config()).into_iter().collect();
    let all = modules(spec);
    let adapted: Vec<&Module> = all
        .iter()
        .filter(|module| module.parts.iter().any(|part| sites.contains(&(module.layer, part.linear))))
        .collect();
    let mut tensors = Tensors::new();
    let (mut ranks, mut alphas) = (BTreeMap::new(), BTreeMap::new());
    for module in &adapted {
        let maps = module.parts.iter().map(|part| {
            let adapted = sites.contains(&(module.layer, part.linear));
            adapted.then(|| lora.map(adapter.tensors(), module.layer, part.linear)).transpose()
        });
        let whole = join(module, &maps.collect::<Result<Vec<_>>>()?, lora)?;
        let name = |kind: &str| format!("{PREFIX}{}.{kind}", module.name);
        tensors.insert(name("lora_A.weight"), whole.a);
        tensors.insert(name("lora_B.weight"), whole.b);
        if let Some(magnitude) = whole.magnitude {
            tensors.insert(name("lora_magnitude_vector"), magnitude);
        }
        if whole.rank != lora.rank {
            ranks.insert(module.name.clone(), whole.rank);
        }
        if whole.alpha != lora.alpha {
            alphas.insert(module.name.clone(), whole.alpha);
        }
    }
    let fields = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.config().base_model,
        "inference_mode": true,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "target_modules": target_names(&all, &adapted, spec),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "fan_in_fan_out": adapted.iter().any(|module| module.transposed),
        "bias": "none",
        "modules_to_save": null,
        "init_lora_weights": true,
    });
    Ok((fields, tensors))
}

/// The last names of the adapted modules where they mean no others, else whole paths.
fn target_names(all: &[Module], adapted: &[&Module], spec: &DecoderSpec) -> Vec<String> {
    let last = |module: &Module| module.name.rsplit('.').next().unwrap_or_default().to_owned();
    let names: BTreeSet<String> = adapted.iter().map(|module| last(module)).collect();
    let means_no_others = all.iter().filter(|module| names.contains(&last(module))).count() == adapted.len();
    if means_no_others && !spec.names.has_beside() {
        return names.into_iter().collect();
    }
    adapted.iter().map(|module| module.name.clone()).collect()
}

/// The tensors of a whole module.
struct Whole {
    a: Tensor,
    b: Tensor,
    magnitude: Option<Tensor>,
    rank: usize,
    alpha: f64,
}

/// Parts that share A keep it. Of others the A are stacked, and every B stands in the columns of its own A, which is the
/// same function.
fn join(module: &Module, maps: &[Option<LoraMap>], lora: &Lora) -> Result<Whole> {
    let action = Error::candle("writing a PEFT adapter");
    let first = maps.iter().flatten().next();
    let Some(first) = first else { return Err(Error::NotInPeft { why: "a module has no tensors".into() }) };
    if lora.dora && maps.iter().any(Option::is_none) {
        let why = format!("dora of a part of `{}`, which PEFT adapts whole", module.name);
        return Err(Error::NotInPeft { why });
    }
    let mut shared = true;
    for map in maps {
        let same = |map: &LoraMap| Ok::<_, candle_core::Error>(map.scale == first.scale && equal(&map.a, &first.a)?);
        shared &= map.as_ref().map_or(Ok(true), same).map_err(&action)?;
    }
    let compute = || {
        let columns: Vec<usize> = maps.iter().flatten().map(|map| map.a.dim(0)).collect::<candle_core::Result<_>>()?;
        let rank = if shared { columns.first().copied().unwrap_or(0) } else { columns.iter().sum() };
        let a = if shared {
            first.a.clone()
        } else {
            Tensor::cat(&maps.iter().flatten().map(|map| &map.a).collect::<Vec<_>>(), 0)?
        };
        let mut start = 0;
        let mut blocks = Vec::new();
        for (part, map) in module.parts.iter().zip(maps) {
            let zeros = |width| Tensor::zeros((part.rows, width), first.b.dtype(), &Device::Cpu);
            blocks.push(match map {
                None => zeros(rank)?,
                Some(map) if shared => map.b.clone(),
                Some(map) => {
                    let width = map.a.dim(0)?;
                    let own = (&map.b * (map.scale / first.scale))?;
                    let block = Tensor::cat(&[&zeros(start)?, &own, &zeros(rank - start - width)?], 1)?;
                    start += width;
                    block
                }
            });
        }
        let magnitudes = maps.iter().flatten().filter_map(|map| map.magnitude.clone()).collect::<Vec<_>>();
        let magnitude = if magnitudes.is_empty() { None } else { Some(module.join(&magnitudes)?) };
        let per_rank = if lora.rslora { (rank as f64).sqrt() } else { rank as f64 };
        Ok(Whole { a, b: module.join(&blocks)?, magnitude, rank, alpha: first.scale * per_rank })
    };
    compute().map_err(&action)
}

fn equal(left: &Tensor, right: &Tensor) -> candle_core::Result<bool> {
    let values = |x: &Tensor| x.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
    Ok(left.dims() == right.dims() && values(left)? == values(right)?)
}
