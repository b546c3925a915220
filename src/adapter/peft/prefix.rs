//! Prefix tuning: one tensor `prompt_embeddings`, `[num_virtual_tokens, num_layers · 2 · kv_width]`; layer by layer all keys,
//! then all values. What PEFT computes with a projection it saves in this form too.

use candle_core::Tensor;
use serde_json::{Value, json};

use super::config::Config;
use crate::adapter::{Adapter, AdapterConfig, Error, Method, Prefix, Result, Tensors};
use crate::base::DecoderSpec;

const NAME: &str = "prompt_embeddings";
const FIELDS: [&str; 4] = ["num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"];

pub(super) fn read(config: &Config, tensors: &Tensors, spec: &DecoderSpec) -> Result<Adapter> {
    config.check_fields(&FIELDS)?;
    let base_model = config.get("base_model_name_or_path").and_then(Value::as_str).map(str::to_owned);
    let prefix = Prefix { num_virtual_tokens: config.count("num_virtual_tokens")?, ..Prefix::default() };
    let length = prefix.num_virtual_tokens;
    let adapter = AdapterConfig::new(Method::Prefix(prefix), spec, base_model);
    adapter.check()?;
    let (heads, width) = (adapter.kv_heads(), adapter.kv_width());
    for (field, expected) in [("token_dim", width), ("num_attention_heads", heads), ("num_layers", spec.num_layers)] {
        let found = config.count(field)?;
        if found != expected {
            let why = format!("`{field}` is {found}, the model's is {expected}");
            return config.fail(why, "use the base model that the adapter was trained for");
        }
    }
    let Some(whole) = tensors.get(NAME) else {
        return config.fail(format!("it has no tensor `{NAME}`"), "save it in PEFT again");
    };
    let shape = [length, 2 * spec.num_layers * width];
    if whole.dims() != shape {
        let why = format!("`{NAME}` has shape {:?}, its configuration asks for {shape:?}", whole.dims());
        return config.fail(why, "adapter_config.json and adapter_model.safetensors do not belong together");
    }
    let mut native = Tensors::new();
    for layer in 0..spec.num_layers {
        for (index, part) in [(2 * layer, "key"), (2 * layer + 1, "value")] {
            let rows = whole
                .narrow(1, index * width, width)
                .and_then(|rows| rows.reshape((length, heads, adapter.head_dim))?.transpose(0, 1)?.contiguous());
            native.insert(format!("layers.{layer}.{part}"), rows.map_err(Error::candle("reading a PEFT adapter"))?);
        }
    }
    Adapter::new(adapter, native)
}

pub(super) fn write(adapter: &Adapter, prefix: &Prefix) -> Result<(Value, Tensors)> {
    let config = adapter.config();
    let mut columns = Vec::new();
    let action = Error::candle("writing a PEFT adapter");
    for layer in 0..config.num_layers {
        let Some((key, value)) = prefix.keys_and_values(config, adapter.tensors(), layer).map_err(&action)? else {
            return Err(Error::NotInPeft { why: format!("prefix tuning without layer {layer}") });
        };
        for part in [key, value] {
            columns.push(part.transpose(0, 1).and_then(|x| x.flatten_from(1)).map_err(&action)?);
        }
    }
    let whole = Tensor::cat(&columns, 1).and_then(|x| x.contiguous()).map_err(&action)?;
    let fields = json!({
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base_model,
        "inference_mode": true,
        "num_virtual_tokens": prefix.num_virtual_tokens,
        "token_dim": config.kv_width(),
        "num_attention_heads": config.kv_heads(),
        "num_layers": config.num_layers,
        "num_transformer_submodules": 1,
        "encoder_hidden_size": config.kv_width(),
        "prefix_projection": false,
    });
    Ok((fields, Tensors::from([(NAME.to_owned(), whole)])))
}
