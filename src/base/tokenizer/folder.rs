//! The tokenizer of a Hugging Face folder.

use std::path::Path;

use serde_json::Value;

use super::{GENERATION_CONFIG, Parts, SpecialIds, TOKENIZER, TOKENIZER_CONFIG, surround};
use crate::base::{Error, Result};
use crate::files;

pub(super) fn read(folder: &Path) -> Result<Parts> {
    if !folder.join(TOKENIZER).is_file() {
        let reason =
            format!("the folder holds no {TOKENIZER}; transformers writes it from the other files of a tokenizer");
        return Err(Error::Tokenizer { path: folder.into(), reason });
    }
    let mut json: Value = files::read_json(&folder.join(TOKENIZER), "a tokenizer")?;
    let config = optional(folder, TOKENIZER_CONFIG)?;
    let map = optional(folder, "special_tokens_map.json")?;
    let generation = optional(folder, GENERATION_CONFIG)?;
    let model = optional(folder, "config.json")?;

    let named = |key: &str| [&config, &map].into_iter().find_map(|file| token_text(file.get(key)?));
    let numbered = |key: &str| -> Vec<u32> {
        [&generation, &model].into_iter().flat_map(|file| file.get(key).map(token_ids).unwrap_or_default()).collect()
    };
    let id_of = |text: &str| token_id(&json, text);
    let first = |token: &str, id: &str| named(token).and_then(id_of).or_else(|| numbered(id).first().copied());
    let bos = first("bos_token", "bos_token_id");
    let pad = first("pad_token", "pad_token_id");
    let mut eos: Vec<u32> = named("eos_token").and_then(id_of).into_iter().collect();
    for id in numbered("eos_token_id") {
        if !eos.contains(&id) {
            eos.push(id);
        }
    }
    let token = |key: &str| named(key).and_then(|text| Some((text, id_of(text)?)));
    let rebuilt = llama_post_processor(&config, token("bos_token"), token("eos_token"));
    if let (Some(post_processor), Some(fields)) = (rebuilt, json.as_object_mut()) {
        fields.insert("post_processor".into(), post_processor);
    }
    let chat_template = chat_template(folder, &config)?;
    Ok(Parts { path: folder.into(), json, special: SpecialIds { bos, eos, pad }, chat_template })
}

/// A JSON file, or null where there is none.
fn optional(folder: &Path, name: &str) -> Result<Value> {
    let path = folder.join(name);
    if !path.exists() {
        return Ok(Value::Null);
    }
    Ok(files::read_json(&path, "a configuration")?)
}

/// A token written as its text or as an object with its text.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// One id or a list of them.
fn token_ids(value: &Value) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value.as_array() {
        Some(values) => values.iter().filter_map(id).collect(),
        None => id(value).into_iter().collect(),
    }
}

fn token_id(tokenizer: &Value, text: &str) -> Option<u32> {
    let added = tokenizer.get("added_tokens").and_then(Value::as_array).into_iter().flatten();
    let added = added.filter(|token| token_text(token) == Some(text)).find_map(|token| token.get("id"));
    let id = added.or_else(|| tokenizer.get("model")?.get("vocab")?.get(text))?;
    token_ids(id).first().copied()
}

/// transformers writes the post-processor of its Llama class anew from `add_bos_token` and `add_eos_token`; other classes
/// keep the one of `tokenizer.json`.
fn llama_post_processor(config: &Value, bos: Option<(&str, u32)>, eos: Option<(&str, u32)>) -> Option<Value> {
    let class = config.get("tokenizer_class")?.as_str()?;
    if !matches!(class, "LlamaTokenizer" | "LlamaTokenizerFast") {
        return None;
    }
    let flag = |key: &str| config.get(key).and_then(Value::as_bool);
    let add_bos = flag("add_bos_token")?;
    let add_eos = flag("add_eos_token").unwrap_or(false);
    Some(surround(bos.filter(|_| add_bos), eos.filter(|_| add_eos)))
}

/// `chat_template.jinja`, or the template in the tokenizer's configuration; of several named ones the default.
fn chat_template(folder: &Path, config: &Value) -> Result<Option<String>> {
    let path = folder.join("chat_template.jinja");
    if path.exists() {
        return Ok(Some(String::from_utf8_lossy(&files::read(&path)?).into_owned()));
    }
    let Some(entry) = config.get("chat_template").filter(|entry| !entry.is_null()) else { return Ok(None) };
    let named = entry.as_array().map(Vec::as_slice).unwrap_or_default();
    let default = named.iter().find(|entry| entry.get("name").is_some_and(|name| name == "default"));
    let listed = default.or(named.first()).and_then(|entry| entry.get("template"));
    match listed.unwrap_or(entry).as_str() {
        Some(source) => Ok(Some(source.to_owned())),
        None => Err(Error::Config {
            path: folder.join(TOKENIZER_CONFIG),
            field: "chat_template".into(),
            why: "is neither a template's text nor a list of named templates".into(),
            help: "take the file from the model's repository again, or remove the field".into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Tokenizer;
    use serde_json::json;

    fn folder(files: &[(&str, Value)]) -> (tempfile::TempDir, Tokenizer) {
        let folder = tempfile::tempdir().unwrap();
        let special = |id: u32, text: &str| {
            json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                   "special": true})
        };
        let tokenizer = json!({
            "version": "1.0",
            "added_tokens": [special(0, "<s>"), special(1, "</s>"), special(2, "<end>")],
            "model": {"type": "BPE", "vocab": {"<s>": 0, "</s>": 1, "<end>": 2, "a": 3}, "merges": []},
        });
        for (name, content) in [(TOKENIZER, tokenizer)].iter().chain(files) {
            std::fs::write(folder.path().join(name), content.to_string()).unwrap();
        }
        let read = Tokenizer::from_folder(folder.path()).unwrap();
        (folder, read)
    }

    #[test]
    fn special_tokens_come_from_every_file() {
        let (_folder, tokenizer) = folder(&[
            (TOKENIZER_CONFIG, json!({"eos_token": {"content": "</s>"}, "pad_token": null})),
            ("special_tokens_map.json", json!({"bos_token": "<s>", "eos_token": "<end>"})),
            (GENERATION_CONFIG, json!({"eos_token_id": [2, 1, 999], "pad_token_id": 0})),
        ]);
        assert_eq!(tokenizer.bos(), Some(0));
        assert_eq!(tokenizer.eos_ids(), &[1, 2], "an id that no token has is forgotten");
        assert_eq!(tokenizer.pad(), Some(0));
        assert_eq!(tokenizer.encode("a", true).unwrap(), [3]);
    }

    #[test]
    fn the_llama_class_adds_what_its_configuration_says() {
        let config = |bos: bool, eos: bool| {
            json!({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": bos,
                   "add_eos_token": eos})
        };
        for (bos, eos, expected) in [(true, false, vec![0, 3]), (true, true, vec![0, 3, 1]), (false, false, vec![3])] {
            let (_folder, tokenizer) = folder(&[(TOKENIZER_CONFIG, config(bos, eos))]);
            assert_eq!(tokenizer.encode("a", true).unwrap(), expected);
            assert_eq!(tokenizer.encode("a", false).unwrap(), [3]);
        }
    }

    #[test]
    fn the_default_of_several_templates_is_taken() {
        let templates = json!([{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]);
        let (folder, tokenizer) = folder(&[(TOKENIZER_CONFIG, json!({"chat_template": templates}))]);
        assert_eq!(tokenizer.chat_template().unwrap().source(), "D");
        std::fs::write(folder.path().join("chat_template.jinja"), "J").unwrap();
        assert_eq!(Tokenizer::from_folder(folder.path()).unwrap().chat_template().unwrap().source(), "J");
    }

    #[test]
    fn a_template_that_is_no_text_is_refused() {
        let (folder, tokenizer) = folder(&[(TOKENIZER_CONFIG, json!({"chat_template": null}))]);
        assert!(tokenizer.chat_template().is_none());
        for template in [json!(3), json!([]), json!([{"name": "default"}])] {
            std::fs::write(folder.path().join(TOKENIZER_CONFIG), json!({"chat_template": template}).to_string())
                .unwrap();
            let error = Tokenizer::from_folder(folder.path()).unwrap_err().to_string();
            assert!(error.contains("`chat_template` is neither"), "{error}");
        }
    }
}
