//! Rows of JSON: one object a line, or an array of objects.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::{Row, Visit, describe, line, record};
use crate::data::place::Place;
use crate::data::{Error, Result};

/// Empty lines are passed over.
pub(super) fn read_lines(path: &Arc<Path>, bytes: &[u8], visit: Visit<'_>) -> Result<()> {
    for (index, raw) in bytes.split(|&byte| byte == b'\n').enumerate() {
        if raw.trim_ascii().is_empty() {
            continue;
        }
        let place = line(path, index + 1);
        let text =
            std::str::from_utf8(raw).map_err(|error| not_json(&place, format!("the line is not UTF-8: {error}")))?;
        let value = serde_json::from_str(text).map_err(|error| {
            // The parser sees one line only, so its column is right and its line is not.
            not_json(&place, format!("not JSON: {} at column {}", without_place(&error), error.column()))
        })?;
        visit(Row { fields: object(value, &place)?, place, of_table: false })?;
    }
    Ok(())
}

pub(super) fn read_array(path: &Arc<Path>, bytes: &[u8], visit: Visit<'_>) -> Result<()> {
    let values: Vec<Value> = serde_json::from_slice(bytes).map_err(|error| {
        let reason = format!("not JSON: {} at column {}", without_place(&error), error.column());
        not_json(&line(path, error.line()), reason)
    })?;
    for (index, value) in values.into_iter().enumerate() {
        let place = record(path, index + 1);
        visit(Row { fields: object(value, &place)?, place, of_table: false })?;
    }
    Ok(())
}

fn object(value: Value, place: &Place) -> Result<Map<String, Value>> {
    match value {
        Value::Object(fields) => Ok(fields),
        other => Err(not_json(place, format!("expected a JSON object, found {}", describe(&other)))),
    }
}

fn not_json(place: &Place, reason: String) -> Error {
    Error::Json { place: place.clone(), reason }
}

fn without_place(error: &serde_json::Error) -> String {
    let reason = error.to_string();
    reason.split(" at line ").next().unwrap_or(&reason).to_string()
}
