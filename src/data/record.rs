//! Records, and which of them are used.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::layout::Layout;
use super::parse::{ReadOptions, layout_of, parse};
use super::place::{Place, listed};
use super::sampler::{Purpose, permutation};
use super::source::{self, Split};
use super::{Error, Result};
use crate::base::Message;

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
        /// The record's own system prompt.
        system: Option<String>,
    },
    /// An instruction and the answer to it.
    Instruction {
        /// What is to be done.
        instruction: String,
        /// What it is to be done with; often empty.
        input: String,
        /// What is learnt.
        output: String,
        /// The record's own system prompt.
        system: Option<String>,
    },
    /// A text, all of which is learnt.
    Text {
        /// The text.
        text: String,
    },
    /// A conversation; the assistant's last message is learnt, or the messages of chosen roles.
    Chat {
        /// At least one message.
        messages: Vec<Message>,
    },
    /// A better and a worse answer to one prompt.
    Preference {
        /// What both answer.
        prompt: Prompt,
        /// The better answer.
        chosen: String,
        /// The worse answer.
        rejected: String,
        /// The record's own system prompt, where the prompt is a text.
        system: Option<String>,
    },
}

/// What an answer answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// A text.
    Text(String),
    /// A conversation, which the answer goes on with.
    Messages(Vec<Message>),
}

/// A record and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where it stands.
    pub place: Place,
    /// The record.
    pub record: Record,
}

/// Records of one layout, in the order of their files. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Records {
    files: Vec<PathBuf>,
    layout: Layout,
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
    /// The records of all files that `paths` name: files, or folders of shards.
    ///
    /// # Errors
    /// Names the file, the line or record, and the field of the first thing that is not as it should be.
    pub fn read(paths: &[PathBuf], split: Split, options: &ReadOptions) -> Result<Self> {
        let files = source::files(paths, split)?;
        let mut layout = None;
        let mut entries = Vec::new();
        for file in &files {
            source::read(file, &mut |row| {
                let layout = match layout {
                    Some(layout) => layout,
                    None => *layout.insert(layout_of(&row, options)?),
                };
                let record = parse(&row, layout, options)?;
                entries.push(Entry { place: row.place, record });
                Ok(())
            })?;
        }
        match layout {
            Some(layout) => Ok(Self { files, layout, entries }),
            None => Err(Error::Empty { paths: listed(paths) }),
        }
    }

    /// The files they come from.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// What they all look like.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The records with their places.
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
                return Err(Error::NoClasses { paths: listed(&self.files), layout: self.layout });
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

#[cfg(test)]
pub(super) mod testing {
    use super::*;

    /// Reads `content` as a file named `data.jsonl`.
    pub(in crate::data) fn records(content: &str) -> Result<Records> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.jsonl");
        std::fs::write(&path, content).unwrap();
        read(&path)
    }

    /// Reads a file with the default options.
    pub(in crate::data) fn read(path: &std::path::Path) -> Result<Records> {
        Records::read(&[path.into()], Split::Train, &ReadOptions::default())
    }
}

#[cfg(test)]
mod tests {
    use super::super::place::At;
    use super::testing::{read, records};
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
        let line = |entry: &Entry| match entry.place.at {
            At::Line(line) => line,
            At::Record(_) => panic!("{}", entry.place),
        };
        records.entries().iter().map(line).collect()
    }

    #[test]
    fn each_kind_is_recognised() {
        let read =
            records("\u{FEFF}{\"text\": \"a\", \"label\": 3, \"id\": 1}\r\n\n{\"text\": \"b\", \"label\": \"x\"}")
                .unwrap();
        assert_eq!(read.layout(), Layout::Classification);
        assert_eq!(lines(&read), [1, 3]);
        assert_eq!(read.entries()[0].record, Record::Classification { text: "a".into(), label: "3".into() });
        let read = records("{\"prompt\": \"p\", \"completion\": \"\", \"text\": 7}").unwrap();
        assert_eq!(
            read.entries()[0].record,
            Record::Completion { prompt: "p".into(), completion: String::new(), system: None }
        );
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
        assert_eq!(error("{\"a\": 1}"), ":1: the record is of no known layout; its fields are a");
        assert_eq!(error("{\"text\": null, \"label\": 1}"), ":1: the field `text` is missing");
        assert_eq!(error(&format!("{good}{{\"text\": \"a\"}}")), ":2: the field `label` is missing");
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
        assert!(read(&path).unwrap_err().to_string().contains("d.jsonl:1: the line is not UTF-8"));
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
