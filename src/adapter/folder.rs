//! An adapter on disk: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};

use super::{Adapter, AdapterConfig, Error, FORMAT_VERSION, Method, PrefixPlus, Result, peft};
use crate::base::DecoderSpec;
use crate::files;

/// File name of the configuration.
pub const CONFIG_NAME: &str = "adapter_config.json";
/// File name of the tensors.
pub const WEIGHTS_NAME: &str = "adapter_model.safetensors";

impl Adapter {
    /// Opens an adapter folder of prefold's. A bare `.safetensors` file with tensors `layers.{i}.M` is taken as Prefix-Tuning+ with
    /// its defaults.
    ///
    /// # Errors
    /// When a file is missing or damaged, or the two do not belong together; for a folder of PEFT's, which
    /// [`open_for`](Self::open_for) reads.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_file() && path.extension().is_some_and(|e| e == "safetensors") {
            let tensors = read_tensors(path)?;
            return Self::new(infer(path, &tensors)?, tensors);
        }
        let config_path = path.join(CONFIG_NAME);
        if !config_path.is_file() {
            return Err(Error::NotAnAdapter { path: path.into(), why: format!("it holds no {CONFIG_NAME}") });
        }
        if peft::is_peft(path)? {
            return Err(Error::Peft {
                path: path.into(),
                why: "the base model is not at hand, whose modules its names mean".into(),
                help: "put the model's config.json beside the graph, or convert the adapter: prefold adapter convert \
                       --adapter PEFT_FOLDER --model BASE_MODEL --to prefold --out FOLDER"
                    .into(),
            });
        }
        let config: AdapterConfig = files::read_json(&config_path, "an adapter's configuration")?;
        config.check()?;
        Self::new(config, read_tensors(&path.join(WEIGHTS_NAME))?)
    }

    /// Opens an adapter folder of prefold's or of PEFT's for a base model, and checks that it belongs to it.
    ///
    /// # Errors
    /// As [`open`](Self::open); when it was made for another model, or a PEFT folder asks for what prefold does not compute.
    pub fn open_for(path: &Path, spec: &DecoderSpec) -> Result<Self> {
        let adapter = if peft::is_peft(path)? { peft::read(path, spec)? } else { Self::open(path)? };
        adapter.check_fits(spec)?;
        Ok(adapter)
    }

    /// Writes both files into a folder that exists.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        files::write_json(&folder.join(CONFIG_NAME), "an adapter's configuration", &self.config)?;
        write_tensors(&folder.join(WEIGHTS_NAME), &self.tensors)
    }
}

pub(super) fn write_tensors(path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let metadata = std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let bytes = safetensors::serialize(tensors, Some(metadata)).map_err(|e| Error::NotAnAdapter {
        path: path.into(),
        why: format!("its tensors cannot be serialised: {e}"),
    })?;
    std::fs::write(path, bytes).map_err(files::Error::io("write", path))?;
    Ok(())
}

pub(super) fn read_tensors(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    let map = files::MappedFile::open(path)?;
    let damaged = |e: &dyn std::fmt::Display| Error::NotAnAdapter { path: path.into(), why: e.to_string() };
    let tensors = candle_core::safetensors::load_buffer(map.bytes(), &Device::Cpu).map_err(|e| damaged(&e))?;
    Ok(tensors.into_iter().collect())
}

/// The configuration that bare tensors imply.
fn infer(path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<AdapterConfig> {
    let not = |why: &str| Error::NotAnAdapter { path: path.into(), why: why.into() };
    let layer_of = |name: &str| name.strip_prefix("layers.")?.strip_suffix(".M")?.parse::<usize>().ok();
    let mut layers: Vec<usize> = tensors.keys().filter_map(|name| layer_of(name)).collect();
    layers.sort_unstable();
    let first = tensors.iter().find(|(name, _)| layer_of(name).is_some());
    let (Some((_, tensor)), Some(last)) = (first, layers.last()) else {
        return Err(not("it has no tensor `layers.{i}.M`"));
    };
    let (num_heads, head_dim, _) = tensor.dims3().map_err(|_| not("`layers.{i}.M` has not three dimensions"))?;
    Ok(AdapterConfig {
        format_version: FORMAT_VERSION,
        base_model: None,
        num_layers: last.saturating_add(1),
        num_heads,
        num_kv_heads: None,
        head_dim,
        hidden_size: None,
        intermediate_size: None,
        layers: (layers.len() != last.saturating_add(1)).then_some(layers),
        method: Method::PrefixPlus(PrefixPlus::default()),
    })
}
