//! Rows of a table with a header; every field is a text.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::{Row, Visit, line};
use crate::data::{Error, Result};

/// Reads RFC 4180, with `delimiter` between the fields.
pub(super) fn read(path: &Arc<Path>, bytes: &[u8], delimiter: u8, visit: Visit<'_>) -> Result<()> {
    let mut reader = csv::ReaderBuilder::new().delimiter(delimiter).from_reader(bytes);
    let columns = columns(reader.headers().map_err(|error| broken(path, bytes, &error, None))?).map_err(|reason| {
        let place = line(path, 1);
        Error::Table { place, reason }
    })?;
    for row in reader.records() {
        let row = row.map_err(|error| broken(path, bytes, &error, Some(&columns)))?;
        let place = line(path, row.position().map_or(1, |position| line_of(position, bytes)));
        let fields: Map<String, Value> =
            columns.iter().zip(&row).map(|(column, text)| (column.clone(), Value::from(text))).collect();
        visit(Row { place, fields, of_table: true })?;
    }
    Ok(())
}

/// The header's names, each once.
fn columns(header: &csv::StringRecord) -> std::result::Result<Vec<String>, String> {
    let mut columns: Vec<String> = Vec::new();
    for (index, name) in header.iter().map(str::trim).enumerate() {
        if name.is_empty() {
            return Err(format!("column {} has no name in the header", index + 1));
        }
        if columns.iter().any(|column| column == name) {
            return Err(format!("the header names the column `{name}` twice"));
        }
        columns.push(name.into());
    }
    Ok(columns)
}

/// The line that a row begins in. The reader's position may lie before the line ends that part it from the row above.
fn line_of(position: &csv::Position, bytes: &[u8]) -> usize {
    let rest = bytes.get(position.byte() as usize..).unwrap_or_default();
    let before = rest.iter().take_while(|byte| matches!(byte, b'\r' | b'\n'));
    position.line() as usize + before.filter(|&&byte| byte == b'\n').count()
}

fn broken(path: &Arc<Path>, bytes: &[u8], error: &csv::Error, columns: Option<&[String]>) -> Error {
    let at = |position: &Option<csv::Position>| position.as_ref().map_or(1, |position| line_of(position, bytes));
    let (at, reason) = match error.kind() {
        csv::ErrorKind::UnequalLengths { pos, expected_len, len } => {
            (at(pos), format!("the row has {len} fields, the header has {expected_len}"))
        }
        csv::ErrorKind::Utf8 { pos, err } => {
            let column = columns.and_then(|columns| columns.get(err.field()));
            let column =
                column.map_or_else(|| format!("column {}", err.field() + 1), |name| format!("column `{name}`"));
            (at(pos), format!("{column} is not UTF-8"))
        }
        _ => (1, error.to_string()),
    };
    Error::Table { place: line(path, at), reason }
}
