//! PEFT's adapter folders: `adapter_config.json` with a `peft_type`, and `adapter_model.safetensors` under the names that
//! PEFT gives. LoRA (with rsLoRA and DoRA) and prefix tuning are read and written.
//!
//! PEFT names modules of the transformers model, `base_model.model.model.layers.0.self_attn.q_proj`. Which of a decoder's
//! linear maps a module holds follows from where the base model's checkpoint keeps their weights. A fused module
//! (`c_attn`, `qkv_proj`, `query_key_value`) becomes its parts: every part has the module's A and its own rows of B.

mod config;
mod lora;
mod modules;
mod prefix;
mod targets;

use std::path::Path;

use serde_json::{Map, Value};

use super::folder::{read_tensors, write_tensors};
use super::{Adapter, CONFIG_NAME, Error, Method, Result, Tensors, WEIGHTS_NAME};
use crate::base::DecoderSpec;
use crate::files;

/// What PEFT puts before a module's name.
const PREFIX: &str = "base_model.model.";

/// Whether a folder is PEFT's.
///
/// # Errors
/// When its configuration is damaged.
pub fn is_peft(folder: &Path) -> Result<bool> {
    let path = folder.join(CONFIG_NAME);
    if !path.is_file() {
        return Ok(false);
    }
    let config: Value = files::read_json(&path, "an adapter's configuration")?;
    Ok(config.get("peft_type").is_some())
}

/// Reads a PEFT folder for a base model.
///
/// # Errors
/// When a file is missing or damaged, the method or an option is one that prefold does not compute, or a module or shape is
/// not the base model's.
pub fn read(folder: &Path, spec: &DecoderSpec) -> Result<Adapter> {
    let path = folder.join(CONFIG_NAME);
    let fields: Map<String, Value> = files::read_json(&path, "a PEFT configuration")?;
    let config = config::Config { folder, fields };
    let weights = folder.join(WEIGHTS_NAME);
    if !weights.is_file() {
        let help = "save it in PEFT with save_pretrained(…, safe_serialization=True)";
        return config.fail(format!("it holds no {WEIGHTS_NAME}"), help);
    }
    let tensors = read_tensors(&weights)?;
    match config.text("peft_type")? {
        "LORA" => lora::read(&config, &tensors, spec),
        "PREFIX_TUNING" => prefix::read(&config, &tensors, spec),
        other => config.fail(format!("its type is {other}"), "prefold reads LORA and PREFIX_TUNING"),
    }
}

/// Writes an adapter as a PEFT folder into a folder that exists.
///
/// # Errors
/// When PEFT has no form for the adapter, or a file cannot be written.
pub fn write(adapter: &Adapter, spec: &DecoderSpec, folder: &Path) -> Result<()> {
    adapter.check_fits(spec)?;
    let (fields, tensors): (Value, Tensors) = match &adapter.config().method {
        Method::Lora(lora) => lora::write(adapter, lora, spec)?,
        Method::Prefix(prefix) => prefix::write(adapter, prefix)?,
        method => return Err(Error::NotInPeft { why: format!("its method is {}", method.name()) }),
    };
    files::write_json(&folder.join(CONFIG_NAME), "a PEFT configuration", &fields)?;
    write_tensors(&folder.join(WEIGHTS_NAME), &tensors)
}
