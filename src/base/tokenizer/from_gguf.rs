//! A `tokenizer.json` from the metadata of a GGUF file.
//!
//! llama.cpp keeps the vocabulary, and of the rest only names: which model (`gpt2`, `llama`) and which pre-tokenizer.
//! This module says what the names stand for.

use std::collections::{HashMap, HashSet};

use candle_core::quantized::gguf_file;
use serde_json::{Value, json};

use super::{Parts, SpecialIds, surround};
use crate::base::gguf::{Gguf, unsigned};
use crate::base::{Error, Result};

const UNKNOWN: u64 = 2;
const NORMAL: u64 = 1;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

/// The longest piece that merges are rebuilt for, in bytes; SentencePiece's own default is 16 characters.
const MAX_PIECE: usize = 1024;

/// GPT-2 with digits one by one.
const SMOLLM: &[&str] = &["smollm", "starcoder", "refact", "codeshell"];
const GPT2: &[&str] = &["gpt-2", "gpt2", "default", "phi-2"];
const LLAMA3: &[&str] = &["llama-bpe", "llama3", "llama-v3"];
const QWEN2: &[&str] = &["qwen2", "deepseek-r1-qwen"];

pub(super) fn read(gguf: &Gguf) -> Result<Parts> {
    let vocabulary = Vocabulary::read(gguf)?;
    let (stages, add_bos) = match gguf.required("tokenizer.ggml.model", Gguf::string)? {
        "gpt2" => byte_level(gguf, &vocabulary)?,
        "llama" => (sentence_piece(gguf, &vocabulary)?, true),
        other => {
            return Err(Error::GgufUnsupported {
                path: gguf.path().into(),
                reason: format!("its tokenizer is of the kind `{other}`; `gpt2` and `llama` are supported"),
                help: "use the model's Hugging Face folder, which carries a tokenizer.json",
            });
        }
    };
    let bos = vocabulary.id("bos")?;
    let eos = vocabulary.ends()?;
    let token = |flag: bool, id: Option<u32>| {
        let id = id.filter(|_| flag)?;
        Some((*vocabulary.tokens.get(id as usize)?, id))
    };
    let add_bos = gguf.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(add_bos);
    let add_eos = gguf.bool("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
    let post_processor = surround(token(add_bos, bos), token(add_eos, eos.first().copied()));
    let json = json!({
        "version": "1.0",
        "added_tokens": vocabulary.added_tokens()?,
        "normalizer": stages.normalizer,
        "pre_tokenizer": stages.pre_tokenizer,
        "post_processor": post_processor,
        "decoder": stages.decoder,
        "model": stages.model,
    });
    let special = SpecialIds { bos, eos, pad: vocabulary.id("padding")? };
    let chat_template = gguf.chat_template()?.map(str::to_string);
    Ok(Parts { path: gguf.path().into(), json, special, chat_template })
}

/// What differs between the two kinds of tokenizer.
struct Stages {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    model: Value,
}

struct Vocabulary<'a> {
    gguf: &'a Gguf,
    tokens: Vec<&'a str>,
    /// One of the token types above per token; all normal where the file does not say.
    types: Vec<u64>,
}

impl<'a> Vocabulary<'a> {
    fn read(gguf: &'a Gguf) -> Result<Self> {
        let tokens = gguf.required("tokenizer.ggml.tokens", Gguf::strings)?;
        let types = gguf.list("tokenizer.ggml.token_type", "an array of integers", unsigned)?;
        let types = types.unwrap_or_else(|| vec![NORMAL; tokens.len()]);
        check_length(gguf, "tokenizer.ggml.token_type", types.len(), tokens.len())?;
        Ok(Self { gguf, tokens, types })
    }

    /// The id under `tokenizer.ggml.{role}_token_id`.
    fn id(&self, role: &str) -> Result<Option<u32>> {
        let key = format!("tokenizer.ggml.{role}_token_id");
        let Some(id) = self.gguf.u64(&key)? else { return Ok(None) };
        match u32::try_from(id) {
            Ok(id) if (id as usize) < self.tokens.len() => Ok(Some(id)),
            _ => {
                let reason = format!("is {id}, but there are {} tokens", self.tokens.len());
                Err(Error::Metadata { path: self.gguf.path().into(), key, reason })
            }
        }
    }

    /// Tokens that end generation: of the text, of the turn, of the message.
    fn ends(&self) -> Result<Vec<u32>> {
        let mut ends = Vec::new();
        for role in ["eos", "eot", "eom"] {
            ends.extend(self.id(role)?.filter(|id| !ends.contains(id)));
        }
        Ok(ends)
    }

    /// Tokens that are looked for in a text before it is split: control tokens, which are special, and those that a user
    /// defined, which are not.
    fn added_tokens(&self) -> Result<Value> {
        let mut special: HashSet<usize> = self.ends()?.into_iter().map(|id| id as usize).collect();
        special.extend(self.id("bos")?.map(|id| id as usize));
        let added = self.tokens.iter().zip(&self.types).enumerate().filter_map(|(id, (text, kind))| {
            let special = special.contains(&id) || matches!(*kind, UNKNOWN | CONTROL);
            (special || *kind == USER_DEFINED).then(|| {
                json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                       "normalized": false, "special": special})
            })
        });
        Ok(added.collect())
    }

    fn ids(&self) -> HashMap<&'a str, usize> {
        self.tokens.iter().enumerate().map(|(id, token)| (*token, id)).collect()
    }

    fn json(&self) -> Value {
        self.ids().into_iter().map(|(token, id)| (token.to_string(), Value::from(id))).collect()
    }
}

fn check_length(gguf: &Gguf, key: &str, length: usize, tokens: usize) -> Result<()> {
    if length == tokens {
        return Ok(());
    }
    let reason = format!("has {length} elements for {tokens} tokens");
    Err(Error::Metadata { path: gguf.path().into(), key: key.into(), reason })
}

/// Byte-level BPE; also whether the family begins a text with a token.
fn byte_level(gguf: &Gguf, vocabulary: &Vocabulary) -> Result<(Stages, bool)> {
    let name = gguf.string("tokenizer.ggml.pre")?.unwrap_or_else(|| {
        tracing::warn!("{} names no pre-tokenizer; GPT-2's is used", gguf.path().display());
        "gpt-2"
    });
    let family = [SMOLLM, GPT2, LLAMA3, QWEN2].into_iter().find(|names| names.contains(&name));
    let Some(family) = family else {
        let known = [SMOLLM, GPT2, LLAMA3, QWEN2].concat();
        return Err(Error::PreTokenizer { path: gguf.path().into(), found: name.into(), known });
    };
    let is_llama3 = family == LLAMA3;
    let model = json!({
        "type": "BPE",
        "fuse_unk": false,
        "byte_fallback": false,
        "ignore_merges": is_llama3,
        "vocab": vocabulary.json(),
        "merges": stored_merges(gguf)?,
    });
    let stages = Stages {
        normalizer: if family == QWEN2 { json!({"type": "NFC"}) } else { Value::Null },
        pre_tokenizer: pre_tokenizer(family),
        decoder: byte_level_stage(true),
        model,
    };
    Ok((stages, is_llama3))
}

fn byte_level_stage(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

/// How a family splits a text before BPE. `use_regex` is GPT-2's own pattern.
fn pre_tokenizer(family: &[&str]) -> Value {
    if family == GPT2 {
        return byte_level_stage(true);
    }
    if family == SMOLLM {
        let digits = json!({"type": "Digits", "individual_digits": true});
        return json!({"type": "Sequence", "pretokenizers": [digits, byte_level_stage(true)]});
    }
    let digits = if family == LLAMA3 { "{1,3}" } else { "" };
    let pattern = format!(
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{{L}}\\p{{N}}]?\\p{{L}}+|\\p{{N}}{digits}| \
         ?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    );
    let split = json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    json!({"type": "Sequence", "pretokenizers": [split, byte_level_stage(false)]})
}

fn stored_merges(gguf: &Gguf) -> Result<Value> {
    let key = "tokenizer.ggml.merges";
    let merges = gguf.required(key, Gguf::strings)?;
    let pairs: Option<Vec<Value>> =
        merges.iter().map(|merge| merge.split_once(' ').map(|(left, right)| json!([left, right]))).collect();
    pairs.map(Value::from).ok_or_else(|| Error::Metadata {
        path: gguf.path().into(),
        key: key.into(),
        reason: "holds a merge that is no pair of tokens".into(),
    })
}

/// SentencePiece BPE with byte fallback, in the stages of Hugging Face's (legacy) Llama tokenizer.
fn sentence_piece(gguf: &Gguf, vocabulary: &Vocabulary) -> Result<Stages> {
    let unknown = vocabulary.id("unknown")?.unwrap_or(0);
    let add_prefix = gguf.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if add_prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let model = json!({
        "type": "BPE",
        "unk_token": vocabulary.tokens.get(unknown as usize),
        "fuse_unk": true,
        "byte_fallback": true,
        "ignore_merges": false,
        "vocab": vocabulary.json(),
        "merges": merges_by_score(gguf, vocabulary)?,
    });
    Ok(Stages {
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Value::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        model,
    })
}

/// SentencePiece joins the two neighbours whose joint piece has the highest score; a list of merges in the order of the
/// pieces' scores does the same. A piece that can come about in several ways gives one merge for each.
fn merges_by_score(gguf: &Gguf, vocabulary: &Vocabulary) -> Result<Value> {
    let scores = gguf.required("tokenizer.ggml.scores", |gguf, key| gguf.list(key, "an array of numbers", score))?;
    check_length(gguf, "tokenizer.ggml.scores", scores.len(), vocabulary.tokens.len())?;
    let ids = vocabulary.ids();
    let mut merges = Vec::new();
    for ((piece, kind), score) in vocabulary.tokens.iter().zip(&vocabulary.types).zip(scores) {
        if *kind != NORMAL {
            continue;
        }
        if piece.len() > MAX_PIECE {
            let reason = format!("holds a piece of {} bytes; at most {MAX_PIECE} are supported", piece.len());
            return Err(Error::Metadata { path: gguf.path().into(), key: "tokenizer.ggml.tokens".into(), reason });
        }
        let splits = piece.char_indices().skip(1).filter_map(|(at, _)| piece.split_at_checked(at));
        merges.extend(splits.filter_map(|(left, right)| Some((score, ids.get(left)?, ids.get(right)?, left, right))));
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| (a.1, a.2).cmp(&(b.1, b.2))));
    Ok(merges.into_iter().map(|(_, _, _, left, right)| json!([left, right])).collect())
}

fn score(value: &gguf_file::Value) -> Option<f32> {
    match value {
        gguf_file::Value::F32(score) => Some(*score),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Tokenizer;
    use crate::base::gguf::testing::write;
    use crate::base::testing::shared;
    use gguf_file::Value as Meta;

    type Entries = Vec<(&'static str, Meta)>;

    fn text(value: &str) -> Meta {
        Meta::String(value.into())
    }

    fn gguf(metadata: &[(&'static str, Meta)]) -> Result<Tokenizer> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.gguf");
        write(&path, metadata, &[]);
        Tokenizer::from_gguf(&Gguf::open(&path).unwrap())
    }

    fn vocabulary(kind: &str, tokens: &[(&str, u32)]) -> Entries {
        vec![
            ("tokenizer.ggml.model", text(kind)),
            ("tokenizer.ggml.tokens", Meta::Array(tokens.iter().map(|(token, _)| text(token)).collect())),
            ("tokenizer.ggml.token_type", Meta::Array(tokens.iter().map(|(_, kind)| Meta::U32(*kind)).collect())),
        ]
    }

    /// The vocabulary of stories260k with the scores that SentencePiece's BPE trainer gives: less for every merge learnt.
    fn stories() -> Option<(Tokenizer, Entries)> {
        let folder = shared("models/stories260k")?;
        let json: Value = crate::files::read_json(&folder.join("tokenizer.json"), "a tokenizer").unwrap();
        let mut pieces: Vec<(u64, String)> = json["model"]["vocab"]
            .as_object()
            .unwrap()
            .iter()
            .map(|(piece, id)| (id.as_u64().unwrap(), piece.clone()))
            .collect();
        pieces.sort();
        let kind = |id: u64| match id {
            0 => UNKNOWN,
            1 | 2 => CONTROL,
            3..=258 => 6,
            _ => NORMAL,
        };
        let tokens: Vec<(&str, u32)> = pieces.iter().map(|(id, piece)| (piece.as_str(), kind(*id) as u32)).collect();
        let mut metadata = vocabulary("llama", &tokens);
        let scores = pieces.iter().map(|(id, _)| Meta::F32(259.0 - id.max(&259).to_owned() as f32)).collect();
        metadata.extend([
            ("tokenizer.ggml.scores", Meta::Array(scores)),
            ("tokenizer.ggml.bos_token_id", Meta::U32(1)),
            ("tokenizer.ggml.eos_token_id", Meta::U32(2)),
            ("tokenizer.ggml.unknown_token_id", Meta::U32(0)),
        ]);
        Some((Tokenizer::from_folder(&folder).unwrap(), metadata))
    }

    const TEXTS: [&str; 6] = [
        "Once upon a time, there was a little girl named Lily.",
        "  Tom and his dog\n\nran   away! ",
        "naïve 👍🏽 日本語",
        "",
        "<s>hello</s> world",
        "aaaaaaaaaaa the the themselves",
    ];

    #[test]
    fn sentence_piece_merges_come_back_from_the_scores() {
        let Some((original, metadata)) = stories() else { return };
        let rebuilt = gguf(&metadata).unwrap();
        for text in TEXTS {
            let ids = original.encode(text, true).unwrap();
            assert_eq!(rebuilt.encode(text, true).unwrap(), ids, "{text:?}");
            assert_eq!(rebuilt.decode(&ids, true).unwrap(), original.decode(&ids, true).unwrap());
            let continued = rebuilt.encode_continuation(text).unwrap();
            assert_eq!(continued, original.encode_continuation(text).unwrap(), "{text:?}");
        }
        assert_eq!((rebuilt.bos(), rebuilt.eos_ids(), rebuilt.vocab_size()), (Some(1), &[2][..], 512));
    }

    #[test]
    fn the_space_and_the_first_token_are_the_files_choice() {
        let Some((original, mut metadata)) = stories() else { return };
        metadata.push(("tokenizer.ggml.add_space_prefix", Meta::Bool(false)));
        metadata.push(("tokenizer.ggml.add_bos_token", Meta::Bool(false)));
        let tokenizer = gguf(&metadata).unwrap();
        let text = "the dog";
        assert_eq!(tokenizer.encode(text, true).unwrap(), original.encode_continuation(text).unwrap());
        assert_eq!(tokenizer.decode(&tokenizer.encode(" dog", false).unwrap(), true).unwrap(), " dog");
    }

    /// Single bytes and a few merges; enough to see where a pre-tokenizer splits.
    fn digits(pre: &str) -> Result<Tokenizer> {
        let tokens =
            [("1", 1), ("2", 1), ("12", 1), ("Ġ", 1), ("1212", 1), ("x", 1), ("<c>", 3), ("<u>", 4), ("121", 1)];
        let mut metadata = vocabulary("gpt2", &tokens);
        let merges = ["1 2", "12 12", "12 1"].map(text).to_vec();
        metadata.extend([("tokenizer.ggml.merges", Meta::Array(merges)), ("tokenizer.ggml.pre", text(pre))]);
        metadata.push(("tokenizer.ggml.bos_token_id", Meta::U32(6)));
        gguf(&metadata)
    }

    #[test]
    fn each_pre_tokenizer_splits_digits_in_its_way() {
        let encode = |pre: &str| digits(pre).unwrap().encode("1212", false).unwrap();
        assert_eq!(encode("smollm"), [0, 1, 0, 1]);
        assert_eq!(encode("qwen2"), [0, 1, 0, 1]);
        assert_eq!(encode("gpt-2"), [4]);
        assert_eq!(encode("llama-bpe"), [8, 1]);
        assert_eq!(digits("llama-bpe").unwrap().encode("x", true).unwrap(), [6, 5], "Llama 3 begins with a token");
        assert_eq!(digits("gpt-2").unwrap().encode("x", true).unwrap(), [5]);
    }

    #[test]
    fn control_tokens_are_special_and_user_defined_ones_are_text() {
        let tokenizer = digits("smollm").unwrap();
        let ids = tokenizer.encode("x<c>x<u>", false).unwrap();
        assert_eq!(ids, [5, 6, 5, 7]);
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "xx<u>");
        assert!(tokenizer.is_special(6) && !tokenizer.is_special(7));
    }

    #[test]
    fn what_is_not_known_is_an_error() {
        assert!(matches!(digits("klingon"), Err(Error::PreTokenizer { .. })));
        assert!(matches!(gguf(&vocabulary("t5", &[("a", 1)])), Err(Error::GgufUnsupported { .. })));
        assert!(matches!(gguf(&vocabulary("llama", &[("a", 1)])), Err(Error::Metadata { .. })), "no scores");
        let mut metadata = vocabulary("gpt2", &[("a", 1)]);
        metadata.push(("tokenizer.ggml.merges", Meta::Array(vec![text("a b")])));
        assert!(matches!(gguf(&metadata), Err(Error::Tokenizer { .. })), "a merge of a token that is not there");
        metadata.push(("tokenizer.ggml.eos_token_id", Meta::U32(1)));
        assert!(matches!(gguf(&metadata), Err(Error::Metadata { .. })), "an id that is not there");
    }
}
