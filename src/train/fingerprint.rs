//! Whether the base model is the one that a run was started with.

use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Result;
use crate::base::Checkpoint;
use crate::files;

/// What tells base models apart at little cost: the configuration, and of each file of weights its size and a hash of its
/// beginning (the header, with every tensor's name, type and shape) and of blocks spread evenly over the rest.
///
/// Weights that were trained further, quantised or converted differ in every block. A change of single numbers between
/// blocks is not seen: the hashes of whole files are in the finished run's `prefold.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// SHA-256 of the configuration.
    config: String,
    /// The files by name.
    files: Vec<Sample>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Sample {
    name: String,
    bytes: u64,
    sha256: String,
}

/// Bytes at the beginning, which are read whole.
const HEAD: u64 = 1 << 20;
/// Blocks of the rest, and their size.
const BLOCKS: u64 = 256;
const BLOCK: u64 = 4096;

impl Fingerprint {
    /// Reads at most 2 MiB of each file.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let mut files: Vec<Sample> =
            checkpoint.weight_files().iter().map(|path| sample(path)).collect::<files::Result<_>>()?;
        files.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self { config: files::sha256_bytes(checkpoint.config().to_string().as_bytes()), files })
    }

    /// What differs, as a phrase; none for the same model. Names of files do not matter where there is one.
    pub(super) fn difference(&self, other: &Self) -> Option<String> {
        if self.config != other.config {
            return Some("the base model's configuration differs".into());
        }
        if self.files.len() != other.files.len() {
            return Some(format!("the base model has {} weight files, not {}", other.files.len(), self.files.len()));
        }
        let differs = |(a, b): &(&Sample, &Sample)| a.bytes != b.bytes || a.sha256 != b.sha256;
        let (a, b) = self.files.iter().zip(&other.files).find(differs)?;
        let how =
            if a.bytes == b.bytes { "other weights".into() } else { format!("{} bytes, not {}", b.bytes, a.bytes) };
        Some(format!("the base model differs: {} holds {how}", b.name))
    }
}

fn sample(path: &Path) -> files::Result<Sample> {
    let mut file = files::open(path)?;
    let bytes = file.metadata().map_err(files::Error::io("read", path))?.len();
    let mut hasher = Sha256::new();
    let rest = bytes.saturating_sub(HEAD);
    let whole = rest <= BLOCKS * BLOCK;
    let mut pieces = vec![(0, if whole { bytes } else { HEAD })];
    if !whole {
        // the last block ends with the file
        pieces.extend((0..BLOCKS).map(|at| (HEAD + (rest - BLOCK) / (BLOCKS - 1) * at, BLOCK)));
        pieces.push((bytes - BLOCK, BLOCK));
    }
    for (from, length) in pieces {
        let mut buffer = vec![0; length as usize];
        let read = file.seek(SeekFrom::Start(from)).and_then(|_| file.read_exact(&mut buffer));
        read.map_err(files::Error::io("read", path))?;
        hasher.update(&buffer);
    }
    let sha256 = hasher.finalize().iter().map(|b| format!("{b:02x}")).collect();
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    Ok(Sample { name, bytes, sha256 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(content: &[u8]) -> Fingerprint {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        std::fs::write(&path, content).unwrap();
        Fingerprint { config: "c".into(), files: vec![sample(&path).unwrap()] }
    }

    #[test]
    fn says_what_differs() {
        let mut weights: Vec<u8> = (0..3_000_001u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let whole = of(&weights);
        assert_eq!(whole.difference(&of(&weights)), None);
        let small = of(&weights[..1_500_000]);
        assert_eq!(
            whole.difference(&small).unwrap(),
            "the base model differs: weights holds 1500000 bytes, not 3000001"
        );
        for at in [0, (1 << 20) - 1, 1 << 20, weights.len() - 1] {
            weights[at] ^= 1;
            let changed = whole.difference(&of(&weights)).unwrap();
            assert_eq!(changed, "the base model differs: weights holds other weights", "byte {at}");
            weights[at] ^= 1;
        }
        let other = Fingerprint { config: "d".into(), ..whole.clone() };
        assert_eq!(whole.difference(&other).unwrap(), "the base model's configuration differs");
        // a file of up to 2 MiB is hashed whole
        weights.truncate(1_500_000);
        for at in (0..weights.len()).step_by(99_991) {
            weights[at] ^= 1;
            assert!(small.difference(&of(&weights)).is_some(), "byte {at}");
            weights[at] ^= 1;
        }
    }
}
