//! Files of records: which files a path names, and the rows of each.
//!
//! | name | rows |
//! |---|---|
//! | `.jsonl`, `.ndjson` | a JSON object in every line |
//! | `.json` | an array of JSON objects; an object in every line is read too |
//! | `.csv`, `.tsv` | a header, then texts |
//! | `.parquet` | with the cargo feature `parquet` |
//!
//! `.gz` after any of these but Parquet is unpacked on the way. A file of another name is read as what it begins like.

mod csv;
mod folder;
mod json;
#[cfg(feature = "parquet")]
mod parquet;

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

pub use folder::Split;
pub(super) use folder::files;

use super::place::{At, Place};
use super::{Error, Result};
use crate::files as disk;

/// A record as its file holds it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Row {
    /// Where it stands.
    pub place: Place,
    /// Its fields in the file's order.
    pub fields: Map<String, Value>,
    /// Whether it is a table's: a list can only be there as a text.
    pub of_table: bool,
}

/// What is done with every row.
pub(super) type Visit<'v> = &'v mut dyn FnMut(Row) -> Result<()>;

/// How a file holds its records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileFormat {
    JsonLines,
    Json,
    Csv,
    Tsv,
    Parquet,
}

impl FileFormat {
    /// What a file's name promises.
    fn of_name(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?.to_ascii_lowercase();
        let name = name.strip_suffix(GZIP).unwrap_or(&name);
        Some(match name.rsplit_once('.')?.1 {
            "jsonl" | "ndjson" => Self::JsonLines,
            "json" => Self::Json,
            "csv" => Self::Csv,
            "tsv" => Self::Tsv,
            "parquet" => Self::Parquet,
            _ => return None,
        })
    }
}

const GZIP: &str = ".gz";
const GZIP_MAGIC: &[u8] = &[0x1f, 0x8b];
/// How files begin that are packed in other ways.
const FOREIGN: [(&[u8], &str); 4] =
    [(b"\x28\xb5\x2f\xfd", "Zstandard"), (b"BZh", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"PK\x03\x04", "zip")];
/// What a compressed file may hold, so that a few bytes cannot fill the memory.
const MOST_UNPACKED: u64 = 16 << 30;
const PARQUET_MAGIC: &[u8] = b"PAR1";

/// Gives every row of a file to `visit`, in order.
///
/// # Errors
/// When the file cannot be read or a row does not parse; what `visit` returns.
pub(super) fn read(path: &Path, visit: Visit<'_>) -> Result<()> {
    let named = FileFormat::of_name(path);
    if named == Some(FileFormat::Parquet) {
        return read_parquet(path, visit);
    }
    let bytes = unpacked(path, disk::read(path)?)?;
    let bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(&bytes);
    let is_array = bytes.trim_ascii_start().first() == Some(&b'[');
    let path: Arc<Path> = path.into();
    match named {
        Some(FileFormat::Csv) => csv::read(&path, bytes, b',', visit),
        Some(FileFormat::Tsv) => csv::read(&path, bytes, b'\t', visit),
        Some(FileFormat::JsonLines) => json::read_lines(&path, bytes, visit),
        None if bytes.starts_with(PARQUET_MAGIC) => read_parquet(&path, visit),
        _ if is_array => json::read_array(&path, bytes, visit),
        _ => json::read_lines(&path, bytes, visit),
    }
}

/// The content of a file that may be compressed.
fn unpacked(path: &Path, bytes: Vec<u8>) -> Result<Vec<u8>> {
    if let Some((_, kind)) = FOREIGN.iter().find(|(magic, _)| bytes.starts_with(magic)) {
        let (reason, help) = (format!("is packed with {kind}"), "unpack it, or pack it with gzip".into());
        return Err(Error::File { path: path.into(), reason, help });
    }
    if !bytes.starts_with(GZIP_MAGIC) {
        return Ok(bytes);
    }
    let mut out = Vec::new();
    let mut reader = flate2::read::MultiGzDecoder::new(bytes.as_slice()).take(MOST_UNPACKED + 1);
    reader.read_to_end(&mut out).map_err(disk::Error::io("unpack", path))?;
    if out.len() as u64 > MOST_UNPACKED {
        let reason = format!("unpacks to more than {} GiB", MOST_UNPACKED >> 30);
        return Err(Error::File { path: path.into(), reason, help: "unpack it and split it into shards".into() });
    }
    Ok(out)
}

#[cfg(feature = "parquet")]
fn read_parquet(path: &Path, visit: Visit<'_>) -> Result<()> {
    parquet::read(path, visit)
}

#[cfg(not(feature = "parquet"))]
fn read_parquet(path: &Path, _: Visit<'_>) -> Result<()> {
    // a path that is not there is the clearer error
    std::fs::metadata(path).map_err(disk::Error::io("read", path))?;
    Err(Error::File {
        path: path.into(),
        reason: "is a Parquet file, which this prefold was built without".into(),
        help: "build prefold with `--features parquet`, or write the records as JSONL".into(),
    })
}

/// What a JSON value is, for errors.
pub(super) fn describe(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

fn line(path: &Arc<Path>, line: usize) -> Place {
    Place { path: path.clone(), at: At::Line(line) }
}

fn record(path: &Arc<Path>, record: usize) -> Place {
    Place { path: path.clone(), at: At::Record(record) }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    /// The rows of `content` as a file named `name`: place after the file's name, and fields.
    fn rows(name: &str, content: &[u8]) -> std::result::Result<Vec<(String, String)>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        let after = |text: String| text.rsplit_once(name).map(|(_, rest)| rest.to_string()).unwrap_or(text);
        let mut rows = Vec::new();
        let mut visit = |row: Row| {
            rows.push((after(row.place.to_string()), Value::Object(row.fields).to_string()));
            Ok(())
        };
        read(&path, &mut visit).map_err(|error| after(error.to_string()))?;
        Ok(rows)
    }

    fn row(place: &str, fields: &str) -> (String, String) {
        (place.into(), fields.into())
    }

    #[test]
    fn lines_arrays_and_tables_give_the_same_rows() {
        let (a, b) = ("{\"a\":\"1\",\"b\":\"x\\ny\"}", "{\"a\":\"2\",\"b\":\"\"}");
        let lines = [row(":1", a), row(":3", b)];
        assert_eq!(rows("d.jsonl", format!("{a}\r\n\n{b}").as_bytes()).unwrap(), lines);
        assert_eq!(rows("d.json", format!("{a}\r\n\n{b}").as_bytes()).unwrap(), lines);
        assert_eq!(rows("stdin", format!("\u{FEFF}{a}\n \n{b}\n").as_bytes()).unwrap(), lines);
        let records = [row(", record 1", a), row(", record 2", b)];
        assert_eq!(rows("d.json", format!(" [{a},\n{b}]").as_bytes()).unwrap(), records);
        assert_eq!(rows("d.JSON", format!("[{a},{b}]").as_bytes()).unwrap(), records);
        // the quoted field holds a line break, so the second row begins in line 4
        let table = [row(":2", a), row(":4", b)];
        assert_eq!(rows("d.csv", b"a,b\n1,\"x\ny\"\n2,\n").unwrap(), table);
        assert_eq!(rows("d.tsv", b"\xEF\xBB\xBFa\tb\r\n1\t\"x\ny\"\r\n2\t\"\"").unwrap(), table);
        // the quoted line break is one of two bytes here, and an empty line stands between the rows
        let apart = [row(":2", "{\"a\":\"1\",\"b\":\"\\r\\n\"}"), row(":5", b)];
        assert_eq!(rows("d.csv", b"a,b\r\n1,\"\r\n\"\r\n\r\n2,\r\n").unwrap(), apart);
    }

    #[test]
    fn compressed_files_are_unpacked() {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(b"a,b\n1,2\n").unwrap();
        let bytes = gzip.finish().unwrap();
        assert_eq!(rows("d.csv.gz", &bytes).unwrap(), [row(":2", "{\"a\":\"1\",\"b\":\"2\"}")]);
        let packed = rows("d.jsonl.zst", b"\x28\xb5\x2f\xfd\x04\x00").unwrap_err();
        assert!(packed.contains("is packed with Zstandard"), "{packed}");
        assert!(rows("d.csv.gz", &bytes[..bytes.len() - 4]).unwrap_err().contains("unexpected end of file"));
    }

    #[test]
    fn an_error_names_the_place() {
        let error = |name: &str, content: &[u8]| rows(name, content).unwrap_err();
        let errors = [
            error("d.json", b"[{\"a\": 1}, {\"a\": }]"),
            error("d.json", b"[{\"a\": 1},\n 3]"),
            error("d.json", b"[{\"a\": 1}"),
            error("d.json", b"[{\"a\": 1}]\n[]"),
            error("d.json", b"[\"\xff\"]"),
            error("d.csv", b"a,b\n1,2\n1,2,3\n"),
            error("d.csv", b"a,b,a\n1,2,3\n"),
            error("d.csv", b"a,,b\n1,2,3\n"),
            error("d.csv", b"a,b\n1,\xff\n"),
            error("d.csv", b"a,\xff\n1,2\n"),
            error("d.jsonl", b"{\"a\": 1}\n{\"a\"; 1}"),
        ];
        insta::assert_snapshot!(errors.join("\n"), @"
        :1: not JSON: expected value at column 18
        , record 2: expected a JSON object, found a number
        :1: not JSON: EOF while parsing a list at column 9
        :2: not JSON: trailing characters at column 1
        :1: not JSON: invalid unicode code point at column 3
        :3: the row has 3 fields, the header has 2
        :1: the header names the column `a` twice
        :1: column 2 has no name in the header
        :2: column `b` is not UTF-8
        :1: column 2 is not UTF-8
        :2: not JSON: expected `:` at column 5
        ");
    }

    #[cfg(not(feature = "parquet"))]
    #[test]
    fn parquet_without_the_feature_names_the_feature() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["d.parquet", "d"] {
            let path = folder.path().join(name);
            std::fs::write(&path, b"PAR1").unwrap();
            let error = read(&path, &mut |_| Ok(())).unwrap_err();
            assert!(miette::Diagnostic::help(&error).unwrap().to_string().contains("--features parquet"), "{error}");
        }
        let absent = read(&folder.path().join("absent.parquet"), &mut |_| Ok(())).unwrap_err();
        assert!(absent.to_string().contains("cannot read"), "{absent}");
    }

    /// Bytes that often come near to a file of records.
    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        let part = prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..8),
            "[\\[\\]{}\",:\n\r\t \\\\a1]{0,12}".prop_map(String::into_bytes),
            Just(b"{\"a\": [1, {\"b\": null}]}\n".to_vec()),
            Just(GZIP_MAGIC.to_vec()),
            Just(PARQUET_MAGIC.to_vec()),
        ];
        proptest::collection::vec(part, 0..12).prop_map(|parts| parts.concat())
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_rows_or_an_error(content in bytes()) {
            for name in ["d.jsonl", "d.json", "d.csv", "d.tsv", "d", "d.parquet", "d.json.gz"] {
                if let Err(error) = rows(name, &content) {
                    prop_assert!(!error.is_empty());
                }
            }
        }
    }
}
