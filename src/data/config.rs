//! What to train on, as a file describes it.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Dataset, DatasetOptions, Error, Fields, Format, FormatOptions, Holdout, Layout, ReadOptions, Records, Result,
    Split, Truncation,
};

/// One path or several.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected a path or a list of paths")]
pub enum Paths {
    /// A file, or a folder of shards.
    One(PathBuf),
    /// Files and folders, one after the other.
    Many(Vec<PathBuf>),
}

impl Paths {
    /// The paths in their order.
    pub fn as_slice(&self) -> &[PathBuf] {
        match self {
            Self::One(path) => std::slice::from_ref(path),
            Self::Many(paths) => paths,
        }
    }
}

impl From<PathBuf> for Paths {
    fn from(path: PathBuf) -> Self {
        Self::One(path)
    }
}

/// What to train on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// Records to train on: JSONL, JSON, CSV, TSV or Parquet files, or folders of such shards.
    pub train: Option<Paths>,
    /// Records to evaluate on.
    pub eval: Option<Paths>,
    /// In place of `eval`: records of `train` to keep apart, a count or a fraction, as text.
    pub holdout: Option<String>,
    /// What a record looks like; where not given, the fields of the first record tell.
    pub layout: Option<Layout>,
    /// Names of the records' fields, where they are other than usual.
    pub fields: Fields,
    /// Names of integer labels: label 0 is the first.
    pub label_names: Vec<String>,
    /// Longest row in tokens.
    pub max_seq_len: usize,
    /// What becomes of an example that is longer.
    pub truncation: Truncation,
    /// Put several training examples into a row of `max_seq_len` tokens; none of them attends to another.
    pub packing: bool,
    /// Make training batches of examples of similar length.
    pub group_by_length: bool,
    /// At most so many training records.
    pub limit: Option<usize>,
    /// At most so many training records of each label.
    pub per_class: Option<usize>,
    /// At most so many evaluation records.
    pub eval_limit: Option<usize>,
    /// How records become prompts and completions.
    pub format: FormatOptions,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            train: None,
            eval: None,
            holdout: None,
            layout: None,
            fields: Fields::default(),
            label_names: Vec::new(),
            max_seq_len: 512,
            truncation: Truncation::default(),
            packing: false,
            group_by_length: false,
            limit: None,
            per_class: None,
            eval_limit: None,
            format: FormatOptions::default(),
        }
    }
}

impl DataConfig {
    /// The training records and those held out, as many as the options allow, drawn with `seed`.
    ///
    /// # Errors
    /// When there is no `train`, a record is malformed, or a selection leaves nothing.
    pub fn records(&self, seed: u64) -> Result<(Records, Option<Records>)> {
        self.check()?;
        let train = self.train.as_ref().map(Paths::as_slice).unwrap_or_default();
        let options = self.read_options();
        let records = Records::read(train, Split::Train, &options)?;
        let (mut records, mut held_out) = match (&self.eval, &self.holdout) {
            (Some(eval), _) => {
                let held_out = Records::read(eval.as_slice(), Split::Eval, &options)?;
                let is_preference = |records: &Records| records.layout() == Layout::Preference;
                if is_preference(&held_out) != is_preference(&records) {
                    let (eval, train) = (held_out.layout(), records.layout());
                    let reason = format!("holds {eval} records, but those to train on are {train} records");
                    let help = "pairs are evaluated as they are trained, and so is everything else";
                    return Err(Error::Option { option: "eval", reason, help });
                }
                (records, Some(held_out))
            }
            (None, Some(holdout)) => {
                let (records, held_out) = records.hold_out(parse_holdout(holdout)?, seed)?;
                (records, Some(held_out))
            }
            (None, None) => (records, None),
        };
        if let Some(n) = self.per_class {
            records = records.per_class(n, seed)?;
        }
        if let Some(n) = self.limit {
            records = records.limit(n, seed);
        }
        if let Some(n) = self.eval_limit {
            held_out = held_out.map(|records| records.limit(n, seed));
        }
        Ok((records, held_out))
    }

    /// The training and held-out examples for a model that knows `max_positions` positions. The held-out part is neither
    /// packed nor ordered by length.
    ///
    /// # Errors
    /// As [`records`](Self::records) and [`Dataset::build`].
    pub fn load(&self, format: &Format<'_>, seed: u64, max_positions: usize) -> Result<(Dataset, Option<Dataset>)> {
        let (records, held_out) = self.records(seed)?;
        let options = self.dataset_options(max_positions);
        let plain = DatasetOptions { packing: false, group_by_length: false, ..options };
        let train = Dataset::build(&records, format, &options)?;
        let held_out = held_out.map(|records| Dataset::build(&records, format, &plain)).transpose()?;
        Ok((train, held_out))
    }

    /// How the training rows are made for a model that knows `max_positions` positions.
    pub fn dataset_options(&self, max_positions: usize) -> DatasetOptions {
        DatasetOptions {
            max_seq_len: self.max_seq_len.min(max_positions),
            truncation: self.truncation,
            packing: self.packing,
            group_by_length: self.group_by_length,
        }
    }

    /// The files that `train` and `eval` name, folders resolved.
    ///
    /// # Errors
    /// When one is not there, or a folder is no data set.
    pub fn files(&self) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
        let of = |paths: &Option<Paths>, split| {
            super::source::files(paths.as_ref().map(Paths::as_slice).unwrap_or_default(), split)
        };
        Ok((of(&self.train, Split::Train)?, of(&self.eval, Split::Eval)?))
    }

    fn read_options(&self) -> ReadOptions {
        ReadOptions {
            layout: self.layout,
            fields: self.fields.clone(),
            label_names: self.label_names.clone(),
            open_ended: !self.format.train_on.is_empty(),
        }
    }

    /// Whether the options make sense without the records.
    ///
    /// # Errors
    /// Names the option that does not.
    pub fn check(&self) -> Result<()> {
        let fail = |option, reason: &str, help| Err(Error::Option { option, reason: reason.into(), help });
        if self.train.as_ref().is_none_or(|paths| paths.as_slice().is_empty()) {
            return fail("train", "is not given", "name the files or folders to train on");
        }
        if self.eval.as_ref().is_some_and(|paths| paths.as_slice().is_empty()) {
            return fail("eval", "names no file", "name files or folders, or leave it out");
        }
        if self.max_seq_len < 2 {
            return fail("max_seq_len", "must be at least 2", "a prompt and a completion have a token each");
        }
        if let Some(name) = self.label_names.iter().enumerate().find_map(|(index, name)| {
            (name.trim().is_empty() || self.label_names.iter().take(index).any(|other| other == name)).then_some(name)
        }) {
            let reason = format!("lists `{name}`, which is empty or stands there twice");
            return fail("label_names", &reason, "every class has a name of its own");
        }
        if let Some(holdout) = &self.holdout {
            parse_holdout(holdout)?;
        }
        Ok(())
    }
}

fn parse_holdout(text: &str) -> Result<Holdout> {
    text.parse().map_err(|reason: String| Error::Option {
        option: "holdout",
        reason: format!("is wrong: {reason}"),
        help: "give a count or a fraction, as in \"200\" or \"0.1\"",
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::testing::ascii_tokenizer;

    fn config(json: serde_json::Value) -> serde_json::Result<DataConfig> {
        serde_json::from_value(json)
    }

    #[test]
    fn paths_are_one_or_many() {
        let one = config(serde_json::json!({"train": "a.jsonl"})).unwrap();
        assert_eq!(one.train, Some(PathBuf::from("a.jsonl").into()));
        let many = config(serde_json::json!({"train": ["a.jsonl", "b"]})).unwrap();
        assert_eq!(many.train.unwrap().as_slice(), [PathBuf::from("a.jsonl"), PathBuf::from("b")]);
        let error = config(serde_json::json!({"train": 3})).unwrap_err().to_string();
        assert!(error.contains("expected a path or a list of paths"), "{error}");
        let whole = DataConfig::default();
        assert_eq!(config(serde_json::to_value(&whole).unwrap()).unwrap(), whole);
    }

    #[test]
    fn options_are_checked() {
        let error = |json: serde_json::Value| config(json).unwrap().check().unwrap_err().to_string();
        let errors = [
            error(serde_json::json!({})),
            error(serde_json::json!({"train": []})),
            error(serde_json::json!({"train": "a", "eval": []})),
            error(serde_json::json!({"train": "a", "max_seq_len": 1})),
            error(serde_json::json!({"train": "a", "label_names": ["x", "y", "x"]})),
            error(serde_json::json!({"train": "a", "holdout": "1.5"})),
        ];
        insta::assert_snapshot!(errors.join("\n"), @"
        data option `train` is not given
        data option `train` is not given
        data option `eval` names no file
        data option `max_seq_len` must be at least 2
        data option `label_names` lists `x`, which is empty or stands there twice
        data option `holdout` is wrong: `1.5` is neither a count nor a fraction between 0 and 1
        ");
    }

    #[test]
    fn shards_and_files_become_one_data_set() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, content: &str| std::fs::write(folder.path().join(name), content).unwrap();
        write("train-0.csv", "question,answer\nq0,a0\n\"q,1\",a1\n");
        write("train-1.csv", "answer,question\na2,q2\n");
        write("test.csv", "question,answer\nq3,a3\n");
        let more = folder.path().join("more.jsonl");
        std::fs::write(&more, "{\"question\": \"q4\", \"answer\": \"a4\"}\n").unwrap();
        std::fs::create_dir(folder.path().join("shards")).unwrap();
        for name in ["train-0.csv", "train-1.csv", "test.csv"] {
            std::fs::rename(folder.path().join(name), folder.path().join("shards").join(name)).unwrap();
        }
        let shards = folder.path().join("shards");
        let config = config(serde_json::json!({
            "train": [shards, more], "eval": shards, "packing": true,
            "fields": {"prompt": "question", "completion": "answer"},
        }))
        .unwrap();
        let tokenizer = ascii_tokenizer(None);
        let format = Format::new(&tokenizer, 1000, config.format.clone()).unwrap();
        let (train, held_out) = config.load(&format, 0, 64).unwrap();
        let text = |dataset: &Dataset| -> Vec<String> {
            let whole = |example: &crate::data::Example| {
                let ids: Vec<u32> = example.tokens().map(|(id, _)| id).collect();
                tokenizer.decode(&ids, true).unwrap()
            };
            dataset.examples().iter().map(whole).collect()
        };
        assert_eq!(text(&train), ["q0a0", "q,1a1", "q2a2", "q4a4"]);
        assert_eq!((train.len(), train.report().max_seq_len), (1, 64), "four short examples share a row");
        let held_out = held_out.unwrap();
        assert_eq!((text(&held_out), held_out.len()), (vec!["q3a3".to_string()], 1));
        assert_eq!(held_out.report().packing, None);
        assert_eq!(config.files().unwrap().0.len(), 3);
    }
}
