//! Text to token ids and back, as the checkpoint's own tokenizer does it.
//!
//! Every source, a Hugging Face folder or a GGUF file's metadata, becomes one `tokenizer.json`; the `tokenizers` crate
//! runs it.

mod folder;
mod from_gguf;
mod stream;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

pub use stream::StreamDecoder;

use super::{ChatTemplate, Error, Gguf, Result};
use crate::files;

const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const GENERATION_CONFIG: &str = "generation_config.json";

/// A checkpoint's tokenizer, with its special tokens and its chat template.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The same tokenizer without the space that it puts before a text; `None` where it puts none.
    continuing: Option<Box<tokenizers::Tokenizer>>,
    vocab_size: usize,
    special: SpecialIds,
    chat_template: Option<ChatTemplate>,
}

/// The ids of the tokens with a part to play.
#[derive(Clone, Debug, Default)]
struct SpecialIds {
    bos: Option<u32>,
    /// The first is the one that ends a text.
    eos: Vec<u32>,
    pad: Option<u32>,
}

/// What a source of a tokenizer has to say.
struct Parts {
    path: PathBuf,
    /// A `tokenizer.json`.
    json: Value,
    special: SpecialIds,
    /// A Jinja source.
    chat_template: Option<String>,
}

impl Tokenizer {
    /// The tokenizer of a Hugging Face folder: `tokenizer.json`, and what `tokenizer_config.json`,
    /// `special_tokens_map.json`, `generation_config.json`, `config.json` and `chat_template.jinja` add, where present.
    ///
    /// # Errors
    /// When `tokenizer.json` is missing, or a file does not hold what it should.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        Self::assemble(folder::read(folder)?)
    }

    /// The tokenizer that a GGUF file's metadata describes: byte-level BPE (`gpt2`) or SentencePiece BPE (`llama`).
    ///
    /// # Errors
    /// When the metadata describes another kind, an unknown pre-tokenizer, or contradicts itself.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        Self::assemble(from_gguf::read(gguf)?)
    }

    fn assemble(parts: Parts) -> Result<Self> {
        let Parts { path, mut json, mut special, chat_template } = parts;
        // Cutting and padding are the caller's decisions.
        if let Some(fields) = json.as_object_mut() {
            fields.insert("truncation".into(), Value::Null);
            fields.insert("padding".into(), Value::Null);
        }
        let inner = build(&json, &path)?;
        let continuing = if drop_prefix_space(&mut json) { Some(Box::new(build(&json, &path)?)) } else { None };
        let vocab_size = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        special.keep_below(vocab_size);
        let text = |id: Option<u32>| id.and_then(|id| inner.id_to_token(id));
        let (bos, eos) = (text(special.bos), text(special.eos.first().copied()));
        let chat_template =
            chat_template.map(|source| ChatTemplate::new(&source, bos.as_deref(), eos.as_deref())).transpose();
        let chat_template = chat_template.map_err(|error| Error::Tokenizer { path, reason: error.to_string() })?;
        Ok(Self { inner, continuing, vocab_size, special, chat_template })
    }

    /// The ids of a text. With `add_special`, the tokens that the model expects around a text are added (`<s>`); special
    /// tokens written in the text are recognised either way.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        encode(&self.inner, text, add_special)
    }

    /// The ids of a text that goes on where another ended: nothing is put before it, neither a special token nor the
    /// space that SentencePiece tokenizers begin a text with.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn encode_continuation(&self, text: &str) -> Result<Vec<u32>> {
        encode(self.continuing.as_deref().unwrap_or(&self.inner), text, false)
    }

    /// The text of some ids, without special tokens if `skip_special`. Ids outside the vocabulary give nothing.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let decoded = self.inner.decode(ids, skip_special);
        decoded.map_err(|error| Error::Tokenize { action: "decode tokens", reason: error.to_string() })
    }

    /// Decodes ids one at a time; see [`StreamDecoder::new`].
    pub fn stream(&self, prompt: &[u32], skip_special: bool) -> StreamDecoder<'_> {
        StreamDecoder::new(self, prompt, skip_special)
    }

    /// One more than the largest id, added tokens included. A model may have more rows than that, for alignment.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.special.bos
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.special.eos.first().copied()
    }

    /// Every token that ends generation; the first is [`eos`](Self::eos).
    pub fn eos_ids(&self) -> &[u32] {
        &self.special.eos
    }

    /// Whether a token ends generation.
    pub fn is_eos(&self, id: u32) -> bool {
        self.special.eos.contains(&id)
    }

    /// The padding token.
    pub fn pad(&self) -> Option<u32> {
        self.special.pad
    }

    /// A token's text as the vocabulary spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Whether a token is a special one, which a text does not produce by itself.
    pub fn is_special(&self, id: u32) -> bool {
        let text = self.inner.id_to_token(id);
        text.is_some_and(|text| self.inner.get_added_vocabulary().is_special_token(&text))
    }

    /// The chat template, if the checkpoint has one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// Checks that a model with `vocab_size` embeddings knows every id that `text` gave.
    ///
    /// # Errors
    /// Names the first token that it does not know.
    pub fn check_vocabulary(&self, text: &str, ids: &[u32], vocab_size: usize) -> Result<()> {
        let Some(&id) = ids.iter().find(|&&id| id as usize >= vocab_size) else { return Ok(()) };
        let text = text.chars().take(60).collect();
        Err(Error::Vocabulary { text, token: self.token(id).unwrap_or_default(), id, vocab_size })
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json` and `generation_config.json` into a folder, so that
    /// [`from_folder`](Self::from_folder) and transformers read the same tokenizer there.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let path = folder.join(TOKENIZER);
        let text = self.inner.to_string(true).map_err(|error| unbuildable(&path, error))?;
        std::fs::write(&path, text).map_err(files::Error::io("write", &path))?;
        let token = |id: Option<u32>| id.and_then(|id| self.token(id));
        let config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": token(self.bos()),
            "eos_token": token(self.eos()),
            "pad_token": token(self.pad()),
            "chat_template": self.chat_template.as_ref().map(ChatTemplate::source),
            "clean_up_tokenization_spaces": false,
        });
        files::write_json(&folder.join(TOKENIZER_CONFIG), "a tokenizer's configuration", &without_nulls(config))?;
        let generation = json!({
            "bos_token_id": self.bos(),
            "eos_token_id": self.eos_ids(),
            "pad_token_id": self.pad(),
        });
        let what = "a generation configuration";
        Ok(files::write_json(&folder.join(GENERATION_CONFIG), what, &without_nulls(generation))?)
    }
}

impl SpecialIds {
    /// Forgets ids that no token has, so that none of them reaches an embedding.
    fn keep_below(&mut self, vocab_size: usize) {
        let known = |id: &u32| (*id as usize) < vocab_size;
        self.bos = self.bos.filter(known);
        self.pad = self.pad.filter(known);
        self.eos.retain(known);
    }
}

fn build(json: &Value, path: &Path) -> Result<tokenizers::Tokenizer> {
    let bytes = serde_json::to_vec(json).map_err(|error| unbuildable(path, error))?;
    tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| unbuildable(path, error))
}

fn unbuildable(path: &Path, error: impl std::fmt::Display) -> Error {
    Error::Tokenizer { path: path.into(), reason: error.to_string() }
}

fn encode(tokenizer: &tokenizers::Tokenizer, text: &str, add_special: bool) -> Result<Vec<u32>> {
    match tokenizer.encode_fast(text, add_special) {
        Ok(encoding) => Ok(encoding.get_ids().to_vec()),
        Err(error) => Err(Error::Tokenize { action: "encode a text", reason: error.to_string() }),
    }
}

fn without_nulls(mut value: Value) -> Value {
    if let Some(fields) = value.as_object_mut() {
        fields.retain(|_, field| !field.is_null());
    }
    value
}

/// A post-processor that puts the given tokens around a text.
fn surround(before: Option<(&str, u32)>, after: Option<(&str, u32)>) -> Value {
    if before.is_none() && after.is_none() {
        return Value::Null;
    }
    let special = |token: Option<(&str, u32)>, segment: u32| {
        token.map(|(text, _)| json!({"SpecialToken": {"id": text, "type_id": segment}}))
    };
    let sequence = |name: &str, segment: u32| Some(json!({"Sequence": {"id": name, "type_id": segment}}));
    let part = |name: &str, segment: u32| [special(before, segment), sequence(name, segment), special(after, segment)];
    let single: Vec<Value> = part("A", 0).into_iter().flatten().collect();
    let pair: Vec<Value> = part("A", 0).into_iter().chain(part("B", 1)).flatten().collect();
    let tokens: serde_json::Map<String, Value> = [before, after]
        .into_iter()
        .flatten()
        .map(|(text, id)| (text.to_string(), json!({"id": text, "ids": [id], "tokens": [text]})))
        .collect();
    json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens})
}

/// Takes the space before a text out of a `tokenizer.json`; says whether there was one.
fn drop_prefix_space(json: &mut Value) -> bool {
    let normalizer = json.get_mut("normalizer").is_some_and(|stage| {
        edit_stage(stage, "normalizers", &|stage| {
            let prepends = stage.get("type").is_some_and(|kind| kind == "Prepend");
            if prepends {
                // A normalizer that does nothing.
                *stage = json!({"type": "Sequence", "normalizers": []});
            }
            prepends
        })
    });
    let pre_tokenizer = json.get_mut("pre_tokenizer").is_some_and(|stage| {
        edit_stage(stage, "pretokenizers", &|stage| {
            let Some(fields) = stage.as_object_mut() else { return false };
            let scheme = fields.get("prepend_scheme").and_then(Value::as_str).map(str::to_string);
            let flag = fields.get("add_prefix_space").and_then(Value::as_bool);
            if fields.contains_key("prepend_scheme") {
                fields.insert("prepend_scheme".into(), "never".into());
            }
            if fields.contains_key("add_prefix_space") {
                fields.insert("add_prefix_space".into(), false.into());
            }
            match scheme {
                Some(scheme) => scheme != "never",
                None => flag.unwrap_or(false),
            }
        })
    });
    normalizer || pre_tokenizer
}

/// Applies an edit to a stage of the pipeline, or to every stage of a sequence; says whether any changed something.
fn edit_stage(stage: &mut Value, children: &str, edit: &dyn Fn(&mut Value) -> bool) -> bool {
    match stage.get_mut(children).and_then(Value::as_array_mut) {
        Some(stages) => {
            stages.iter_mut().filter_map(|stage| edit_stage(stage, children, edit).then_some(())).count() > 0
        }
        None => edit(stage),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::testing::{shared, smollm2};

    fn ids(value: &Value) -> Vec<u32> {
        value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
    }

    fn stories() -> Option<Tokenizer> {
        Some(Tokenizer::from_folder(&shared("models/stories260k")?).unwrap())
    }

    /// Ids by the Python tokenizer of the original checkpoint.
    #[test]
    fn a_gguf_gives_the_ids_of_the_original_tokenizer() {
        let (Some(gguf), Some(path)) = (smollm2(), shared("models/smollm2-reference.json")) else { return };
        let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
        let reference: Value = files::read_json(&path, "a reference").unwrap();
        let tokens = reference["tokens"].as_array().unwrap().iter().map(|case| (&case["text"], &case["ids"]));
        let prompts = reference["cases"].as_array().unwrap().iter().map(|case| (&case["prompt"], &case["input_ids"]));
        for (text, expected) in tokens.chain(prompts) {
            let text = text.as_str().unwrap();
            assert_eq!(tokenizer.encode(text, true).unwrap(), ids(expected), "{text:?}");
        }
        for case in reference["cases"].as_array().unwrap() {
            let text = tokenizer.decode(&ids(&case["greedy_32"]), true).unwrap();
            assert_eq!(text, case["greedy_text"].as_str().unwrap());
        }
        assert_eq!(tokenizer.vocab_size(), 49152);
        assert_eq!((tokenizer.bos(), tokenizer.eos_ids(), tokenizer.pad()), (Some(1), &[2][..], Some(2)));
        assert!(tokenizer.is_special(1) && !tokenizer.is_special(905));
        assert!(tokenizer.chat_template().is_some());
    }

    #[test]
    fn a_folder_gives_the_reference_ids() {
        let (Some(tokenizer), Some(path)) = (stories(), shared("models/stories260k/reference.json")) else { return };
        let reference: Value = files::read_json(&path, "a reference").unwrap();
        for case in reference["cases"].as_array().unwrap() {
            let prompt = case["prompt"].as_str().unwrap();
            let input = ids(&case["input_ids"]);
            assert_eq!(tokenizer.encode(prompt, true).unwrap(), input);
            assert_eq!(tokenizer.encode(prompt, false).unwrap(), input[1..]);
            assert_eq!(tokenizer.decode(&input, true).unwrap(), prompt);
        }
        assert_eq!((tokenizer.bos(), tokenizer.eos_ids()), (Some(1), &[2][..]));
        assert!(tokenizer.is_eos(2) && !tokenizer.is_eos(1));
        assert_eq!(tokenizer.token(1).as_deref(), Some("<s>"));
    }

    #[test]
    fn a_continuation_gets_no_space_of_its_own() {
        let Some(tokenizer) = stories() else { return };
        let whole = tokenizer.encode("Once upon a time", false).unwrap();
        let mut parts = tokenizer.encode("Once upon", false).unwrap();
        parts.extend(tokenizer.encode_continuation(" a time").unwrap());
        assert_eq!(parts, whole);
    }

    #[test]
    fn an_id_outside_the_models_vocabulary_is_named() {
        let Some(tokenizer) = stories() else { return };
        let ids = tokenizer.encode("Once", false).unwrap();
        tokenizer.check_vocabulary("Once", &ids, 512).unwrap();
        let error = tokenizer.check_vocabulary("Once", &ids, 100).unwrap_err().to_string();
        assert!(error.contains("Once") && error.contains("100 entries"), "{error}");
    }

    #[test]
    fn what_was_saved_is_what_is_read() {
        let Some(gguf) = smollm2() else { return };
        let original = Tokenizer::from_gguf(&gguf).unwrap();
        let folder = tempfile::tempdir().unwrap();
        original.save(folder.path()).unwrap();
        let read = Tokenizer::from_folder(folder.path()).unwrap();
        let text = "<|im_start|>user\nNaïve 10,5 € 👍🏽<|im_end|>";
        assert_eq!(read.encode(text, true).unwrap(), original.encode(text, true).unwrap());
        assert_eq!((read.bos(), read.eos_ids(), read.pad()), (original.bos(), original.eos_ids(), original.pad()));
        let source = |tokenizer: &Tokenizer| tokenizer.chat_template().unwrap().source().to_string();
        assert_eq!(source(&read), source(&original));
    }

    #[test]
    fn a_damaged_folder_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(Tokenizer::from_folder(folder.path()), Err(Error::Tokenizer { .. })));
        std::fs::write(folder.path().join(TOKENIZER), "{\"model\": 3}").unwrap();
        assert!(matches!(Tokenizer::from_folder(folder.path()), Err(Error::Tokenizer { .. })));
        std::fs::write(folder.path().join(TOKENIZER), "{").unwrap();
        assert!(matches!(Tokenizer::from_folder(folder.path()), Err(Error::Files(_))));
    }
}
