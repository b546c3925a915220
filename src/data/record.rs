//! Records and the files they come from.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::sampler::{Purpose, permutation};
use super::{Error, Result};
use crate::base::Message;
use crate::files;

/// One thing to learn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// A text and its class.
    Classification {
        /// The text.
        text: String,
        /// The class.
        label: String,
    },
    /// A text and how it goes on.
    Completion {
        /// What is given.
        prompt: String,
        /// What is learnt.
        completion: String,
    },
    /// A conversation; its last message, the assistant's, is learnt.
    Chat {
        /// At least two messages.
        messages: Vec<Message>,
    },
}

/// The kinds of [`Record`]; a file holds one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecordKind {
    /// `{"text", "label"}`
    Classification,
    /// `{"prompt", "completion"}`
    Completion,
    /// `{"messages"}`
    Chat,
}

impl RecordKind {
    /// The shapes of all kinds, for help texts.
    pub(super) const SHAPES: &str = "{\"text\": …, \"label\": …}, {\"prompt\": …, \"completion\": …} or \
                                     {\"messages\": [{\"role\": …, \"content\": …}, …]}";

    /// What a record of this kind looks like.
    pub fn shape(self) -> &'static str {
        match self {
            Self::Classification => "{\"text\": \"…\", \"label\": \"…\"}",
            Self::Completion => "{\"prompt\": \"…\", \"completion\": \"…\"}",
            Self::Chat => {
                "{\"messages\": [{\"role\": \"user\", \"content\": \"…\"}, {\"role\": \"assistant\", \"content\": \"…\"}]}"
            }
        }
    }

    fn fields(self) -> &'static [&'static str] {
        match self {
            Self::Classification => &["text", "label"],
            Self::Completion => &["prompt", "completion"],
            Self::Chat => &["messages"],
        }
    }

    /// The first kind that any field speaks for.
    fn detect(fields: &Map<String, Value>) -> Option<Self> {
        let speaks = |kind: &Self| kind.fields().iter().any(|field| fields.contains_key(*field));
        [Self::Chat, Self::Completion, Self::Classification].into_iter().find(speaks)
    }
}

impl fmt::Display for RecordKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Classification => "classification",
            Self::Completion => "completion",
            Self::Chat => "chat",
        })
    }
}

/// A record and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The line in the file, counted from 1.
    pub line: usize,
    /// The record.
    pub record: Record,
}

/// The records of one file, all of one kind, in the file's order. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Records {
    path: PathBuf,
    kind: RecordKind,
    entries: Vec<Entry>,
}

/// How much to keep apart for evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Holdout {
    /// That many records.
    Count(usize),
    /// That share of the records, between 0 and 1.
    Fraction(f64),
}

impl FromStr for Holdout {
    type Err = String;

    /// `200` is a count, `0.1` a fraction.
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        if let Ok(count) = text.parse() {
            return Ok(Self::Count(count));
        }
        match text.parse() {
            Ok(fraction) if fraction > 0.0 && fraction < 1.0 => Ok(Self::Fraction(fraction)),
            _ => Err(format!("`{text}` is neither a count nor a fraction between 0 and 1")),
        }
    }
}

impl fmt::Display for Holdout {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(count) => write!(formatter, "{count}"),
            Self::Fraction(fraction) => write!(formatter, "a fraction of {fraction}"),
        }
    }
}

impl Records {
    /// The file they come from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What they all are.
    pub fn kind(&self) -> RecordKind {
        self.kind
    }

    /// The records with their lines.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// How many there are; at least one.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// At most `limit` records, drawn with `seed`; they stay in the file's order.
    pub fn limit(self, limit: usize, seed: u64) -> Self {
        let order = permutation(self.len(), seed, Purpose::Sample);
        let chosen = order.into_iter().take(limit.max(1)).collect();
        self.keep(chosen)
    }

    /// At most `count` records of every class, drawn with `seed`; they stay in the file's order.
    ///
    /// # Errors
    /// When the records have no classes.
    pub fn per_class(self, count: usize, seed: u64) -> Result<Self> {
        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
        let mut chosen = Vec::new();
        for index in permutation(self.len(), seed, Purpose::Sample) {
            let Some(Entry { record: Record::Classification { label, .. }, .. }) = self.entries.get(index) else {
                return Err(Error::NoClasses { path: self.path, kind: self.kind });
            };
            let taken = seen.entry(label.clone()).or_default();
            if *taken < count.max(1) {
                *taken += 1;
                chosen.push(index);
            }
        }
        Ok(self.keep(chosen))
    }

    /// Keeps records apart, drawn with `seed`: `(rest, held out)`, both in the file's order.
    ///
    /// # Errors
    /// When one side would be empty.
    pub fn hold_out(self, holdout: Holdout, seed: u64) -> Result<(Self, Self)> {
        let available = self.len();
        let count = match holdout {
            Holdout::Count(count) => count,
            Holdout::Fraction(fraction) => (fraction * available as f64).round() as usize,
        };
        if count == 0 || count >= available {
            return Err(Error::Holdout { wanted: holdout.to_string(), available });
        }
        let mut rest = permutation(available, seed, Purpose::Holdout);
        let held = rest.split_off(available - count);
        Ok((self.clone().keep(rest), self.keep(held)))
    }

    fn keep(mut self, mut chosen: Vec<usize>) -> Self {
        chosen.sort_unstable();
        let mut chosen = chosen.into_iter().peekable();
        let mut index = 0;
        self.entries.retain(|_| {
            let keep = chosen.next_if_eq(&index).is_some();
            index += 1;
            keep
        });
        self
    }
}

/// Reads a JSONL file. Its first record decides the kind; unknown fields and empty lines are passed over.
///
/// # Errors
/// Names the file, the line and the field of the first thing that is not as it should be.
pub fn read_jsonl(path: &Path) -> Result<Records> {
    let bytes = files::read(path)?;
    let bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(&bytes);
    let mut found: Option<RecordKind> = None;
    let mut entries = Vec::new();
    for (index, raw) in bytes.split(|&byte| byte == b'\n').enumerate() {
        if raw.trim_ascii().is_empty() {
            continue;
        }
        let place = Place { path, line: index + 1 };
        let fields = place.object(raw)?;
        let kind = match found {
            Some(kind) => kind,
            None => *found.insert(place.kind(&fields)?),
        };
        entries.push(Entry { line: place.line, record: place.record(&fields, kind)? });
    }
    match found {
        Some(kind) => Ok(Records { path: path.into(), kind, entries }),
        None => Err(Error::Empty { path: path.into() }),
    }
}

/// A line of a file, for errors.
struct Place<'a> {
    path: &'a Path,
    line: usize,
}

impl Place<'_> {
    fn json(&self, reason: impl Into<String>) -> Error {
        Error::Json { path: self.path.into(), line: self.line, reason: reason.into() }
    }

    fn field(&self, kind: RecordKind, field: impl Into<String>, reason: impl Into<String>) -> Error {
        Error::Field { path: self.path.into(), line: self.line, field: field.into(), reason: reason.into(), kind }
    }

    fn object(&self, raw: &[u8]) -> Result<Map<String, Value>> {
        let text = std::str::from_utf8(raw).map_err(|error| self.json(format!("the line is not UTF-8: {error}")))?;
        match serde_json::from_str(text) {
            Ok(Value::Object(fields)) => Ok(fields),
            Ok(other) => Err(self.json(format!("expected a JSON object, found {}", describe(&other)))),
            // The parser sees one line only, so its column is right and its line is not.
            Err(error) => {
                let reason = error.to_string();
                let reason = reason.split(" at line ").next().unwrap_or(&reason);
                Err(self.json(format!("not JSON: {reason} at column {}", error.column())))
            }
        }
    }

    fn kind(&self, fields: &Map<String, Value>) -> Result<RecordKind> {
        RecordKind::detect(fields).ok_or_else(|| {
            let names: Vec<&str> = fields.keys().take(10).map(String::as_str).collect();
            let found = if names.is_empty() { "none".into() } else { names.join(", ") };
            Error::UnknownKind { path: self.path.into(), line: self.line, found }
        })
    }

    fn record(&self, fields: &Map<String, Value>, kind: RecordKind) -> Result<Record> {
        let missing = kind.fields().iter().any(|field| !fields.contains_key(*field));
        if let Some(found) = RecordKind::detect(fields).filter(|found| missing && *found != kind) {
            return Err(Error::Mixed { path: self.path.into(), line: self.line, found, expected: kind });
        }
        let text = |name: &str| self.text(fields.get(name), name, kind);
        Ok(match kind {
            RecordKind::Classification => Record::Classification { text: text("text")?, label: self.label(fields)? },
            RecordKind::Completion => Record::Completion { prompt: text("prompt")?, completion: text("completion")? },
            RecordKind::Chat => Record::Chat { messages: self.messages(fields)? },
        })
    }

    fn text(&self, value: Option<&Value>, field: &str, kind: RecordKind) -> Result<String> {
        match value {
            Some(Value::String(text)) => Ok(text.clone()),
            Some(other) => Err(self.field(kind, field, format!("must be a string; it is {}", describe(other)))),
            None => Err(self.field(kind, field, "is missing")),
        }
    }

    fn label(&self, fields: &Map<String, Value>) -> Result<String> {
        let kind = RecordKind::Classification;
        match fields.get("label") {
            Some(Value::String(label)) if !label.trim().is_empty() => Ok(label.clone()),
            Some(Value::String(_)) => Err(self.field(kind, "label", "must not be empty")),
            Some(Value::Number(number)) => Ok(number.to_string()),
            Some(other) => {
                Err(self.field(kind, "label", format!("must be a string or a number; it is {}", describe(other))))
            }
            None => Err(self.field(kind, "label", "is missing")),
        }
    }

    fn messages(&self, fields: &Map<String, Value>) -> Result<Vec<Message>> {
        let kind = RecordKind::Chat;
        let values = match fields.get("messages") {
            Some(Value::Array(values)) => values,
            Some(other) => {
                return Err(self.field(kind, "messages", format!("must be an array; it is {}", describe(other))));
            }
            None => return Err(self.field(kind, "messages", "is missing")),
        };
        let message = |(index, value): (usize, &Value)| {
            let Some(fields) = value.as_object() else {
                let reason = format!("must be an object with `role` and `content`; it is {}", describe(value));
                return Err(self.field(kind, format!("messages[{index}]"), reason));
            };
            let part = |name: &str| self.text(fields.get(name), &format!("messages[{index}].{name}"), kind);
            Ok(Message { role: part("role")?, content: part("content")? })
        };
        let messages = values.iter().enumerate().map(message).collect::<Result<Vec<_>>>()?;
        match messages.last() {
            None => Err(self.field(kind, "messages", "is empty")),
            Some(last) if last.role != "assistant" => {
                let reason = format!("must end with a message of the role `assistant`; the last is of `{}`", last.role);
                Err(self.field(kind, "messages", reason))
            }
            Some(_) if messages.len() < 2 => {
                Err(self.field(kind, "messages", "must have a message before the assistant's"))
            }
            Some(_) => Ok(messages),
        }
    }
}

fn describe(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
pub(super) mod testing {
    use super::*;

    /// Reads `content` as a file named `data.jsonl`.
    pub(in crate::data) fn records(content: &str) -> Result<Records> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.jsonl");
        std::fs::write(&path, content).unwrap();
        read_jsonl(&path)
    }
}

#[cfg(test)]
mod tests {
    use super::testing::records;
    use super::*;

    /// The error's text after the folder's name.
    fn error(content: &str) -> String {
        let text = records(content).unwrap_err().to_string();
        text.split_once("data.jsonl").unwrap().1.to_string()
    }

    fn classes(count: usize) -> Records {
        let line = |i: usize| format!("{{\"text\": \"t{i}\", \"label\": \"c{}\"}}\n", i / (count / 2));
        records(&(0..count).map(line).collect::<String>()).unwrap()
    }

    fn lines(records: &Records) -> Vec<usize> {
        records.entries().iter().map(|entry| entry.line).collect()
    }

    #[test]
    fn each_kind_is_recognised() {
        let read =
            records("\u{FEFF}{\"text\": \"a\", \"label\": 3, \"id\": 1}\r\n\n{\"text\": \"b\", \"label\": \"x\"}")
                .unwrap();
        assert_eq!(read.kind(), RecordKind::Classification);
        assert_eq!(lines(&read), [1, 3]);
        assert_eq!(read.entries()[0].record, Record::Classification { text: "a".into(), label: "3".into() });
        let read = records("{\"prompt\": \"p\", \"completion\": \"\", \"text\": 7}").unwrap();
        assert_eq!(read.entries()[0].record, Record::Completion { prompt: "p".into(), completion: String::new() });
        let chat =
            "{\"messages\": [{\"role\": \"user\", \"content\": \"q\"}, {\"role\": \"assistant\", \"content\": \"a\"}]}";
        let messages = vec![Message::new("user", "q"), Message::new("assistant", "a")];
        assert_eq!(records(chat).unwrap().entries()[0].record, Record::Chat { messages });
    }

    #[test]
    fn errors_name_line_field_and_what_was_expected() {
        let good = "{\"text\": \"a\", \"label\": \"b\"}\n";
        assert_eq!(error(""), " holds no records");
        assert_eq!(error("\n \n"), " holds no records");
        assert_eq!(error("[1]"), ":1: expected a JSON object, found an array");
        assert!(error(&format!("{good}\n{{\"text\": ")).starts_with(":3: not JSON: EOF"));
        assert_eq!(error("{\"a\": 1}"), ":1: the record is of no known kind; its fields are a");
        assert_eq!(error("{\"text\": \"a\"}"), ":1: the field `label` is missing");
        assert_eq!(error("{\"text\": 1, \"label\": 2}"), ":1: the field `text` must be a string; it is a number");
        let label = ":1: the field `label` must be a string or a number; it is a boolean";
        assert_eq!(error("{\"text\": \"a\", \"label\": true}"), label);
        let mixed = error(&format!("{good}{{\"prompt\": \"p\", \"completion\": \"c\"}}"));
        assert_eq!(mixed, ":2: this is a completion record, but the file began with classification records");
    }

    #[test]
    fn conversations_are_checked() {
        let chat = |messages: &str| error(&format!("{{\"messages\": {messages}}}"));
        assert_eq!(chat("[]"), ":1: the field `messages` is empty");
        assert_eq!(chat("3"), ":1: the field `messages` must be an array; it is a number");
        let user = "{\"role\": \"user\", \"content\": \"q\"}";
        assert!(chat(&format!("[{user}]")).contains("must end with a message of the role `assistant`"));
        assert_eq!(chat("[{\"role\": \"user\"}]"), ":1: the field `messages[0].content` is missing");
        assert!(chat("[{\"role\": \"assistant\", \"content\": \"a\"}]").contains("before"));
    }

    #[test]
    fn bytes_that_are_no_text_are_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("d.jsonl");
        std::fs::write(&path, b"{\"text\": \"\xff\", \"label\": 1}").unwrap();
        assert!(read_jsonl(&path).unwrap_err().to_string().contains("d.jsonl:1: the line is not UTF-8"));
    }

    #[test]
    fn selections_are_drawn_by_seed_and_keep_the_order() {
        let chosen = classes(100).limit(10, 1);
        assert_eq!(chosen.len(), 10);
        assert!(lines(&chosen).is_sorted());
        assert_eq!(lines(&chosen), lines(&classes(100).limit(10, 1)));
        assert_ne!(lines(&chosen), lines(&classes(100).limit(10, 2)));
        assert_eq!(classes(100).limit(1000, 1).len(), 100);

        let few = classes(100).per_class(3, 1).unwrap();
        assert_eq!(few.len(), 6);
        assert!(lines(&few).is_sorted());
        assert_eq!(lines(&few).iter().filter(|line| **line <= 50).count(), 3);
        let completions = records("{\"prompt\": \"p\", \"completion\": \"c\"}").unwrap();
        assert!(matches!(completions.per_class(1, 1), Err(Error::NoClasses { .. })));
    }

    #[test]
    fn a_holdout_splits_without_overlap() {
        for holdout in [Holdout::Fraction(0.1), "10".parse().unwrap()] {
            let (rest, held) = classes(100).hold_out(holdout, 7).unwrap();
            assert_eq!((rest.len(), held.len()), (90, 10));
            let mut all = [lines(&rest), lines(&held)].concat();
            all.sort();
            assert_eq!(all, (1..=100).collect::<Vec<_>>());
        }
        assert!(matches!(classes(100).hold_out(Holdout::Count(100), 7), Err(Error::Holdout { .. })));
        assert!(matches!(classes(100).hold_out(Holdout::Fraction(0.001), 7), Err(Error::Holdout { .. })));
        assert!("1.5".parse::<Holdout>().is_err() && "x".parse::<Holdout>().is_err());
    }
}
