//! `genai_config.json`, by which onnxruntime-genai knows a graph.
//!
//! Its type is `decoder`: names and sizes stand in the file, and nothing depends on the family. The cache grows by copying, since
//! these graphs put out the keys of all tokens, and not into a buffer of the longest text; in graphs for padding on the right
//! alone the attention operator knows how much of a buffer is filled, and writes new keys into it.

use serde_json::{Map, Value, json};

use super::ExportOptions;
use crate::base::{DecoderSpec, Tokenizer};

/// File name.
pub const GENAI_NAME: &str = "genai_config.json";

/// The configuration of an exported graph. `config` is the checkpoint's, for what no tokenizer says.
pub(super) fn config(
    spec: &DecoderSpec,
    options: &ExportOptions,
    tokenizer: Option<&Tokenizer>,
    config: &Value,
) -> Value {
    let attention = &spec.attention;
    let mut model = json!({
        "type": "decoder",
        "context_length": spec.max_positions,
        "vocab_size": spec.vocab_size,
        "decoder": {
            "session_options": {},
            "filename": crate::onnx::MODEL_NAME,
            "head_size": attention.head_dim,
            "hidden_size": spec.hidden_size,
            "num_attention_heads": attention.num_heads,
            "num_hidden_layers": spec.num_layers,
            "num_key_value_heads": attention.num_kv_heads,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    });
    if options.takes_positions(spec) {
        model["decoder"]["inputs"]["position_ids"] = "position_ids".into();
    }
    if let Value::Object(model) = &mut model {
        model.extend(tokens(tokenizer, config));
    }
    json!({
        "model": model,
        "search": { "do_sample": false, "max_length": spec.max_positions, "past_present_share_buffer": options.right_padding_only },
    })
}

/// The tokens that begin, end and pad a text. A model that has none for padding pads with one that ends.
fn tokens(tokenizer: Option<&Tokenizer>, config: &Value) -> Map<String, Value> {
    let known = |key: &str| config.get(key).filter(|value| !value.is_null()).cloned();
    let begin = tokenizer.and_then(Tokenizer::bos).map(Value::from).or_else(|| known("bos_token_id"));
    let ends = tokenizer.map(Tokenizer::eos_ids).filter(|ids| !ids.is_empty()).map(|ids| json!(ids));
    let ends = ends.or_else(|| known("eos_token_id"));
    let first = |ends: &Value| ends.as_array().map_or(Some(ends.clone()), |ends| ends.first().cloned());
    let pad = tokenizer.and_then(Tokenizer::pad).map(Value::from).or_else(|| known("pad_token_id"));
    let pad = pad.or_else(|| ends.as_ref().and_then(first));
    let found = [("bos_token_id", begin), ("eos_token_id", ends), ("pad_token_id", pad)];
    found.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect()
}
