//! Rows of a Parquet file.

use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use serde_json::{Map, Value};

use super::{Row, Visit, record};
use crate::data::{Error, Result};
use crate::files as disk;

/// Lists and structs become JSON arrays and objects. Only the row group in work is in memory.
pub(super) fn read(path: &Path, visit: Visit<'_>) -> Result<()> {
    let file = disk::open(path)?;
    let broken = |at: Option<usize>| {
        move |reason: String| {
            let reason = match at {
                Some(row) => format!("is no readable Parquet file: at record {row}: {reason}"),
                None => format!("is no readable Parquet file: {reason}"),
            };
            let help = "it is damaged, or packed in a way other than Snappy or Zstandard; write it again, or as JSONL";
            Error::File { path: path.into(), reason, help: help.into() }
        }
    };
    let reader = guarded(|| SerializedFileReader::new(file)).map_err(broken(None))?;
    let mut rows = guarded(|| reader.get_row_iter(None)).map_err(broken(None))?;
    let path: Arc<Path> = path.into();
    for number in 1.. {
        let next = guarded(|| rows.next().transpose()).map_err(broken(Some(number)))?;
        let Some(row) = next else { break };
        let fields = row.get_column_iter().map(|(name, field)| (name.clone(), json(field))).collect();
        visit(Row { place: record(&path, number), fields, of_table: false })?;
    }
    Ok(())
}

fn json(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(value) => (*value).into(),
        Field::Byte(value) => (*value).into(),
        Field::Short(value) => (*value).into(),
        Field::Int(value) => (*value).into(),
        Field::Long(value) => (*value).into(),
        Field::UByte(value) => (*value).into(),
        Field::UShort(value) => (*value).into(),
        Field::UInt(value) => (*value).into(),
        Field::ULong(value) => (*value).into(),
        Field::Float(value) => (*value).into(),
        Field::Double(value) => (*value).into(),
        Field::Str(text) => text.as_str().into(),
        // a text that the schema does not call one
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).map_or(Value::Null, Value::from),
        Field::Group(row) => {
            Value::Object(row.get_column_iter().map(|(name, field)| (name.clone(), json(field))).collect())
        }
        Field::ListInternal(list) => list.elements().iter().map(json).collect(),
        Field::MapInternal(map) => {
            let name = |key: &Field| match json(key) {
                Value::String(text) => text,
                other => other.to_string(),
            };
            Value::Object(map.entries().iter().map(|(key, value)| (name(key), json(value))).collect::<Map<_, _>>())
        }
        // dates, times and decimals as the format writes them
        other => other.to_string().into(),
    }
}

/// The format's crate trusts some of what a file says; its panic on a damaged one becomes a text.
fn guarded<T>(work: impl FnOnce() -> std::result::Result<T, ParquetError>) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|error| shown(&error)),
        Err(_) => Err("its parts contradict each other".into()),
    }
}

fn shown(error: &impl Display) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Written by pyarrow: `fixtures/data/make.py`.
    const FIXTURE: &[u8] = include_bytes!("../../../fixtures/data/preference.parquet");

    fn rows(bytes: &[u8]) -> std::result::Result<Vec<Value>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("d.parquet");
        std::fs::write(&path, bytes).unwrap();
        let mut rows = Vec::new();
        let mut visit = |row: Row| {
            rows.push(Value::Object(row.fields));
            Ok(())
        };
        read(&path, &mut visit).map_err(|error| error.to_string())?;
        Ok(rows)
    }

    #[test]
    fn pyarrows_rows_are_read() {
        let expected: Value = serde_json::from_str(include_str!("../../../fixtures/data/preference.json")).unwrap();
        assert_eq!(Value::Array(rows(FIXTURE).unwrap()), expected);
    }

    #[test]
    fn a_cut_file_is_an_error() {
        let error = rows(&FIXTURE[..FIXTURE.len() / 2]).unwrap_err();
        assert!(error.contains("is no readable Parquet file"), "{error}");
        assert!(rows(b"PAR1").is_err() && rows(b"").is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        #[test]
        fn damaged_files_are_rows_or_an_error(at in 0..FIXTURE.len(), byte in any::<u8>(), more in any::<u8>()) {
            let mut bytes = FIXTURE.to_vec();
            let other = (at * 31 + usize::from(more)) % bytes.len();
            bytes[at] = byte;
            bytes[other] ^= more;
            let _: std::result::Result<Vec<Value>, String> = rows(&bytes);
        }
    }
}
