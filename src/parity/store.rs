//! References kept from one verification to the next, by what they were computed from.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use ndarray::Array2;

use super::reference::{Ports, ReferenceCase, candle};
use super::run::{Call, Script};
use super::{Case, Reference, Result};
use crate::base::DecoderSpec;
use crate::files;
use crate::runtime::NamedValues;

/// Changes with the layout of the files, and where the same inputs would give other numbers.
const VERSION: u32 = 2;

/// A folder of references, bounded in size: the longest unused go first.
#[derive(Clone, Debug)]
pub struct ReferenceStore {
    folder: PathBuf,
    limit: u64,
}

impl ReferenceStore {
    /// A store in `folder`, which need not exist, of at most `limit` bytes.
    pub fn new(folder: PathBuf, limit: u64) -> Self {
        Self { folder, limit }
    }

    /// The key of a reference: the hash of everything that it depends on. `parts` are hashes of files and options in words.
    pub fn key(parts: &[String], cases: &[Case]) -> String {
        let cases: Vec<_> = cases
            .iter()
            .map(|case| {
                let rows = |array: &Array2<i64>| array.outer_iter().map(|row| row.to_vec()).collect::<Vec<_>>();
                (case.name(), rows(case.ids()), rows(case.mask()), case.steps(), case.chunk(), case.models().to_vec())
            })
            .collect();
        let tool = env!("CARGO_PKG_VERSION");
        files::sha256_bytes(format!("{VERSION} {tool} {parts:?} {cases:?}").as_bytes())
    }

    /// The reference of a key, with candle's own logits, if it is kept and whole.
    pub fn load(
        &self,
        key: &str,
        cases: Vec<Case>,
        precision: &'static str,
        spec: &DecoderSpec,
    ) -> Option<(Reference, Vec<Array2<f64>>)> {
        let path = self.path(key);
        let mut values = path.is_file().then(|| NamedValues::load(&path))?.ok()?;
        let loaded = cases.into_iter().enumerate().map(|(index, case)| read(&mut values, index, case));
        let (cases, own): (Vec<_>, Vec<_>) = loaded.collect::<Option<Vec<_>>>()?.into_iter().unzip();
        // The time of the last use decides what goes first; a folder that cannot be written to keeps its times.
        if let Ok(file) = std::fs::File::options().append(true).open(&path) {
            let _ = file.set_modified(SystemTime::now());
        }
        let (ports, source) = (Ports::of(spec), candle(precision));
        Some((Reference { spec: Some(spec.clone()), ports, precision, source, cases }, own))
    }

    /// Keeps a reference. A single one that is larger than the whole store is not kept.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn save(&self, key: &str, reference: &Reference, own: &[Array2<f64>]) -> Result<()> {
        let numbers = reference.cases.iter().map(|case| case.logits.len()).sum::<usize>();
        if numbers as u64 * 16 > self.limit {
            return Ok(());
        }
        std::fs::create_dir_all(&self.folder).map_err(files::Error::io("create folder", &self.folder)).map_err(io)?;
        let mut values = NamedValues::new();
        for (index, (case, own)) in reference.cases.iter().zip(own).enumerate() {
            let (calls, prefill) = case.script.calls();
            for (call, (ids, mask)) in calls.enumerate() {
                values.insert(format!("{index}.{call}.ids"), ids.clone().into_dyn());
                values.insert(format!("{index}.{call}.mask"), mask.clone().into_dyn());
            }
            values.insert(format!("{index}.prefill"), ndarray::arr0(prefill as i64).into_dyn());
            values.insert(format!("{index}.reference"), case.logits.clone().into_dyn());
            values.insert(format!("{index}.own"), own.clone().into_dyn());
        }
        // Written aside and renamed, so that a reader never sees half of it.
        let aside = tempfile::NamedTempFile::new_in(&self.folder);
        let aside = aside.map_err(files::Error::io("write into", &self.folder)).map_err(io)?;
        values.save(aside.path())?;
        let path = self.path(key);
        let kept = aside.persist(&path).map_err(|error| error.error);
        kept.map_err(files::Error::io("write", path)).map_err(io)?;
        self.trim();
        Ok(())
    }

    /// Deletes what was unused longest, until the rest fits.
    fn trim(&self) {
        let Ok(entries) = std::fs::read_dir(&self.folder) else { return };
        let mut kept: Vec<(SystemTime, u64, PathBuf)> = entries
            .filter_map(|entry| {
                let entry = entry.ok()?;
                let facts = entry.metadata().ok()?;
                is_reference(&entry.path()).then_some((facts.modified().ok()?, facts.len(), entry.path()))
            })
            .collect();
        kept.sort();
        let mut total: u64 = kept.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, bytes, path) in kept {
            if total <= self.limit {
                return;
            }
            if std::fs::remove_file(path).is_ok() {
                total = total.saturating_sub(bytes);
            }
        }
    }

    fn path(&self, key: &str) -> PathBuf {
        self.folder.join(format!("{key}.safetensors"))
    }
}

fn io(error: files::Error) -> super::Error {
    crate::runtime::Error::from(error).into()
}

fn is_reference(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "safetensors")
}

fn read(values: &mut NamedValues, index: usize, case: Case) -> Option<(ReferenceCase, Array2<f64>)> {
    let mut numbers = |name: &str| -> Option<Array2<f64>> {
        values.take(&format!("{index}.{name}")).ok()?.into_f64().ok()?.into_dimensionality().ok()
    };
    let (logits, own) = (numbers("reference")?, numbers("own")?);
    let prefill = values.take(&format!("{index}.prefill")).ok()?.into_i64().ok()?;
    let prefill = usize::try_from(*prefill.first()?).ok()?;
    let mut calls = Vec::new();
    while let Ok(ids) = values.take(&format!("{index}.{}.ids", calls.len())) {
        let mask = values.take(&format!("{index}.{}.mask", calls.len())).ok()?;
        let indices = |value: crate::runtime::Value| value.into_i64().ok()?.into_dimensionality().ok();
        calls.push(Call::new(indices(ids)?, indices(mask)?));
    }
    let script = Script::new(calls, prefill, case.models());
    let whole = script.spots.len() == logits.nrows() && logits.dim() == own.dim();
    let case = ReferenceCase::new(case, script, logits).ok()?;
    whole.then_some((case, own))
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::parity::testing::{self, Candle, tiny_decoder};

    fn reference() -> (Reference, Vec<Array2<f64>>) {
        let model = Candle::new(tiny_decoder(DType::F64), None);
        let reference = Reference::compute(model.model(), testing::cases(&testing::tiny_spec())).unwrap();
        let narrow = Candle::new(tiny_decoder(DType::F32), None);
        let own = reference.replay(narrow.model()).unwrap();
        (reference, own)
    }

    #[test]
    fn a_kept_reference_is_the_computed_one() {
        let folder = tempfile::tempdir().unwrap();
        let store = ReferenceStore::new(folder.path().join("references"), 1 << 30);
        let (reference, own) = reference();
        let (spec, cases) = (testing::tiny_spec(), testing::cases(&testing::tiny_spec()));
        let key = ReferenceStore::key(&["weights".into()], &cases);
        assert!(store.load(&key, cases.clone(), "f64", &spec).is_none());
        store.save(&key, &reference, &own).unwrap();
        let (kept, kept_own) = store.load(&key, cases.clone(), "f64", &spec).unwrap();
        assert_eq!(kept_own, own);
        for (kept, computed) in kept.cases.iter().zip(&reference.cases) {
            assert_eq!((&kept.script, &kept.logits), (&computed.script, &computed.logits));
            assert_eq!(kept.case, computed.case);
        }
        assert_eq!(kept.cases.len(), reference.cases.len());
        // a damaged file is no reference, and no error
        std::fs::write(store.path(&key), "damaged").unwrap();
        assert!(store.load(&key, cases, "f64", &spec).is_none());
    }

    #[test]
    fn the_key_is_of_every_input() {
        let cases = testing::cases(&testing::tiny_spec());
        let key = |part: &str, cases: &[Case]| ReferenceStore::key(&[part.into()], cases);
        assert_eq!(key("a", &cases), key("a", &cases));
        assert_ne!(key("a", &cases), key("b", &cases));
        assert_ne!(key("a", &cases), key("a", &cases[1..]));
        let chunked = [cases[0].clone().chunked(2)];
        assert_ne!(key("a", &cases[..1]), key("a", &chunked));
    }

    #[test]
    fn the_longest_unused_go_when_the_store_is_full() {
        let folder = tempfile::tempdir().unwrap();
        let (reference, own) = reference();
        let store = |limit| ReferenceStore::new(folder.path().into(), limit);
        store(1 << 30).save("a", &reference, &own).unwrap();
        let size = std::fs::metadata(folder.path().join("a.safetensors")).unwrap().len();
        let old = std::fs::File::options().append(true).open(folder.path().join("a.safetensors")).unwrap();
        old.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        store(size * 5 / 2).save("b", &reference, &own).unwrap();
        assert!(folder.path().join("a.safetensors").exists(), "both fit");
        store(size * 5 / 2).save("c", &reference, &own).unwrap();
        let mut names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["b.safetensors", "c.safetensors"]);
        store(size / 4).save("d", &reference, &own).unwrap();
        assert!(!folder.path().join("d.safetensors").exists(), "larger than the store");
    }
}
