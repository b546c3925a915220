//! The examples of a set of records that fit a length, in rows for a model.

use std::collections::BTreeSet;

use super::packing::pack;
use super::place::listed;
use super::report::{Drops, Packed, Truncated};
use super::truncation::{Cut, DropReason, Truncation};
use super::{Batch, Error, Example, Format, Layout, Lengths, Records, Report, Result, Sampler};

/// How examples become rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DatasetOptions {
    /// Longest row in tokens.
    pub max_seq_len: usize,
    /// What becomes of an example that is longer.
    pub truncation: Truncation,
    /// Whether several examples share a row.
    pub packing: bool,
    /// Whether a batch's groups are of similar length.
    pub group_by_length: bool,
}

/// Examples ready for batching. Never empty.
///
/// What is ordered and counted are groups: an example, a pair of a chosen and a rejected one, or a row of packed examples.
#[derive(Clone, Debug)]
pub struct Dataset {
    examples: Vec<Example>,
    group_size: usize,
    /// The examples that share a row, where rows are packed.
    packs: Option<Vec<Vec<usize>>>,
    labels: Vec<String>,
    report: Report,
    pad: u32,
    group_by_length: bool,
}

impl Dataset {
    /// Formats every record, cuts what is too long or drops it, and packs rows where that is asked for.
    ///
    /// # Errors
    /// When a record cannot be formatted (its place is named), none is left, or pairs are to be packed.
    pub fn build(records: &Records, format: &Format<'_>, options: &DatasetOptions) -> Result<Self> {
        let DatasetOptions { max_seq_len, truncation, packing, group_by_length } = *options;
        let group_size = if records.layout() == Layout::Preference { 2 } else { 1 };
        if packing && group_size > 1 {
            let reason = "cannot be used with preference records".into();
            return Err(Error::Option { option: "packing", reason, help: "switch it off: a pair's rows stay apart" });
        }
        let bos = format.tokenizer().bos();
        let (mut examples, mut drops) = (Vec::new(), Drops::default());
        let mut truncated = Truncated { side: truncation, records: 0, lost: Cut::default() };
        for entry in records.entries() {
            let mut group = format
                .examples(&entry.record)
                .map_err(|source| Error::Record { place: entry.place.clone(), source: Box::new(source) })?;
            match fit(&mut group, group_size, truncation, max_seq_len, bos) {
                Ok(lost) => {
                    truncated.records += usize::from(lost != Cut::default());
                    truncated.lost.tokens += lost.tokens;
                    truncated.lost.labels += lost.labels;
                    examples.extend(group);
                }
                Err(reason) => drops.add(reason, &entry.place),
            }
        }
        let dropped = drops.into_vec();
        if examples.is_empty() {
            let why = dropped.iter().map(super::Dropped::text).collect::<Vec<_>>().join("; ");
            let (paths, records) = (listed(records.files()), records.len());
            return Err(Error::NothingLeft { paths, records, max_seq_len, why });
        }
        let labels: BTreeSet<&String> = examples.iter().filter_map(|example| example.label.as_ref()).collect();
        let labels: Vec<String> = labels.into_iter().cloned().collect();
        let packs = packing.then(|| pack(&examples.iter().map(Example::len).collect::<Vec<_>>(), max_seq_len));
        let sequence = Lengths::of(examples.iter().map(Example::len));
        let packed = |packs: &Vec<Vec<usize>>| Packed {
            rows: packs.len(),
            filled: sequence.total as f64 / (packs.len() * max_seq_len) as f64,
        };
        let report = Report {
            layout: records.layout(),
            records: records.len(),
            examples: examples.len(),
            labelled: examples.iter().map(Example::labelled).sum(),
            truncated,
            dropped,
            classes: labels.len(),
            prompt: Lengths::of(examples.iter().map(|example| example.prompt_ids.len())),
            completion: Lengths::of(examples.iter().map(|example| example.completion_ids.len())),
            packing: packs.as_ref().map(packed),
            sequence,
            max_seq_len,
        };
        Ok(Self { examples, group_size, packs, labels, report, pad: format.pad(), group_by_length })
    }

    /// The examples in the order of their files; of a pair, the chosen one first.
    pub fn examples(&self) -> &[Example] {
        &self.examples
    }

    /// Examples in a group: 2 for preference records, otherwise 1. A packed row is one group, whatever it holds.
    pub fn group_size(&self) -> usize {
        self.group_size
    }

    /// How many groups there are; at least one.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.packs.as_ref().map_or(self.examples.len() / self.group_size, Vec::len)
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

    /// The rows of a group, each with the examples that share it: none beyond the last group.
    fn rows(&self, group: usize) -> Vec<Vec<&Example>> {
        match &self.packs {
            Some(packs) => {
                let pack = packs.get(group).into_iter();
                pack.map(|pack| pack.iter().filter_map(|&index| self.examples.get(index)).collect()).collect()
            }
            None => {
                let examples = self.examples.iter().skip(group.saturating_mul(self.group_size)).take(self.group_size);
                examples.map(|example| vec![example]).collect()
            }
        }
    }

    /// Tokens in the longest row of a group.
    pub fn row_len(&self, group: usize) -> usize {
        let tokens = |row: &Vec<&Example>| row.iter().map(|example| example.len()).sum();
        self.rows(group).iter().map(tokens).max().unwrap_or(0)
    }

    /// A right-padded batch of the groups with these numbers; numbers beyond the last group are passed over. The rows of
    /// pairs alternate: chosen, rejected, chosen, rejected.
    pub fn batch(&self, groups: &[usize]) -> Batch {
        let rows: Vec<Vec<&Example>> = groups.iter().flat_map(|&group| self.rows(group)).collect();
        match self.packs {
            Some(_) => Batch::packed(&rows, self.pad),
            None => Batch::training(&rows.concat(), self.pad),
        }
    }

    /// A left-padded batch of the prompts of the examples with these numbers.
    pub fn prompts(&self, examples: &[usize]) -> Batch {
        let examples = examples.iter().filter_map(|&index| self.examples.get(index));
        let prompts: Vec<&[u32]> = examples.map(|example| example.prompt_ids.as_slice()).collect();
        Batch::prompts(&prompts, self.pad)
    }

    /// The order of the groups, as the seed and the options decide it.
    pub fn sampler(&self, batch_size: usize, seed: u64) -> Sampler {
        let sampler = Sampler::new(self.len(), batch_size, seed);
        if !self.group_by_length {
            return sampler;
        }
        sampler.group_by_length((0..self.len()).map(|group| self.row_len(group)).collect())
    }

    /// The SHA-256 of what is learnt: tokens, masks, and rows. A run that goes on needs the same.
    pub fn digest(&self) -> String {
        let ids = |ids: &[u32]| ids.iter().chain([&u32::MAX]).flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>();
        let mut bytes = Vec::new();
        for example in &self.examples {
            bytes.extend(ids(&example.prompt_ids));
            bytes.extend(example.prompt_mask.iter().map(|&learnt| u8::from(learnt)));
            bytes.extend(ids(&example.completion_ids));
        }
        for pack in self.packs.iter().flatten() {
            bytes.extend(pack.iter().chain([&usize::MAX]).flat_map(|&index| (index as u64).to_le_bytes()));
        }
        bytes.extend([self.group_size as u8, u8::from(self.group_by_length)]);
        crate::files::sha256_bytes(&bytes)
    }
}

/// Makes what a record became fit, or says why it cannot be used.
fn fit(
    group: &mut [Example],
    group_size: usize,
    truncation: Truncation,
    max_seq_len: usize,
    bos: Option<u32>,
) -> std::result::Result<Cut, DropReason> {
    if group.len() != group_size {
        return Err(DropReason::NothingToLearn);
    }
    let lost = truncation.fit(group, max_seq_len, bos)?;
    match group {
        [chosen, rejected] if chosen.completion_ids == rejected.completion_ids => Err(DropReason::SameAnswers),
        _ => Ok(lost),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::base::Tokenizer;
    use crate::base::testing::{CHATML, ascii_tokenizer, shared, smollm2};
    use crate::data::FormatOptions;
    use crate::data::record::testing::{read, records};

    fn build(content: &str, max_seq_len: usize) -> Result<(Tokenizer, Dataset)> {
        let tokenizer = ascii_tokenizer(None);
        let format = Format::new(&tokenizer, tokenizer.vocab_size(), FormatOptions::default())?;
        let dataset = Dataset::build(&records(content)?, &format, &options(max_seq_len))?;
        Ok((tokenizer, dataset))
    }

    fn options(max_seq_len: usize) -> DatasetOptions {
        let truncation = Truncation::Left;
        DatasetOptions { max_seq_len, truncation, packing: false, group_by_length: false }
    }

    fn completion(prompt: &str, completion: &str) -> String {
        format!("{}\n", serde_json::json!({"prompt": prompt, "completion": completion}))
    }

    #[test]
    fn long_prompts_lose_their_beginning_and_long_completions_are_dropped() {
        let content = completion("abcdefgh", "xy") + &completion("ab", "1234567") + &completion("a", "x");
        let (tokenizer, dataset) = build(&content, 8).unwrap();
        let report = dataset.report();
        assert_eq!((report.records, report.examples, report.truncated.records, report.num_dropped()), (3, 2, 1, 1));
        assert_eq!((report.truncated.lost, report.labelled), (Cut { tokens: 4, labels: 0 }, 5));
        let notes = report.notes().join("\n").replace(&report.dropped[0].first[0], "data.jsonl:2");
        insta::assert_snapshot!(notes, @"
        1 of 3 records lost the beginning of their prompt at 8 tokens: 4 tokens in all, 0 of them with a label
        of 3 records, 1 dropped: a completion that leaves no room for a prompt (data.jsonl:2)
        ");
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
        assert!(error.to_string().contains("at 3 tokens: 1 dropped: a completion that leaves no room"), "{error}");
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
        let records = read(&path).unwrap().per_class(2, 1).unwrap();
        let dataset = Dataset::build(&records, &format, &options(256)).unwrap();
        assert_eq!((dataset.len(), dataset.labels().len(), dataset.report().num_dropped()), (154, 77, 0));
        assert!(dataset.examples().iter().all(|example| example.completion_ids.last() == Some(&2)));
    }

    #[test]
    fn pairs_are_ordered_as_pairs_and_their_rows_alternate() {
        let pair = |prompt: &str, chosen: &str, rejected: &str| {
            format!("{}\n", serde_json::json!({"prompt": prompt, "chosen": chosen, "rejected": rejected}))
        };
        let content = pair("p", "a", "bc") + &pair("q", "x", "x") + &pair("r", "d", "e");
        let (tokenizer, dataset) = build(&content, 100).unwrap();
        assert_eq!((dataset.group_size(), dataset.len(), dataset.examples().len()), (2, 2, 4));
        assert_eq!(dataset.report().dropped[0].reason, DropReason::SameAnswers);
        let batch = dataset.batch(&[1, 0]);
        let rows: Vec<String> = batch
            .input_ids
            .chunks(batch.seq)
            .map(|row| tokenizer.decode(&row.iter().map(|&id| id as u32).collect::<Vec<_>>(), false).unwrap())
            .map(|row| row.trim_end_matches("</s>").to_string())
            .collect();
        assert_eq!(rows, ["<s>rd", "<s>re", "<s>pa", "<s>pbc"]);
        assert_eq!((batch.batch, batch.segments), (4, None));
        assert_eq!((dataset.row_len(0), dataset.row_len(7)), (5, 0));
        let mut sampler = dataset.sampler(1, 0);
        let mut cursor = crate::data::Cursor::default();
        let mut groups = [sampler.next(&mut cursor), sampler.next(&mut cursor)].concat();
        groups.sort();
        assert_eq!(groups, [0, 1]);
    }

    #[test]
    fn packed_rows_hold_every_example_once() {
        let content: String = ["a", "bcdef", "gh", "ijk"].iter().map(|text| completion(text, "z")).collect();
        let tokenizer = ascii_tokenizer(None);
        let format = Format::new(&tokenizer, tokenizer.vocab_size(), FormatOptions::default()).unwrap();
        let packed = DatasetOptions { packing: true, ..options(12) };
        let dataset = Dataset::build(&records(&content).unwrap(), &format, &packed).unwrap();
        // <s>…z</s>: 4, 8, 5 and 6 tokens; 8 + 4 and 6 + 5
        assert_eq!((dataset.len(), dataset.examples().len()), (2, 4));
        assert_eq!(dataset.report().packing, Some(Packed { rows: 2, filled: 23.0 / 24.0 }));
        let batch = dataset.batch(&[0, 1]);
        assert_eq!((batch.batch, batch.seq, batch.labelled(), batch.tokens()), (2, 12, 8, 23));
        assert_eq!(dataset.row_len(1), 11);
        assert_ne!(
            dataset.digest(),
            Dataset::build(&records(&content).unwrap(), &format, &options(12)).unwrap().digest()
        );
        let pairs = records("{\"prompt\": \"p\", \"chosen\": \"a\", \"rejected\": \"b\"}").unwrap();
        assert!(matches!(Dataset::build(&pairs, &format, &packed), Err(Error::Option { option: "packing", .. })));
    }

    /// JSON that often comes near to a record.
    fn json() -> impl Strategy<Value = serde_json::Value> {
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<i32>().prop_map(Into::into),
            "[ a-c\\n{}%<|>é]{0,12}".prop_map(Into::into),
            prop_oneof![Just("user"), Just("assistant"), Just("human"), Just("gpt")].prop_map(Into::into),
        ];
        let name = prop_oneof![
            Just("text"),
            Just("label"),
            Just("prompt"),
            Just("completion"),
            Just("messages"),
            Just("conversations"),
            Just("instruction"),
            Just("output"),
            Just("chosen"),
            Just("rejected"),
            Just("role"),
            Just("content"),
            Just("from"),
            Just("value"),
            Just("system"),
        ];
        leaf.prop_recursive(4, 24, 4, move |inner| {
            let fields = proptest::collection::vec((name.clone().prop_map(String::from), inner.clone()), 0..5);
            prop_oneof![
                proptest::collection::vec(inner, 0..4).prop_map(Into::into),
                fields.prop_map(|fields| serde_json::Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    proptest! {
        /// Arbitrary records become rows that keep the contract, or an error that names the file.
        #[test]
        fn arbitrary_records_are_rows_or_an_error(
            values in proptest::collection::vec(json(), 1..4), max_seq_len in 2_usize..60, choice in 0..12_usize,
        ) {
            let content: String = values.iter().map(|value| format!("{value}\n")).collect();
            let Ok(records) = records(&content) else { return Ok(()) };
            let tokenizer = ascii_tokenizer((choice % 2 == 0).then_some(CHATML));
            let train_on = if choice % 3 == 0 { vec!["user".into(), "assistant".into()] } else { Vec::new() };
            let options = FormatOptions { train_on, train_on_prompt: choice % 4 == 0, ..FormatOptions::default() };
            let format = Format::new(&tokenizer, tokenizer.vocab_size(), options).unwrap();
            let truncation = [Truncation::Left, Truncation::Right, Truncation::Drop][choice % 3];
            let packing = choice > 6 && records.layout() != Layout::Preference;
            let options = DatasetOptions { max_seq_len, truncation, packing, group_by_length: choice > 3 };
            match Dataset::build(&records, &format, &options) {
                Err(error) => prop_assert!(error.to_string().contains("data.jsonl"), "{}", error),
                Ok(dataset) => {
                    let batch = dataset.batch(&(0..dataset.len()).collect::<Vec<_>>());
                    prop_assert!(batch.seq <= max_seq_len && batch.labelled() == dataset.report().labelled);
                    prop_assert_eq!(batch.tokens(), dataset.report().sequence.total);
                    prop_assert!(batch.labels.chunks(batch.seq).all(|row| row[0] == crate::data::IGNORED));
                    let lost = dataset.report().num_dropped() + dataset.examples().len() / dataset.group_size();
                    prop_assert_eq!(lost, records.len());
                }
            }
        }
    }
}
