//! A data set as a person reads it: tokens with their mask, lengths, labels, what was cut and dropped.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anstyle::{AnsiColor, Style};
use serde::Serialize;

use super::style::{percent, table};
use crate::base::{self, Tokenizer};
use crate::data::{Dataset, Example, Lengths, Report};

/// What `prefold data preview` shows.
#[derive(Debug, Serialize)]
pub(super) struct Preview {
    pub(super) train: SplitPreview,
    pub(super) held_out: Option<SplitPreview>,
}

/// The training or the held-out part.
#[derive(Debug, Serialize)]
pub(super) struct SplitPreview {
    report: Report,
    /// Groups that training orders: examples, pairs or packed rows.
    groups: usize,
    /// Examples by the length of prompt and completion together.
    histogram: Vec<Bin>,
    /// Examples of each label.
    labels: BTreeMap<String, usize>,
    /// The first examples.
    examples: Vec<ExamplePreview>,
}

/// Lengths from `from` to `to` tokens, both included.
#[derive(Debug, PartialEq, Serialize)]
struct Bin {
    from: usize,
    to: usize,
    examples: usize,
}

#[derive(Debug, Serialize)]
struct ExamplePreview {
    /// Its number in the data set, counted from 1.
    number: usize,
    /// `chosen` or `rejected`, of a pair.
    #[serde(skip_serializing_if = "Option::is_none")]
    answer: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    label: Option<String>,
    tokens: Vec<Token>,
}

#[derive(Debug, Serialize)]
struct Token {
    id: u32,
    /// What it adds to the text; nothing where it holds a part of a character only.
    text: String,
    learnt: bool,
}

const BINS: usize = 10;
/// Labels that are listed; a table of more helps nobody.
const LISTED_LABELS: usize = 12;
/// Cells of the longest bar.
const BAR: usize = 40;

const LEARNT: Style = AnsiColor::Green.on_default().bold();
const GIVEN: Style = Style::new().dimmed();
const HEADING: Style = Style::new().bold();
const WARNING: Style = AnsiColor::Yellow.on_default();

impl SplitPreview {
    pub(super) fn new(dataset: &Dataset, tokenizer: &Tokenizer, examples: usize) -> base::Result<Self> {
        let mut labels = BTreeMap::new();
        for label in dataset.examples().iter().filter_map(|example| example.label.as_ref()) {
            *labels.entry(label.clone()).or_insert(0) += 1;
        }
        let size = dataset.group_size();
        let first = dataset.examples().iter().take(examples.saturating_mul(size)).enumerate();
        let shown = |(index, example): (usize, &Example)| {
            let answer = (size == 2).then_some(if index % 2 == 0 { "chosen" } else { "rejected" });
            let tokens = tokens(example, tokenizer)?;
            Ok(ExamplePreview { number: index / size + 1, answer, label: example.label.clone(), tokens })
        };
        Ok(Self {
            report: dataset.report().clone(),
            groups: dataset.len(),
            histogram: histogram(dataset.examples().iter().map(Example::len), &dataset.report().sequence),
            labels,
            examples: first.map(shown).collect::<base::Result<_>>()?,
        })
    }
}

fn tokens(example: &Example, tokenizer: &Tokenizer) -> base::Result<Vec<Token>> {
    let mut stream = tokenizer.stream(&[], false);
    example.tokens().map(|(id, learnt)| Ok(Token { id, text: stream.push(id)?, learnt })).collect()
}

/// Bins of equal width from the shortest to the longest.
fn histogram(lengths: impl Iterator<Item = usize>, all: &Lengths) -> Vec<Bin> {
    let width = (all.max - all.min + 1).div_ceil(BINS);
    let mut bins: Vec<Bin> = (all.min..=all.max)
        .step_by(width)
        .map(|from| Bin { from, to: (from + width - 1).min(all.max), examples: 0 })
        .collect();
    for length in lengths {
        if let Some(bin) = bins.get_mut((length - all.min) / width) {
            bin.examples += 1;
        }
    }
    bins
}

impl Preview {
    /// Text with ANSI colours; without them it says the same.
    pub(super) fn render(&self) -> String {
        let mut out = self.train.render("Training data");
        if let Some(held_out) = &self.held_out {
            out += "\n";
            out += &held_out.render("Held-out data");
        }
        out
    }
}

impl SplitPreview {
    fn render(&self, name: &str) -> String {
        let report = &self.report;
        let mut out = format!("{HEADING}{name}{HEADING:#}\n");
        // writing to a String does not fail
        let _ = writeln!(
            out,
            "{} {} records: {} examples, {} of {} tokens learnt ({})",
            report.records,
            report.layout,
            report.examples,
            report.labelled,
            report.sequence.total,
            percent(report.labelled as f64 / report.sequence.total.max(1) as f64),
        );
        if let Some(packing) = &report.packing {
            let (rows, filled) = (packing.rows, percent(packing.filled));
            let _ = writeln!(out, "packed into {rows} rows of {} tokens, {filled} filled", report.max_seq_len);
        }
        for note in report.notes() {
            let _ = writeln!(out, "{WARNING}{note}{WARNING:#}");
        }
        for example in &self.examples {
            out += "\n";
            out += &example.render();
        }
        out += &format!("\n{HEADING}Lengths in tokens{HEADING:#}\n{}\n", lengths(report));
        let most = self.histogram.iter().map(|bin| bin.examples).max().unwrap_or(0).max(1);
        let digits = report.sequence.max.to_string().len();
        for bin in &self.histogram {
            let bar = "█".repeat((bin.examples * BAR).div_ceil(most));
            let (from, to) = (bin.from, if bin.to > bin.from { format!("–{}", bin.to) } else { String::new() });
            let _ = writeln!(out, "{from:>digits$}{to:<width$} {bar} {}", bin.examples, width = digits + 1);
        }
        if !self.labels.is_empty() {
            let _ = writeln!(out, "\n{HEADING}Labels{HEADING:#} ({})", self.labels.len());
            let mut by_count: Vec<(&String, &usize)> = self.labels.iter().collect();
            by_count.sort_by(|a, b| b.1.cmp(a.1).then(a.0.cmp(b.0)));
            for (label, count) in by_count.iter().take(LISTED_LABELS) {
                let _ = writeln!(out, "{count:>6}  {label}");
            }
            if let (Some(rest @ 1..), Some((_, fewest))) = (by_count.len().checked_sub(LISTED_LABELS), by_count.last())
            {
                let _ = writeln!(out, "        and {rest} more, the rarest with {fewest}");
            }
        }
        out
    }
}

fn lengths(report: &Report) -> String {
    let mut table = table(&["", "min", "median", "90 %", "99 %", "max", "mean"]);
    let parts = [("prompt", &report.prompt), ("completion", &report.completion), ("together", &report.sequence)];
    for (name, lengths) in parts {
        let Lengths { min, p50, p90, p99, max, mean, .. } = lengths;
        let mean = format!("{mean:.1}");
        let numbers = [min, p50, p90, p99, max].map(ToString::to_string);
        table.add_row(std::iter::once(name.to_string()).chain(numbers).chain([mean]).collect::<Vec<_>>());
    }
    table.to_string()
}

impl ExamplePreview {
    /// A line for every run of tokens that are given or learnt; bars stand between tokens.
    fn render(&self) -> String {
        let learnt = self.tokens.iter().filter(|token| token.learnt).count();
        let mut heading = format!("Example {}", self.number);
        for part in self.answer.into_iter().chain(self.label.as_deref()) {
            heading += &format!(" · {part}");
        }
        let mut out = format!("{HEADING}{heading}{HEADING:#} · {} tokens, {learnt} learnt\n", self.tokens.len());
        for run in self.tokens.chunk_by(|a, b| a.learnt == b.learnt) {
            let (name, style) =
                if run.first().is_some_and(|token| token.learnt) { ("learnt", LEARNT) } else { ("given ", GIVEN) };
            let text = run.iter().map(Token::shown).collect::<Vec<_>>().join("│");
            // a style ends with its line, so that a pager that shows lines apart shows it right
            let lines: Vec<String> = text.lines().map(|line| format!("{style}{line}{style:#}")).collect();
            let _ = writeln!(out, "  {name} {}", lines.join("\n         "));
        }
        out
    }
}

impl Token {
    /// Its text with line ends and control characters made visible.
    fn shown(&self) -> String {
        if self.text.is_empty() {
            return "◌".into();
        }
        let mut out = String::new();
        for character in self.text.chars() {
            match character {
                '\n' => out += "⏎\n",
                '\t' => out.push('⇥'),
                control if control.is_control() => out.extend(control.escape_unicode()),
                other => out.push(other),
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::testing::{CHATML, ascii_tokenizer};
    use crate::data::{DataConfig, Format};

    fn preview(content: &str, config: serde_json::Value) -> Preview {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.jsonl");
        std::fs::write(&path, content).unwrap();
        let mut config: DataConfig = serde_json::from_value(config).unwrap();
        config.train = Some(path.into());
        let tokenizer = ascii_tokenizer(Some(CHATML));
        let format = Format::new(&tokenizer, tokenizer.vocab_size(), config.format.clone()).unwrap();
        let (train, held_out) = config.load(&format, 0, 512).unwrap();
        assert!(held_out.is_none());
        Preview { train: SplitPreview::new(&train, &tokenizer, 1).unwrap(), held_out: None }
    }

    const CONTENT: &str = "{\"text\": \"one two\", \"label\": \"a\"}\n{\"text\": \"three\", \"label\": \"b\"}\n{\"text\": \
                           \"four\", \"label\": \"a\"}\n{\"text\": \"long\", \"label\": \"much too long to be kept with \
                           any prompt in so few tokens\"}\n";

    #[test]
    fn the_mask_is_told_without_colour_too() {
        let preview = preview(CONTENT, serde_json::json!({"max_seq_len": 44}));
        let coloured = preview.render();
        assert!(coloured.contains("\u{1b}[1m\u{1b}[32m"), "what is learnt is green");
        let plain = anstream::adapter::strip_str(&coloured).to_string();
        let folder = preview.train.report.dropped[0].first[0].trim_end_matches("data.jsonl:4").to_string();
        insta::assert_snapshot!(plain.replace(&folder, ""), @"
        Training data
        4 classification records: 3 examples, 6 of 100 tokens learnt (6.0 %)
        of 4 records, 1 dropped: a completion that leaves no room for a prompt (data.jsonl:4)

        Example 1 · a · 35 tokens, 2 learnt
          given  <|im_start|>│u│s│e│r│⏎
                 │o│n│e│ │t│w│o│⏎
                 │l│a│b│e│l│:│<|im_end|>│⏎
                 │<|im_start|>│a│s│s│i│s│t│a│n│t│⏎
          learnt a│<|im_end|>

        Lengths in tokens
        ┌────────────┬─────┬────────┬──────┬──────┬─────┬──────┐
        │            ┆ min ┆ median ┆ 90 % ┆ 99 % ┆ max ┆ mean │
        ╞════════════╪═════╪════════╪══════╪══════╪═════╪══════╡
        │ prompt     ┆ 30  ┆ 31     ┆ 33   ┆ 33   ┆ 33  ┆ 31.3 │
        │ completion ┆ 2   ┆ 2      ┆ 2    ┆ 2    ┆ 2   ┆ 2.0  │
        │ together   ┆ 32  ┆ 33     ┆ 35   ┆ 35   ┆ 35  ┆ 33.3 │
        └────────────┴─────┴────────┴──────┴──────┴─────┴──────┘
        32    ████████████████████████████████████████ 1
        33    ████████████████████████████████████████ 1
        34     0
        35    ████████████████████████████████████████ 1

        Labels (2)
             2  a
             1  b
        ");
    }

    #[test]
    fn json_holds_every_token() {
        let preview = preview(CONTENT, serde_json::json!({"max_seq_len": 44, "packing": true}));
        let json = serde_json::to_value(&preview).unwrap();
        let tokens = json["train"]["examples"][0]["tokens"].as_array().unwrap();
        let text: String = tokens.iter().filter(|t| t["learnt"] == true).map(|t| t["text"].as_str().unwrap()).collect();
        assert_eq!(text, "a<|im_end|>");
        assert_eq!(json["train"]["labels"], serde_json::json!({"a": 2, "b": 1}));
        assert_eq!(json["train"]["report"]["dropped"][0]["reason"], "completion_too_long");
    }

    #[test]
    fn every_length_is_in_a_bin() {
        for longest in 3..40_usize {
            let lengths = 3..=longest;
            let all = Lengths { min: 3, max: longest, ..Lengths::default() };
            let bins = histogram(lengths.clone(), &all);
            assert!(bins.len() <= BINS);
            assert_eq!(bins.iter().map(|bin| bin.examples).sum::<usize>(), lengths.count());
            assert!(bins.iter().all(|bin| bin.examples == bin.to - bin.from + 1));
        }
    }
}
