//! What goes between prefold and the process of a runtime: frames of a JSON header and the bytes of tensors.
//!
//! | bytes | what |
//! |---|---|
//! | 4 | length of the header, little-endian |
//! | 8 | length of the body, little-endian |
//! | … | the header, JSON |
//! | … | the body: tensors in the header's order, each row-major and little-endian |

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{Error, ErrorKind, Read, Result, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{DType, Port, RuntimeInfo, Setup};

/// No header is longer; a longer one is no header.
const LONGEST_HEADER: u32 = 1 << 28;

/// What the runtime's process is asked to do.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Request {
    /// Load a graph, whose path need not be text.
    Open { setup: Setup, graph: OsString, fed: Vec<String> },
    /// Run it; `release` names tensors that are no longer wanted.
    Run { feeds: Vec<Feed>, release: Vec<u64> },
    /// Give a tensor that it holds, and hold it no longer.
    Fetch { id: u64 },
}

/// An input of a run.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Feed {
    /// The next tensor of the body.
    Inline { name: String, kind: Kind },
    /// One that the process holds; it goes into the run.
    Held { name: String, id: u64 },
}

/// What the runtime's process answers.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Response {
    Opened {
        inputs: Vec<Port>,
        optional: Vec<Port>,
        outputs: Vec<Port>,
        info: RuntimeInfo,
    },
    Ran {
        outputs: Vec<Held>,
        info: RuntimeInfo,
        nodes: Option<BTreeMap<String, usize>>,
    },
    /// The body is the tensor.
    Fetched {
        kind: Kind,
    },
    Failed {
        message: String,
        unavailable: bool,
    },
}

/// An output that the process holds.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Held {
    pub(super) name: String,
    pub(super) id: u64,
    pub(super) kind: Kind,
}

/// Element type and shape.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Kind {
    pub(super) dtype: DType,
    pub(super) shape: Vec<usize>,
}

impl Kind {
    /// Bytes of such a tensor, if there can be one.
    pub(super) fn bytes(&self) -> Option<usize> {
        let size = match self.dtype {
            DType::F64 | DType::I64 => 8,
            DType::F32 | DType::I32 => 4,
            DType::F16 | DType::Bf16 => 2,
            DType::I8 | DType::U8 | DType::Bool => 1,
        };
        self.shape.iter().try_fold(size, |bytes: usize, dim| bytes.checked_mul(*dim))
    }
}

/// Writes a frame.
pub(super) fn write(to: &mut impl Write, header: &impl Serialize, body: &[u8]) -> Result<()> {
    let header = serde_json::to_vec(header)?;
    let length = u32::try_from(header.len()).ok().filter(|length| *length <= LONGEST_HEADER);
    let length = length.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "the header is too long"))?;
    to.write_all(&length.to_le_bytes())?;
    to.write_all(&(body.len() as u64).to_le_bytes())?;
    to.write_all(&header)?;
    to.write_all(body)?;
    to.flush()
}

/// Reads a frame.
pub(super) fn read<T: DeserializeOwned>(from: &mut impl Read) -> Result<(T, Vec<u8>)> {
    let (mut header, mut body) = ([0; 4], [0; 8]);
    from.read_exact(&mut header)?;
    from.read_exact(&mut body)?;
    let header = u32::from_le_bytes(header);
    if header > LONGEST_HEADER {
        return Err(Error::new(ErrorKind::InvalidData, "this is no frame of prefold"));
    }
    let header = exactly(from, header.into())?;
    let body = exactly(from, u64::from_le_bytes(body))?;
    Ok((serde_json::from_slice(&header)?, body))
}

/// As many bytes as announced. Memory grows with what comes, not with what is announced.
fn exactly(from: &mut impl Read, length: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(length).read_to_end(&mut bytes)?;
    if bytes.len() as u64 == length { Ok(bytes) } else { Err(ErrorKind::UnexpectedEof.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_back_as_it_was_and_a_cut_one_is_an_error() {
        let mut bytes = Vec::new();
        write(&mut bytes, &Request::Fetch { id: 7 }, &[1, 2, 3]).unwrap();
        let (header, body) = read::<Request>(&mut bytes.as_slice()).unwrap();
        assert!(matches!(header, Request::Fetch { id: 7 }));
        assert_eq!(body, [1, 2, 3]);
        for length in 0..bytes.len() {
            let error = read::<Request>(&mut &bytes[..length]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "{length} bytes");
        }
        assert_eq!(read::<Request>(&mut &[255; 64][..]).unwrap_err().kind(), ErrorKind::InvalidData);
    }

    #[test]
    fn impossible_shapes_have_no_size() {
        let kind = |shape: &[usize]| Kind { dtype: DType::F16, shape: shape.into() }.bytes();
        assert_eq!((kind(&[2, 3]), kind(&[]), kind(&[0, 7])), (Some(12), Some(2), Some(0)));
        assert_eq!(kind(&[usize::MAX, 2]), None);
    }
}
