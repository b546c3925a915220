//! A cheap, shared slice of a file or of an encoded message.

use std::ops::Deref;
use std::sync::Arc;

use crate::files::MappedFile;

#[derive(Debug)]
enum Source {
    Owned(Vec<u8>),
    Mapped(MappedFile),
}

/// A slice of a shared buffer: cloning and cutting it copies nothing.
#[derive(Clone, Debug)]
pub struct Bytes {
    source: Arc<Source>,
    start: usize,
    end: usize,
}

impl Bytes {
    /// All bytes of a mapped file.
    pub(crate) fn from_map(map: MappedFile) -> Self {
        let end = map.bytes().len();
        Self { source: Arc::new(Source::Mapped(map)), start: 0, end }
    }

    /// Where the slice starts in its buffer: for a model that was read from a file, the offset in that file.
    pub fn offset(&self) -> usize {
        self.start
    }

    /// The part from `from` up to `to`, both counted from the start of this slice; none when it is not inside.
    pub(crate) fn cut(&self, from: usize, to: usize) -> Option<Self> {
        if from > to || to > self.len() {
            return None;
        }
        Some(Self { source: self.source.clone(), start: self.start + from, end: self.start + to })
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        let end = bytes.len();
        Self { source: Arc::new(Source::Owned(bytes)), start: 0, end }
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let all = match &*self.source {
            Source::Owned(bytes) => bytes.as_slice(),
            Source::Mapped(map) => map.bytes(),
        };
        all.get(self.start..self.end).unwrap_or(&[])
    }
}

impl PartialEq for Bytes {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Bytes {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_stays_inside() {
        let bytes = Bytes::from(vec![1, 2, 3, 4]);
        let middle = bytes.cut(1, 3).unwrap();
        assert_eq!((&*middle, middle.offset()), (&[2, 3][..], 1));
        assert_eq!(&*middle.cut(1, 2).unwrap(), &[3]);
        assert!(middle.cut(0, 3).is_none() && middle.cut(2, 1).is_none());
    }
}
