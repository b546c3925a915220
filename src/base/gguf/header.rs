//! A walk over a GGUF header that believes nothing it reads.
//!
//! candle's reader builds a value for every element that a header announces, and computes with the sizes it finds. This
//! walk goes first, allocates nothing in proportion to a claim, and refuses a file whose claims do not fit into it.

use std::collections::HashSet;
use std::path::Path;

use candle_core::quantized::GgmlDType;

use crate::base::{Error, Result};

/// The largest vocabularies have about 300,000 tokens, with a score, a type and one or two merges each.
const MAX_ARRAY_ELEMENTS: u64 = 1 << 22;
/// No known metadata nests deeper than an array of arrays.
const MAX_DEPTH: usize = 4;
/// As many dimensions as a ggml tensor can have.
const MAX_DIMENSIONS: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_ALIGNMENT: u64 = 1 << 20;

const TYPE_U32: u32 = 4;
const TYPE_BOOL: u32 = 7;
const TYPE_STRING: u32 = 8;
const TYPE_ARRAY: u32 = 9;

/// Checks a whole header: magic, version, every metadata entry, every tensor's type, shape and place in the file.
pub(super) fn check(bytes: &[u8], path: &Path) -> Result<()> {
    let mut walk = Walk { bytes, at: 0, path, elements: 0 };
    if walk.take(4, "the magic number")? != b"GGUF" {
        return Err(walk.damaged("it does not begin with `GGUF`"));
    }
    let version = walk.u32("the version")?;
    if !matches!(version, 2 | 3) {
        let reason = match version.swap_bytes() {
            2 | 3 => "it is a big-endian GGUF file".to_string(),
            _ => format!("it is GGUF version {version}; versions 2 and 3 are supported"),
        };
        return Err(walk.unsupported(reason, "convert the model again with a current llama.cpp"));
    }
    let tensors = walk.u64("the number of tensors")?;
    let entries = walk.u64("the number of metadata entries")?;
    let alignment = walk.metadata(entries)?;
    let sizes = walk.tensors(tensors, alignment)?;
    walk.check_places(&sizes, alignment)
}

/// A tensor's claim on the file.
struct Extent {
    name: String,
    offset: u64,
    bytes: u64,
}

struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
    path: &'a Path,
    /// Array elements seen so far, all arrays together.
    elements: u64,
}

impl<'a> Walk<'a> {
    fn damaged(&self, reason: impl Into<String>) -> Error {
        Error::Gguf { path: self.path.into(), reason: reason.into() }
    }

    fn unsupported(&self, reason: impl Into<String>, help: &'static str) -> Error {
        Error::GgufUnsupported { path: self.path.into(), reason: reason.into(), help }
    }

    fn take(&mut self, count: u64, what: &str) -> Result<&'a [u8]> {
        let taken = usize::try_from(count)
            .ok()
            .and_then(|count| self.at.checked_add(count))
            .and_then(|end| Some((end, self.bytes.get(self.at..end)?)));
        let Some((end, slice)) = taken else {
            let left = self.bytes.len().saturating_sub(self.at);
            return Err(self.damaged(format!(
                "it ends inside {what}: {count} bytes are announced at offset {}, {left} are left",
                self.at
            )));
        };
        self.at = end;
        Ok(slice)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64, what)?);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn string(&mut self, what: &str) -> Result<&'a [u8]> {
        let length = self.u64(what)?;
        self.take(length, what)
    }

    fn name(&mut self, what: &str) -> Result<String> {
        Ok(String::from_utf8_lossy(self.string(what)?).into_owned())
    }

    /// Walks the metadata; gives the alignment of the tensor data.
    fn metadata(&mut self, entries: u64) -> Result<u64> {
        let mut alignment = DEFAULT_ALIGNMENT;
        let mut keys = HashSet::new();
        for index in 0..entries {
            let key = self.name(&format!("the key of metadata entry {index} of {entries}"))?;
            let what = format!("the metadata entry `{key}`");
            let kind = self.u32(&what)?;
            if key == "general.alignment" {
                alignment = self.alignment(kind)?;
            } else {
                self.value(kind, 0, &what)?;
            }
            if !keys.insert(key) {
                return Err(self.damaged(format!("{what} occurs twice")));
            }
        }
        Ok(alignment)
    }

    fn alignment(&mut self, kind: u32) -> Result<u64> {
        if kind != TYPE_U32 {
            return Err(self.damaged("the metadata entry `general.alignment` is not a 32-bit unsigned integer"));
        }
        let alignment = u64::from(self.u32("the alignment")?);
        if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
            return Err(self.damaged(format!("an alignment of {alignment} bytes is not possible")));
        }
        Ok(alignment)
    }

    fn value(&mut self, kind: u32, depth: usize, what: &str) -> Result<()> {
        match kind {
            TYPE_STRING => self.string(what).map(drop),
            TYPE_ARRAY => self.list(depth, what),
            TYPE_BOOL => match self.array::<1>(what)? {
                [0 | 1] => Ok(()),
                [other] => Err(self.damaged(format!("{what} holds the boolean {other}, which is neither 0 nor 1"))),
            },
            _ => match scalar_size(kind) {
                Some(size) => self.take(size, what).map(drop),
                None => Err(self.damaged(format!("{what} has the unknown value type {kind}"))),
            },
        }
    }

    fn list(&mut self, depth: usize, what: &str) -> Result<()> {
        if depth >= MAX_DEPTH {
            return Err(self.damaged(format!("{what} nests arrays more than {MAX_DEPTH} deep")));
        }
        let kind = self.u32(what)?;
        let count = self.u64(what)?;
        self.elements = self.elements.saturating_add(count);
        if self.elements > MAX_ARRAY_ELEMENTS {
            return Err(self.damaged(format!(
                "{what} announces {count} elements; all arrays together may hold {MAX_ARRAY_ELEMENTS}"
            )));
        }
        if let Some(size) = scalar_size(kind).filter(|_| kind != TYPE_BOOL) {
            return self.take(count.saturating_mul(size), what).map(drop);
        }
        for _ in 0..count {
            self.value(kind, depth + 1, what)?;
        }
        Ok(())
    }

    fn tensors(&mut self, count: u64, alignment: u64) -> Result<Vec<Extent>> {
        let mut extents = Vec::new();
        let mut names = HashSet::new();
        for index in 0..count {
            let name = self.name(&format!("the name of tensor {index} of {count}"))?;
            if !names.insert(name.clone()) {
                return Err(self.damaged(format!("the tensor `{name}` occurs twice")));
            }
            extents.push(self.tensor(name, alignment)?);
        }
        Ok(extents)
    }

    fn tensor(&mut self, name: String, alignment: u64) -> Result<Extent> {
        let what = format!("the description of the tensor `{name}`");
        let dimensions = self.u32(&what)?;
        if dimensions == 0 || dimensions > MAX_DIMENSIONS {
            return Err(self.damaged(format!("the tensor `{name}` has {dimensions} dimensions")));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(self.u64(&what)?);
        }
        let kind = self.u32(&what)?;
        let offset = self.u64(&what)?;
        let Some(dtype) = readable_dtype(kind) else {
            return Err(self.unsupported(
                format!("the tensor `{name}` is stored in ggml type {kind}"),
                "readable are F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and Q2_K to Q6_K; requantise with llama.cpp",
            ));
        };
        let Some(bytes) = tensor_bytes(&shape, dtype) else {
            return Err(
                self.damaged(format!("the tensor `{name}` has the shape {shape:?}, which is impossible for {dtype:?}"))
            );
        };
        if !offset.is_multiple_of(alignment) {
            return Err(
                self.damaged(format!("the tensor `{name}` lies at offset {offset}, not a multiple of {alignment}"))
            );
        }
        Ok(Extent { name, offset, bytes })
    }

    /// Tensor data begins after the header, at the next multiple of the alignment.
    fn check_places(&self, extents: &[Extent], alignment: u64) -> Result<()> {
        let size = self.bytes.len() as u64;
        let start = (self.at as u64).next_multiple_of(alignment);
        for Extent { name, offset, bytes } in extents {
            let end = start.checked_add(*offset).and_then(|at| at.checked_add(*bytes));
            if end.is_none_or(|end| end > size) {
                return Err(self.damaged(format!(
                    "the tensor `{name}` needs {bytes} bytes at offset {offset} of the tensor data, which begins at \
                     {start}, but the file ends at {size}"
                )));
            }
        }
        Ok(())
    }
}

fn scalar_size(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | TYPE_BOOL => Some(1),
        2 | 3 => Some(2),
        TYPE_U32 | 5 | 6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

/// The ggml types that candle dequantises, by their number in a file.
fn readable_dtype(kind: u32) -> Option<GgmlDType> {
    Some(match kind {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}

/// Size of a tensor, or `None` where it overflows, is empty, or its rows are no whole number of blocks.
fn tensor_bytes(shape: &[u64], dtype: GgmlDType) -> Option<u64> {
    let block = dtype.block_size() as u64;
    let row = *shape.first()?;
    if !row.is_multiple_of(block) || shape.contains(&0) {
        return None;
    }
    let elements = shape.iter().try_fold(1u64, |product, &n| product.checked_mul(n))?;
    (elements / block).checked_mul(dtype.type_size() as u64)
}
