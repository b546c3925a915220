//! GGUF files: metadata, a configuration in the Hugging Face form, and weights by prefold's names.
//!
//! Knows llama.cpp's conventions, so that nobody else has to: names, the order of q and k rows, what is added to norms,
//! worked-out rope scaling.

mod architecture;
mod config;
mod header;
mod names;

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::Path;

use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::{Device, Tensor};

use crate::base::{DecoderSpec, Error, Result, WeightNames};
use crate::files::MappedFile;

/// An opened GGUF file: its header parsed, its weights mapped.
#[derive(Debug)]
pub struct Gguf {
    file: MappedFile,
    content: Content,
    /// Prefold's name → name in the file.
    names: BTreeMap<String, String>,
}

impl Gguf {
    /// Opens and checks a GGUF file, version 2 or 3.
    ///
    /// # Errors
    /// When the file cannot be read, or its header does not fit the file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = MappedFile::open(path)?;
        header::check(file.bytes(), path)?;
        let content = Content::read(&mut Cursor::new(file.bytes()))
            .map_err(|error| Error::Gguf { path: path.into(), reason: error.to_string() })?;
        let names = names::index(content.tensor_infos.keys());
        Ok(Self { file, content, names })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// A metadata string.
    ///
    /// # Errors
    /// When the entry is there and is no string.
    pub fn string(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", |value| match value {
            Value::String(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// A metadata integer of any width.
    ///
    /// # Errors
    /// When the entry is there and is no integer, or negative.
    pub fn u64(&self, key: &str) -> Result<Option<u64>> {
        self.typed(key, "a non-negative integer", unsigned)
    }

    /// A metadata number.
    ///
    /// # Errors
    /// When the entry is there and is no floating-point number.
    pub fn f32(&self, key: &str) -> Result<Option<f32>> {
        self.typed(key, "a finite floating-point number", |value| {
            let number = match value {
                Value::F32(number) => *number,
                Value::F64(number) => *number as f32,
                _ => return None,
            };
            number.is_finite().then_some(number)
        })
    }

    /// A metadata boolean.
    ///
    /// # Errors
    /// When the entry is there and is no boolean.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a boolean", |value| match value {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        })
    }

    /// A metadata array.
    ///
    /// # Errors
    /// When the entry is there and is no array.
    pub fn array(&self, key: &str) -> Result<Option<&[Value]>> {
        self.typed(key, "an array", |value| match value {
            Value::Array(values) => Some(values.as_slice()),
            _ => None,
        })
    }

    /// A metadata array of strings.
    ///
    /// # Errors
    /// When the entry is there and is no array of strings.
    pub fn strings(&self, key: &str) -> Result<Option<Vec<&str>>> {
        self.list(key, "an array of strings", |value| match value {
            Value::String(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// A metadata array whose elements `read` understands.
    pub(crate) fn list<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>> {
        self.typed(key, expected, |value| match value {
            Value::Array(values) => values.iter().map(&read).collect(),
            _ => None,
        })
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.content.metadata.get(key) else { return Ok(None) };
        match read(value) {
            Some(read) => Ok(Some(read)),
            None => Err(self.metadata_error(key, format!("must be {expected}; it is {}", describe(value)))),
        }
    }

    /// A metadata entry that must be there.
    pub(crate) fn required<'a, T>(
        &'a self,
        key: &str,
        read: impl FnOnce(&'a Self, &str) -> Result<Option<T>>,
    ) -> Result<T> {
        read(self, key)?.ok_or_else(|| self.metadata_error(key, "is missing"))
    }

    fn metadata_error(&self, key: &str, reason: impl Into<String>) -> Error {
        Error::Metadata { path: self.path().into(), key: key.into(), reason: reason.into() }
    }

    /// The model's configuration as transformers would write it in `config.json`.
    ///
    /// Rope scaling that llama.cpp has worked out (Llama 3) becomes `{"rope_type": "factors", "factors": [f_0, …]}` with
    /// `head_dim / 2` divisors: the inverse frequency `i` is `theta^(-2i/head_dim) / f_i`.
    ///
    /// # Errors
    /// When the architecture is not one that prefold knows, or an entry that it needs is missing or wrong.
    pub fn config_json(&self) -> Result<serde_json::Value> {
        config::config_json(self)
    }

    /// The Jinja source of the chat template, if the file carries one.
    ///
    /// # Errors
    /// When the entry is no string.
    pub fn chat_template(&self) -> Result<Option<&str>> {
        self.string("tokenizer.chat_template")
    }

    /// The tensors' names as prefold, and transformers for a Llama, calls them, sorted. A tensor that has no such name keeps
    /// its own.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }

    /// Whether a tensor is there, by prefold's name.
    pub fn contains(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }

    /// A tensor's shape, rows first.
    ///
    /// # Errors
    /// When there is no tensor of this name.
    pub fn shape(&self, name: &str) -> Result<Vec<usize>> {
        let info = self.content.tensor_infos.get(self.stored_name(name)?);
        info.map(|info| info.shape.dims().to_vec()).ok_or_else(|| self.missing(name))
    }

    /// Where the weights of a decoder are.
    pub(super) fn weight_names(&self, spec: &DecoderSpec) -> WeightNames {
        names::weight_names(spec, |name| self.contains(name))
    }

    /// A tensor as float32 on the CPU, rows in the order and norms with the weights of transformers.
    ///
    /// # Errors
    /// When there is no tensor of this name, or its rows do not divide into the heads.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let tensor = self.dequantise(self.stored_name(name)?).map_err(|error| self.tensor_error(name, error))?;
        let header = config::Header::read(self)?;
        let architecture = header.architecture;
        if architecture.norm_offset != 0.0 && name.ends_with("norm.weight") {
            return (tensor - architecture.norm_offset).map_err(|error| self.tensor_error(name, error));
        }
        if !architecture.permuted {
            return Ok(tensor);
        }
        let heads = header.heads()?;
        let (query, key) = (heads.query as usize, heads.key_value as usize);
        let undone = match name.rsplit('.').nth(1) {
            Some("q_proj") => undo_permutation(&tensor, query),
            Some("k_proj") => undo_permutation(&tensor, key),
            Some("qkv_proj") => undo_fused(&tensor, query, key),
            _ => return Ok(tensor),
        };
        undone.map_err(|error| self.tensor_error(name, error))
    }

    fn stored_name(&self, name: &str) -> Result<&str> {
        self.names.get(name).map(String::as_str).ok_or_else(|| self.missing(name))
    }

    fn stores(&self, stored: &str) -> bool {
        self.content.tensor_infos.contains_key(stored)
    }

    fn dequantise(&self, stored: &str) -> candle_core::Result<Tensor> {
        self.content.tensor(&mut Cursor::new(self.file.bytes()), stored, &Device::Cpu)?.dequantize(&Device::Cpu)
    }

    fn missing(&self, name: &str) -> Error {
        Error::TensorMissing { path: self.path().into(), name: name.into() }
    }

    fn tensor_error(&self, name: &str, error: candle_core::Error) -> Error {
        Error::Tensor { path: self.path().into(), name: name.into(), reason: error.to_string() }
    }
}

/// llama.cpp rotates neighbouring rows, transformers rows half a head apart: its converter turned `[heads, 2, d/2, …]`
/// into `[heads, d/2, 2, …]`. This turns it back.
fn undo_permutation(tensor: &Tensor, heads: usize) -> candle_core::Result<Tensor> {
    let shape = tensor.dims();
    let rows = shape.first().copied().unwrap_or(0);
    let pair_rows = heads.checked_mul(2).filter(|&n| n > 0 && rows.is_multiple_of(n));
    let Some(pair_rows) = pair_rows else {
        candle_core::bail!("its {rows} rows do not divide into {heads} heads of an even size")
    };
    let columns = tensor.elem_count() / rows.max(1);
    tensor.reshape((heads, rows / pair_rows, 2, columns))?.transpose(1, 2)?.contiguous()?.reshape(shape)
}

/// The same for queries, keys and values in one.
fn undo_fused(tensor: &Tensor, query: usize, key: usize) -> candle_core::Result<Tensor> {
    let rows = tensor.dim(0)?;
    let heads = key.checked_mul(2).and_then(|both| both.checked_add(query)).filter(|&n| rows.is_multiple_of(n));
    let Some(heads) = heads else { candle_core::bail!("its {rows} rows do not divide into queries, keys and values") };
    let (queries, keys) = (rows / heads * query, rows / heads * key);
    let part = |start, count, heads| undo_permutation(&tensor.narrow(0, start, count)?.contiguous()?, heads);
    Tensor::cat(&[part(0, queries, query)?, part(queries, keys, key)?, tensor.narrow(0, queries + keys, keys)?], 0)
}

/// A metadata integer of any width, if it is one and not negative.
pub(crate) fn unsigned(value: &Value) -> Option<u64> {
    match *value {
        Value::U8(n) => Some(n.into()),
        Value::U16(n) => Some(n.into()),
        Value::U32(n) => Some(n.into()),
        Value::U64(n) => Some(n),
        Value::I8(n) => n.try_into().ok(),
        Value::I16(n) => n.try_into().ok(),
        Value::I32(n) => n.try_into().ok(),
        Value::I64(n) => n.try_into().ok(),
        _ => None,
    }
}

fn describe(value: &Value) -> String {
    match value {
        Value::Array(values) => match values.first() {
            Some(first) => format!("an array of {} × {:?}", values.len(), first.value_type()),
            None => "an empty array".into(),
        },
        Value::String(_) => "a string".into(),
        other => format!("{other:?}"),
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! Small GGUF files for tests.

    use super::*;
    use candle_core::quantized::{GgmlDType, QTensor, gguf_file};

    /// Writes a GGUF file with candle's writer.
    pub(crate) fn write(path: &Path, metadata: &[(&str, Value)], tensors: &[(&str, Tensor, GgmlDType)]) {
        let tensors: Vec<(&str, QTensor)> =
            tensors.iter().map(|(name, tensor, dtype)| (*name, QTensor::quantize(tensor, *dtype).unwrap())).collect();
        let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
        let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
        gguf_file::write(&mut std::fs::File::create(path).unwrap(), &metadata, &tensors).unwrap();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::quantized::GgmlDType;
    use candle_core::{D, DType, IndexOp};

    fn text(value: &str) -> Value {
        Value::String(value.into())
    }

    fn llama() -> Vec<(&'static str, Value)> {
        vec![
            ("general.architecture", text("llama")),
            ("llama.block_count", Value::U32(1)),
            ("llama.context_length", Value::U32(128)),
            ("llama.embedding_length", Value::U32(32)),
            ("llama.feed_forward_length", Value::U32(64)),
            ("llama.attention.head_count", Value::U32(4)),
            ("llama.attention.head_count_kv", Value::U32(2)),
            ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
            ("llama.rope.freq_base", Value::F32(10_000.0)),
            ("tokenizer.ggml.eos_token_id", Value::U32(2)),
        ]
    }

    fn ramp(shape: &[usize]) -> Tensor {
        let n: usize = shape.iter().product();
        Tensor::arange(0f32, n as f32, &Device::Cpu).unwrap().reshape(shape).unwrap()
    }

    fn model(extra: &[(&'static str, Value)]) -> (tempfile::TempDir, Gguf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let mut metadata = llama();
        metadata.extend(extra.iter().cloned());
        let f32 = GgmlDType::F32;
        let tensors = [
            ("token_embd.weight", ramp(&[48, 32]), GgmlDType::F16),
            ("blk.0.attn_q.weight", ramp(&[32, 32]), f32),
            ("blk.0.attn_q.bias", ramp(&[32]), f32),
            ("blk.0.attn_k.weight", ramp(&[16, 32]), f32),
            ("blk.0.attn_v.weight", ramp(&[16, 32]), GgmlDType::Q8_0),
            ("rope_freqs.weight", Tensor::new(&[1f32, 1., 2., 8.], &Device::Cpu).unwrap(), f32),
        ];
        testing::write(&path, &metadata, &tensors);
        let gguf = Gguf::open(&path).unwrap();
        (folder, gguf)
    }

    #[test]
    fn describes_itself_like_transformers() {
        let (_folder, gguf) = model(&[]);
        let config = gguf.config_json().unwrap();
        assert_eq!(config["model_type"], "llama");
        assert_eq!(config["vocab_size"], 48);
        assert_eq!(config["head_dim"], 8);
        assert_eq!(config["num_key_value_heads"], 2);
        assert_eq!(config["rms_norm_eps"], 1e-5);
        assert_eq!(config["tie_word_embeddings"], true);
        assert_eq!(config["attention_bias"], true);
        assert_eq!(config["mlp_bias"], false);
        assert_eq!(config["eos_token_id"], 2);
        assert_eq!(config["bos_token_id"], serde_json::Value::Null);
        let expected = serde_json::json!({"rope_type": "factors", "factors": [1.0, 1.0, 2.0, 8.0]});
        assert_eq!(config["rope_scaling"], expected);
        assert!(gguf.names().all(|name| name != "rope_freqs.weight"));
    }

    #[test]
    fn a_linear_factor_multiplies_the_frequency_factors() {
        let (_folder, gguf) =
            model(&[("llama.rope.scaling.type", text("linear")), ("llama.rope.scaling.factor", Value::F32(4.0))]);
        let factors = gguf.config_json().unwrap()["rope_scaling"]["factors"].clone();
        assert_eq!(factors, serde_json::json!([4.0, 4.0, 8.0, 32.0]));
    }

    /// llama.cpp rotates the pair of rows (2j, 2j+1) of a head by the angle that transformers gives rows (j, j + d/2).
    #[test]
    fn rows_of_q_and_k_come_back_in_half_split_order() {
        let (_folder, gguf) = model(&[]);
        for (name, heads, head_dim) in [("q_proj", 4, 8), ("k_proj", 2, 8)] {
            let tensor = gguf.tensor(&format!("model.layers.0.self_attn.{name}.weight")).unwrap();
            let stored = ramp(&[heads * head_dim, 32]);
            for row in 0..heads * head_dim {
                let (head, within) = (row / head_dim, row % head_dim);
                let source = head * head_dim + 2 * (within % (head_dim / 2)) + within / (head_dim / 2);
                let difference = (tensor.i(row).unwrap() - stored.i(source).unwrap()).unwrap();
                assert_eq!(difference.abs().unwrap().max(D::Minus1).unwrap().to_scalar::<f32>().unwrap(), 0.0);
            }
        }
        let bias = gguf.tensor("model.layers.0.self_attn.q_proj.bias").unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(&bias[..9], &[0., 2., 4., 6., 1., 3., 5., 7., 8.]);
    }

    #[test]
    fn every_storage_comes_out_as_float32() {
        let (_folder, gguf) = model(&[]);
        for name in ["model.embed_tokens.weight", "model.layers.0.self_attn.v_proj.weight"] {
            let tensor = gguf.tensor(name).unwrap();
            assert_eq!(tensor.dtype(), DType::F32);
            assert_eq!(tensor.dims(), gguf.shape(name).unwrap());
            let stored = ramp(&gguf.shape(name).unwrap());
            let error = (tensor - stored).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
            assert!(error.to_scalar::<f32>().unwrap() <= 2.1, "{name}: {error}");
        }
        assert!(matches!(gguf.tensor("lm_head.weight"), Err(Error::TensorMissing { .. })));
    }

    #[test]
    fn metadata_of_another_type_is_an_error_not_a_guess() {
        let (_folder, gguf) = model(&[("odd", Value::I32(-1)), ("list", Value::Array(vec![Value::U32(1)]))]);
        assert_eq!(gguf.u64("llama.block_count").unwrap(), Some(1));
        assert_eq!(gguf.u64("absent").unwrap(), None);
        assert!(matches!(gguf.u64("odd"), Err(Error::Metadata { .. })));
        assert!(matches!(gguf.strings("list"), Err(Error::Metadata { .. })));
        assert_eq!(gguf.array("list").unwrap().unwrap().len(), 1);
    }

    #[test]
    fn another_architecture_is_named_with_what_is_supported() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        testing::write(&path, &[("general.architecture", text("mamba"))], &[]);
        let error = Gguf::open(&path).unwrap().config_json().unwrap_err();
        assert!(error.to_string().contains("mamba"));
        assert!(miette::Diagnostic::help(&error).unwrap().to_string().contains("llama"));
    }

    #[test]
    fn every_truncation_is_an_error() {
        let (folder, gguf) = model(&[]);
        let bytes = std::fs::read(gguf.path()).unwrap();
        let cut = folder.path().join("cut.gguf");
        // Every length up to well inside the tensor data, then some of the rest.
        for length in (0..1500.min(bytes.len())).chain((1500..bytes.len() - 32).step_by(97)) {
            std::fs::write(&cut, &bytes[..length]).unwrap();
            assert!(Gguf::open(&cut).is_err(), "{length} of {} bytes", bytes.len());
        }
    }

    /// Whatever a damaged header says, the answer is a value or an error.
    #[test]
    fn no_damaged_byte_makes_a_panic() {
        let (folder, gguf) = model(&[
            ("tokenizer.ggml.model", text("llama")),
            ("tokenizer.ggml.tokens", Value::Array(["<unk>", "a", "b", "ab"].map(text).to_vec())),
            ("tokenizer.ggml.scores", Value::Array([0., 0., 0., -1.].map(Value::F32).to_vec())),
            ("tokenizer.ggml.token_type", Value::Array([2, 1, 1, 1].map(Value::I32).to_vec())),
        ]);
        crate::base::Tokenizer::from_gguf(&gguf).unwrap();
        let bytes = std::fs::read(gguf.path()).unwrap();
        let header = gguf.content.tensor_data_offset as usize;
        let damaged = folder.path().join("damaged.gguf");
        for at in 0..header {
            for value in [0xff, bytes[at].wrapping_add(1)] {
                let mut copy = bytes.clone();
                copy[at] = value;
                std::fs::write(&damaged, copy).unwrap();
                let Ok(gguf) = Gguf::open(&damaged) else { continue };
                drop(gguf.config_json());
                drop(crate::base::Tokenizer::from_gguf(&gguf));
                gguf.names().for_each(|name| drop(gguf.tensor(name)));
            }
        }
    }

    /// A header by hand: magic, version 3, then what a test appends.
    fn header(tensors: u64, entries: u64) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(entries.to_le_bytes());
        bytes
    }

    fn push_name(bytes: &mut Vec<u8>, name: &str) {
        bytes.extend((name.len() as u64).to_le_bytes());
        bytes.extend(name.as_bytes());
    }

    fn reason(bytes: &[u8]) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bad.gguf");
        std::fs::write(&path, bytes).unwrap();
        Gguf::open(&path).unwrap_err().to_string()
    }

    #[test]
    fn hostile_headers_are_refused() {
        assert!(reason(b"").contains("magic"));
        assert!(reason(b"ONNX\0\0\0\0").contains("begin"));
        assert!(reason(b"GGUF\x01\0\0\0").contains("version 1"));
        assert!(reason(b"GGUF\0\0\0\x03").contains("big-endian"));
        assert!(reason(&header(u64::MAX, 0)).contains("tensor 0"));
        assert!(reason(&header(0, u64::MAX)).contains("entry 0"));

        let mut array = header(0, 1);
        push_name(&mut array, "a");
        array.extend(9u32.to_le_bytes());
        let mut huge = array.clone();
        huge.extend(8u32.to_le_bytes());
        huge.extend(u64::MAX.to_le_bytes());
        assert!(reason(&huge).contains("elements"));
        let mut nested = array;
        for _ in 0..100 {
            nested.extend(9u32.to_le_bytes());
            nested.extend(1u64.to_le_bytes());
        }
        assert!(reason(&nested).contains("deep"));

        let mut alignment = header(0, 1);
        push_name(&mut alignment, "general.alignment");
        alignment.extend(4u32.to_le_bytes());
        alignment.extend(0u32.to_le_bytes());
        assert!(reason(&alignment).contains("alignment of 0"));
    }

    #[test]
    fn hostile_tensors_are_refused() {
        let tensor = |dims: &[u64], kind: u32, offset: u64| {
            let mut bytes = header(1, 0);
            push_name(&mut bytes, "t");
            bytes.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|n| bytes.extend(n.to_le_bytes()));
            bytes.extend(kind.to_le_bytes());
            bytes.extend(offset.to_le_bytes());
            bytes.resize(256, 0);
            reason(&bytes)
        };
        assert!(tensor(&[], 0, 0).contains("0 dimensions"));
        assert!(tensor(&[1; 9], 0, 0).contains("9 dimensions"));
        assert!(tensor(&[u64::MAX, 2], 0, 0).contains("impossible"));
        assert!(tensor(&[0], 0, 0).contains("impossible"));
        assert!(tensor(&[33], 2, 0).contains("impossible"));
        assert!(tensor(&[4], 23, 0).contains("type 23"));
        assert!(tensor(&[4], 0, 7).contains("multiple"));
        assert!(tensor(&[4], 0, u64::MAX - 31).contains("ends at 256"));
        assert!(tensor(&[1 << 20], 0, 0).contains("ends at 256"));
    }

    #[test]
    fn opens_smollm2() {
        let Some(gguf) = crate::base::testing::smollm2() else { return };
        let config = gguf.config_json().unwrap();
        assert_eq!(config["num_hidden_layers"], 30);
        assert_eq!(config["num_key_value_heads"], 3);
        assert_eq!(config["rope_theta"], 100_000.0);
        assert_eq!(config["rope_scaling"], serde_json::Value::Null);
        assert_eq!(gguf.names().count(), 272);
        assert!(gguf.names().all(|name| name.starts_with("model.")));
        assert_eq!(gguf.tensor("model.layers.29.self_attn.k_proj.weight").unwrap().dims(), &[192, 576]);
    }
}
