//! The examples of a file that fit a length, with an account of those that do not.

use std::collections::BTreeSet;

use serde::Serialize;

use super::{Batch, Error, Example, Format, RecordKind, Records, Result};

/// Examples ready for batching. Never empty.
#[derive(Clone, Debug)]
pub struct Dataset {
    examples: Vec<Example>,
    labels: Vec<String>,
    report: Report,
    pad: u32,
}

/// What became of the records.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// What the records were.
    pub kind: RecordKind,
    /// How many there were.
    pub records: usize,
    /// How many became examples.
    pub examples: usize,
    /// How many of those lost the beginning of their prompt.
    pub truncated: usize,
    /// How many were dropped, because the completion alone does not fit.
    pub dropped: usize,
    /// Distinct labels.
    pub classes: usize,
    /// Tokens in the prompts, after truncation.
    pub prompt: Lengths,
    /// Tokens in the completions.
    pub completion: Lengths,
}

/// Token counts of a set of sequences.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Lengths {
    /// The shortest.
    pub min: usize,
    /// The longest.
    pub max: usize,
    /// All together.
    pub total: usize,
    /// On average.
    pub mean: f64,
}

impl Lengths {
    fn of(lengths: impl Iterator<Item = usize> + Clone) -> Self {
        let total = lengths.clone().sum();
        let count = lengths.clone().count().max(1);
        Self {
            min: lengths.clone().min().unwrap_or(0),
            max: lengths.max().unwrap_or(0),
            total,
            mean: total as f64 / count as f64,
        }
    }
}

impl Dataset {
    /// Formats every record. A prompt that is too long loses its beginning, all but the token that begins a text; a
    /// record whose completion leaves no room for one token of prompt is dropped.
    ///
    /// # Errors
    /// When a record cannot be formatted (its line is named), or none fits.
    pub fn build(records: &Records, format: &Format, max_seq_len: usize) -> Result<Self> {
        let bos = format.tokenizer().bos();
        let mut examples = Vec::new();
        let (mut truncated, mut dropped, mut shortest) = (0, 0, usize::MAX);
        for entry in records.entries() {
            let mut example = format.example(&entry.record).map_err(|source| Error::Record {
                path: records.path().into(),
                line: entry.line,
                source: Box::new(source),
            })?;
            shortest = shortest.min(example.completion_ids.len());
            let Some(room) = max_seq_len.checked_sub(example.completion_ids.len()).filter(|&room| room > 0) else {
                dropped += 1;
                continue;
            };
            truncated += usize::from(keep_end(&mut example.prompt_ids, room, bos));
            examples.push(example);
        }
        if examples.is_empty() {
            let (path, records) = (records.path().into(), records.len());
            return Err(Error::NothingFits { path, records, max_seq_len, shortest });
        }
        let labels: BTreeSet<&String> = examples.iter().filter_map(|example| example.label.as_ref()).collect();
        let labels: Vec<String> = labels.into_iter().cloned().collect();
        let report = Report {
            kind: records.kind(),
            records: records.len(),
            examples: examples.len(),
            truncated,
            dropped,
            classes: labels.len(),
            prompt: Lengths::of(examples.iter().map(|example| example.prompt_ids.len())),
            completion: Lengths::of(examples.iter().map(|example| example.completion_ids.len())),
        };
        Ok(Self { examples, labels, report, pad: format.pad() })
    }

    /// The examples in the file's order.
    pub fn examples(&self) -> &[Example] {
        &self.examples
    }

    /// How many examples there are; at least one.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.examples.len()
    }

    /// Examples that belong together: 1, or 2 where they come in pairs of chosen and rejected.
    pub fn group_size(&self) -> usize {
        1
    }

    /// The distinct labels, sorted; none for records without classes.
    pub fn labels(&self) -> &[String] {
        &self.labels
    }

    /// What became of the records.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// The id that fills up short rows.
    pub fn pad(&self) -> u32 {
        self.pad
    }

    /// A right-padded batch of the examples with these numbers; numbers beyond the last example are passed over.
    pub fn batch(&self, indices: &[usize]) -> Batch {
        let examples: Vec<&Example> = indices.iter().filter_map(|&index| self.examples.get(index)).collect();
        Batch::training(&examples, self.pad)
    }

    /// A left-padded batch of the same examples' prompts.
    pub fn prompts(&self, indices: &[usize]) -> Batch {
        let examples = indices.iter().filter_map(|&index| self.examples.get(index));
        let prompts: Vec<&[u32]> = examples.map(|example| example.prompt_ids.as_slice()).collect();
        Batch::prompts(&prompts, self.pad)
    }
}

/// Cuts ids to `room` from the left, but keeps the token that begins a text; says whether anything was cut.
fn keep_end(ids: &mut Vec<u32>, room: usize, bos: Option<u32>) -> bool {
    let excess = ids.len().saturating_sub(room);
    let kept = usize::from(room > 1 && bos.is_some() && ids.first().copied() == bos);
    ids.drain(kept..kept + excess);
    excess > 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Tokenizer;
    use crate::base::testing::{ascii_tokenizer, shared, smollm2};
    use crate::data::record::testing::records;
    use crate::data::{FormatOptions, read_jsonl};

    fn build(content: &str, max_seq_len: usize) -> Result<(Tokenizer, Dataset)> {
        let tokenizer = ascii_tokenizer(None);
        let format = Format::new(&tokenizer, tokenizer.vocab_size(), FormatOptions::default())?;
        let dataset = Dataset::build(&records(content)?, &format, max_seq_len)?;
        Ok((tokenizer, dataset))
    }

    fn completion(prompt: &str, completion: &str) -> String {
        format!("{}\n", serde_json::json!({"prompt": prompt, "completion": completion}))
    }

    #[test]
    fn long_prompts_lose_their_beginning_and_long_completions_are_dropped() {
        let content = completion("abcdefgh", "xy") + &completion("ab", "1234567") + &completion("a", "x");
        let (tokenizer, dataset) = build(&content, 8).unwrap();
        let report = dataset.report();
        assert_eq!((report.records, report.examples, report.truncated, report.dropped), (3, 2, 1, 1));
        assert_eq!((report.prompt.max, report.completion.max, report.completion.min), (5, 3, 2));
        assert_eq!(report.prompt.mean, 3.5);
        let text = |ids: &[u32]| tokenizer.decode(ids, false).unwrap();
        assert_eq!(text(&dataset.examples()[0].prompt_ids), "<s>efgh");
        assert_eq!(text(&dataset.examples()[0].completion_ids), "xy</s>");
    }

    #[test]
    fn one_token_of_room_keeps_the_nearest_token() {
        let (tokenizer, dataset) = build(&completion("abc", "xy"), 4).unwrap();
        assert_eq!(tokenizer.decode(&dataset.examples()[0].prompt_ids, false).unwrap(), "c");
        let error = build(&completion("abc", "xy"), 3).unwrap_err();
        assert!(matches!(error, Error::NothingFits { shortest: 3, .. }), "{error}");
        assert!(build(&completion("abc", "xy"), 0).is_err());
    }

    #[test]
    fn labels_are_sorted_and_distinct() {
        let content = "{\"text\": \"a\", \"label\": \"z\"}\n{\"text\": \"b\", \"label\": \"a_b\"}\n{\"text\": \"c\", \"label\": \"z\"}";
        let (_, dataset) = build(content, 100).unwrap();
        assert_eq!(dataset.labels(), ["a_b", "z"]);
        let batch = dataset.batch(&[0, 2, 99]);
        assert_eq!(batch.batch, 2);
        assert_eq!(batch.labelled(), 2 * " z?".len());
        assert_eq!(dataset.prompts(&[0]).input_ids.len(), dataset.examples()[0].prompt_ids.len());
    }

    #[test]
    fn a_record_that_cannot_be_formatted_is_named() {
        let chat = "\n{\"messages\": [{\"role\": \"user\", \"content\": \"q\"}, {\"role\": \"assistant\", \"content\": \"a\"}]}";
        let error = build(chat, 100).unwrap_err();
        assert!(miette::Diagnostic::help(&error).unwrap().to_string().contains("instruction-tuned"));
        let error = error.to_string();
        assert!(
            error.ends_with("data.jsonl:2: the records are conversations, but the tokenizer has no chat template"),
            "{error}"
        );
    }

    #[test]
    fn banking77_fits_smollm2() {
        let (Some(gguf), Some(path)) = (smollm2(), shared("data/banking77/test.jsonl")) else { return };
        let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
        let format = Format::new(&tokenizer, 49152, FormatOptions::default()).unwrap();
        let records = read_jsonl(&path).unwrap().per_class(2, 1).unwrap();
        let dataset = Dataset::build(&records, &format, 256).unwrap();
        assert_eq!((dataset.len(), dataset.labels().len(), dataset.report().dropped), (154, 77, 0));
        assert!(dataset.examples().iter().all(|example| example.completion_ids.last() == Some(&2)));
    }
}
