//! What leads from a folded file back to the file before: pieces of the folded file, and the few bytes that it lost.
//!
//! As text: the lower-case hexadecimal form of a zlib stream of steps, each a tag and numbers in LEB128: `0 start length` copies,
//! `1 length bytes` inserts.

use std::collections::HashMap;
use std::io::{BufRead, Read, Write};

use crate::onnx::Bytes;

/// The most that a stored delta may unpack to: far more than any fold changes.
const MAX_UNPACKED: u64 = 256 << 20;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Copy { start: u64, length: u64 },
    Insert(Vec<u8>),
}

/// A way from one sequence of bytes to another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Delta(Vec<Step>);

impl Delta {
    /// The way from `from` to `to`. Both are cut at field boundaries, and what was not edited is the same cut of one buffer
    /// or else the same bytes.
    pub(super) fn between(from: &[Bytes], to: &[Bytes]) -> Self {
        let place = |piece: &Bytes| (piece.as_ptr() as usize, piece.len());
        let mut starts = Vec::with_capacity(from.len());
        let mut end = 0;
        for piece in from {
            starts.push(end);
            end += piece.len() as u64;
        }
        let by_place: HashMap<_, _> = from.iter().zip(&starts).map(|(piece, start)| (place(piece), *start)).collect();
        let known: std::collections::HashSet<_> = to.iter().map(place).collect();
        let mut by_content: HashMap<&[u8], Vec<u64>> = HashMap::new();
        for (piece, start) in from.iter().zip(&starts).filter(|(piece, _)| !known.contains(&place(piece))) {
            by_content.entry(piece).or_default().push(*start);
        }
        let mut delta = Self::default();
        let (mut next, mut copied) = (0, 0);
        for piece in to.iter().filter(|piece| !piece.is_empty()) {
            let found = by_place.get(&place(piece)).copied().or_else(|| {
                let starts = by_content.get(&**piece)?;
                // of equal pieces the one that goes on where the last copy ended
                starts.iter().find(|start| **start >= next).or_else(|| starts.first()).copied()
            });
            copied += piece.len() as u64;
            match found.filter(|_| copied <= end) {
                Some(start) => {
                    next = start + piece.len() as u64;
                    delta.copy(start, piece.len() as u64);
                }
                None => {
                    copied -= piece.len() as u64;
                    delta.insert(piece);
                }
            }
        }
        delta
    }

    fn copy(&mut self, from: u64, more: u64) {
        match self.0.last_mut() {
            Some(Step::Copy { start, length }) if *start + *length == from => *length += more,
            _ if more == 0 => {}
            _ => self.0.push(Step::Copy { start: from, length: more }),
        }
    }

    fn insert(&mut self, bytes: &[u8]) {
        match self.0.last_mut() {
            Some(Step::Insert(inserted)) => inserted.extend_from_slice(bytes),
            _ => self.0.push(Step::Insert(bytes.to_vec())),
        }
    }

    /// The pieces that the way leads to; none where it does not fit `from`.
    pub(super) fn apply(&self, from: &[Bytes]) -> Option<Vec<Bytes>> {
        let mut starts = Vec::with_capacity(from.len());
        let mut size = 0u64;
        for piece in from {
            starts.push(size);
            size += piece.len() as u64;
        }
        let mut pieces = Vec::new();
        for step in &self.0 {
            let (start, length) = match step {
                Step::Insert(bytes) => {
                    pieces.push(bytes.clone().into());
                    continue;
                }
                Step::Copy { start, length } => (*start, *length),
            };
            let end = start.checked_add(length).filter(|end| *end <= size)?;
            let mut at = start;
            let mut index = starts.partition_point(|begin| *begin <= start).checked_sub(1)?;
            while at < end {
                let (begin, piece) = (*starts.get(index)?, from.get(index)?);
                let until = end.min(begin + piece.len() as u64);
                if until > at {
                    pieces.push(piece.cut((at - begin) as usize, (until - begin) as usize)?);
                    at = until;
                }
                index += 1;
            }
        }
        Some(pieces)
    }

    /// As text.
    pub(super) fn encode(&self) -> std::io::Result<String> {
        let mut packer = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
        for step in &self.0 {
            match step {
                Step::Copy { start, length } => {
                    packer.write_all(&[0])?;
                    varint(&mut packer, *start)?;
                    varint(&mut packer, *length)?;
                }
                Step::Insert(bytes) => {
                    packer.write_all(&[1])?;
                    varint(&mut packer, bytes.len() as u64)?;
                    packer.write_all(bytes)?;
                }
            }
        }
        Ok(packer.finish()?.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// From text; none where it is damaged. A fold only adds, so that no way back copies more than the folded file's `size`: what
    /// is unpacked stays in proportion to the file that it came from.
    pub(super) fn decode(text: &str, size: u64) -> Option<Self> {
        let digits = text.as_bytes().as_chunks::<2>();
        let pairs = digits.1.is_empty().then_some(digits.0)?.iter();
        let packed: Vec<u8> =
            pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect::<Option<_>>()?;
        let unpacker = flate2::read::ZlibDecoder::new(packed.as_slice()).take(MAX_UNPACKED);
        let mut unpacker = std::io::BufReader::new(unpacker);
        let (mut delta, mut copied) = (Self::default(), 0u64);
        while !unpacker.fill_buf().ok()?.is_empty() {
            match read_byte(&mut unpacker)? {
                0 => {
                    let (start, length) = (read_varint(&mut unpacker)?, read_varint(&mut unpacker)?);
                    copied = copied.checked_add(length).filter(|copied| *copied <= size)?;
                    delta.copy(start, length);
                }
                1 => {
                    let length = read_varint(&mut unpacker)?;
                    let mut bytes = Vec::new();
                    unpacker.by_ref().take(length).read_to_end(&mut bytes).ok()?;
                    (bytes.len() as u64 == length).then(|| delta.insert(&bytes))?;
                }
                _ => return None,
            }
        }
        Some(delta)
    }
}

fn varint(out: &mut impl Write, mut value: u64) -> std::io::Result<()> {
    while value >= 0x80 {
        out.write_all(&[(value & 0x7f) as u8 | 0x80])?;
        value >>= 7;
    }
    out.write_all(&[value as u8])
}

fn read_byte(from: &mut impl Read) -> Option<u8> {
    let mut byte = [0];
    from.read_exact(&mut byte).ok()?;
    Some(byte[0])
}

fn read_varint(from: &mut impl Read) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..63).step_by(7) {
        let byte = read_byte(from)?;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn flat(pieces: &[Bytes]) -> Vec<u8> {
        pieces.iter().flat_map(|piece| piece.to_vec()).collect()
    }

    #[test]
    fn unchanged_pieces_become_one_copy() {
        let file = Bytes::from((0..200u8).collect::<Vec<_>>());
        let cut = |from, to| file.cut(from, to).unwrap();
        let before = [cut(0, 10), cut(10, 90), cut(90, 120), cut(120, 200)];
        let folded =
            [cut(0, 10), vec![9; 50].into(), cut(10, 90), vec![8; 31].into(), cut(120, 200), vec![7; 5].into()];
        let delta = Delta::between(&folded, &before);
        let expected = [
            Step::Copy { start: 0, length: 10 },
            Step::Copy { start: 60, length: 80 },
            Step::Insert((90..120).collect()),
            Step::Copy { start: 171, length: 80 },
        ];
        assert_eq!(delta.0, expected);
        assert_eq!(flat(&delta.apply(&folded).unwrap()), &file[..]);
        assert!(delta.apply(&folded[..3]).is_none());
    }

    /// A few bytes of text that would unpack to gigabytes.
    #[test]
    fn a_way_to_more_than_there_was_is_refused() {
        let text = |step: &[u8]| {
            let mut packer = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
            (0..1 << 22).for_each(|_| packer.write_all(step).unwrap());
            packer.finish().unwrap().iter().map(|byte| format!("{byte:02x}")).collect::<String>()
        };
        let copies = text(&[0, 0, 3]);
        assert!(copies.len() < 1 << 16 && Delta::decode(&copies, 1 << 20).is_none());
        let nothing = Delta::decode(&text(&[0, 0, 0]), 3).unwrap();
        assert!(nothing.0.len() <= 1, "steps of no length");
        let inserts = Delta::decode(&text(&[1, 1, 7]), 3).unwrap();
        assert_eq!(inserts.0, [Step::Insert(vec![7; 1 << 22])]);
        assert_eq!(Delta::decode(&text(&[1, 0]), 3).unwrap().0.len(), 1);
    }

    proptest! {
        /// Whatever both are, however the file is cut afterwards.
        #[test]
        fn leads_back(from in pieces(), to in pieces(), split in 0usize..40) {
            let cut = |pieces: &[Vec<u8>]| pieces.iter().map(|p| Bytes::from(p.clone())).collect::<Vec<_>>();
            let (from, to) = (cut(&from), cut(&to));
            let delta = Delta::between(&from, &to);
            let text = delta.encode().unwrap();
            let size = from.iter().map(|piece| piece.len() as u64).sum();
            prop_assert_eq!(&Delta::decode(&text, size).unwrap(), &delta);
            let file = Bytes::from(flat(&from));
            let middle = split.min(file.len());
            let again = [file.cut(0, middle).unwrap(), file.cut(middle, file.len()).unwrap()];
            prop_assert_eq!(flat(&delta.apply(&again).unwrap()), flat(&to));
        }

        #[test]
        fn damaged_text_is_refused_or_another_way(text in "[0-9a-f]{0,80}") {
            if let Some(delta) = Delta::decode(&text, 3) {
                let _ = delta.apply(&[vec![1, 2, 3].into()]);
            }
        }
    }

    fn pieces() -> impl Strategy<Value = Vec<Vec<u8>>> {
        proptest::collection::vec(proptest::collection::vec(0u8..3, 0..6), 0..12)
    }
}
