//! The fuzz targets, over their seeds and over mutations of them that are the same in every run: what `fuzz/README.md` looks for with
//! a fuzzer, in a few seconds.

#[path = "../../fuzz/src/lib.rs"]
pub mod targets;

use std::path::{Path, PathBuf};

/// Mutations of each seed.
const MUTATIONS: u64 = 60;
/// Numbers at which lengths and counts go wrong.
const EDGES: [u8; 8] = [0x00, 0x01, 0x7f, 0x80, 0xff, 0x0a, 0x12, 0x3a];

fn seeds() -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds");
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let name = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();
    paths.iter().map(|path| (name(path), std::fs::read(path).unwrap())).collect()
}

/// Numbers that look like chance (splitmix64).
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound.max(1) as u64) as usize
    }

    fn mutated(&mut self, bytes: &[u8], other: &[u8]) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        for _ in 0..=self.below(3) {
            let at = self.below(bytes.len());
            let end = (at + 1 + self.below(40)).min(bytes.len());
            match self.below(6) {
                0 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << self.below(8)),
                1 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte = EDGES[self.below(EDGES.len())]),
                2 => bytes.truncate(at),
                3 => drop(bytes.drain(at..end)),
                4 => drop(bytes.splice(at..at, bytes[at..end].to_vec())),
                _ => {
                    let from = self.below(other.len());
                    let piece = other.iter().skip(from).take(1 + self.below(200)).copied().collect::<Vec<_>>();
                    drop(bytes.splice(at..end, piece));
                }
            }
        }
        bytes
    }
}

fn all(bytes: &[u8]) {
    for target in [targets::graph, targets::fold, targets::unfold, targets::adapter] {
        target(bytes);
    }
}

#[test]
fn seeds_and_mutations_of_them_make_no_target_panic() {
    let seeds = seeds();
    assert!(seeds.len() > 3);
    let mut chance = Chance(7);
    for (name, bytes) in &seeds {
        all(bytes);
        for mutation in 0..MUTATIONS {
            let other = &seeds[chance.below(seeds.len())].1;
            let mutated = chance.mutated(bytes, other);
            let found = std::panic::catch_unwind(|| all(&mutated));
            assert!(found.is_ok(), "{name}, mutation {mutation}");
        }
    }
}
