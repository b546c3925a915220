//! `prefold data`

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use miette::{IntoDiagnostic, Result};
use serde_json::{Map, Value, json};

use super::preview::{Preview, SplitPreview};
use super::train::{given, resolve};
use super::{Context, usage};
use crate::data::{ChatUse, DataConfig, Fields, Format, LabelText, Layout, Truncation, nearest};

/// Look at data as training sees it
#[derive(Args, Debug)]
pub(super) struct Data {
    #[command(subcommand)]
    command: DataCommand,
}

#[derive(Debug, Subcommand)]
enum DataCommand {
    Preview(Box<PreviewArgs>),
}

/// Show the tokens of the first examples, which of them are learnt, lengths, and what was cut or dropped
///
/// Options come from the defaults, then from --config, then from the command line. Nothing is trained or written.
#[derive(Args, Debug)]
struct PreviewArgs {
    /// A configuration of `prefold train`
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Hugging Face folder, .gguf file, or the name of a fetched model
    #[arg(long)]
    model: Option<String>,
    /// Examples to show
    #[arg(short, long, default_value_t = 3)]
    n: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Draws --holdout, --limit and --per-class
    #[arg(long)]
    seed: Option<u64>,
    #[command(flatten)]
    data: DataArgs,
}

/// The options of the data that are used most; a configuration file has all.
#[derive(Args, Debug)]
#[command(next_help_heading = "Data")]
pub(super) struct DataArgs {
    /// Records: JSONL, JSON, CSV, TSV or Parquet files, or folders of such shards
    #[arg(long, value_name = "PATH", num_args = 1..)]
    data: Option<Vec<PathBuf>>,
    /// Records to evaluate on
    #[arg(long, value_name = "PATH", num_args = 1.., conflicts_with = "holdout")]
    eval: Option<Vec<PathBuf>>,
    /// Records of --data to keep apart for evaluation: a count or a fraction
    #[arg(long, value_name = "N|FRACTION")]
    holdout: Option<String>,
    /// What a record looks like: classification, completion, text, alpaca, messages, sharegpt or preference [default: what the
    /// first record's fields tell]
    #[arg(long)]
    layout: Option<Layout>,
    /// A field's other name, as in prompt=question; may be repeated
    #[arg(long, value_name = "FIELD=NAME", value_parser = field)]
    field: Vec<(String, String)>,
    /// Longest row in tokens
    #[arg(long)]
    max_seq_len: Option<usize>,
    /// What a longer example loses: the beginning of its prompt (left), the end of its completion (right), or all (drop)
    #[arg(long, value_name = "SIDE")]
    truncation: Option<Truncation>,
    /// Put several examples into a row
    #[arg(long)]
    packing: bool,
    /// Make batches of examples of similar length
    #[arg(long)]
    group_by_length: bool,
    /// Roles whose messages are learnt in a conversation, comma-separated [default: assistant]
    #[arg(long, value_name = "ROLES", value_delimiter = ',')]
    train_on: Option<Vec<String>>,
    /// Learn only the last message of these roles
    #[arg(long)]
    mask_history: bool,
    /// Learn prompts too
    #[arg(long)]
    train_on_prompt: bool,
    /// At most so many training records
    #[arg(long)]
    limit: Option<usize>,
    /// At most so many training records of each label
    #[arg(long)]
    per_class: Option<usize>,
    /// At most so many evaluation records
    #[arg(long)]
    eval_limit: Option<usize>,
    /// Prompt of a {"text","label"} record, a Jinja template over `text`
    #[arg(long)]
    template: Option<String>,
    /// System prompt
    #[arg(long)]
    system: Option<String>,
    /// A chat template in the place of the model's own: a file that ends in .jinja, or the Jinja itself
    #[arg(long, value_name = "FILE")]
    chat_template: Option<String>,
    /// Do not use the model's chat template
    #[arg(long)]
    no_chat: bool,
    /// Learn labels as they are written, underscores included
    #[arg(long)]
    verbatim_labels: bool,
}

impl DataArgs {
    /// What the command line says about the data, and nothing else.
    pub(super) fn given(&self) -> Value {
        let flag = |on: bool| if on { json!(true) } else { Value::Null };
        let format = given([
            ("template", json!(self.template)),
            ("system", json!(self.system)),
            ("chat", if self.no_chat { json!(ChatUse::Never) } else { Value::Null }),
            ("labels", if self.verbatim_labels { json!(LabelText::Verbatim) } else { Value::Null }),
            ("train_on", json!(self.train_on)),
            ("mask_history", flag(self.mask_history)),
            ("chat_template", json!(self.chat_template)),
            ("train_on_prompt", flag(self.train_on_prompt)),
        ]);
        let fields: Map<String, Value> = self.field.iter().map(|(field, name)| (field.clone(), json!(name))).collect();
        given([
            ("train", json!(self.data)),
            ("eval", json!(self.eval)),
            ("holdout", json!(self.holdout)),
            ("layout", json!(self.layout)),
            ("fields", Value::Object(fields)),
            ("max_seq_len", json!(self.max_seq_len)),
            ("truncation", json!(self.truncation)),
            ("packing", flag(self.packing)),
            ("group_by_length", flag(self.group_by_length)),
            ("limit", json!(self.limit)),
            ("per_class", json!(self.per_class)),
            ("eval_limit", json!(self.eval_limit)),
            ("format", format),
        ])
    }

    /// Of two options for one thing, the command line's wins over the file's.
    pub(super) fn settle(&self, config: &mut DataConfig) {
        if self.holdout.is_some() {
            config.eval = None;
        }
        if self.eval.is_some() {
            config.holdout = None;
        }
    }
}

/// `prompt=question`
fn field(text: &str) -> std::result::Result<(String, String), String> {
    let (field, name) = text.split_once('=').ok_or("give a field and its name, as in prompt=question")?;
    let known = serde_json::to_value(Fields::default()).unwrap_or_default();
    let known: Vec<&str> = known.as_object().into_iter().flat_map(Map::keys).map(String::as_str).collect();
    if known.contains(&field) {
        return Ok((field.into(), name.into()));
    }
    let meant = nearest(field, known.iter().copied()).map(|meant| format!("; did you mean `{meant}`?"));
    Err(format!("`{field}` is none of {}{}", known.join(", "), meant.unwrap_or_default()))
}

impl Data {
    pub(super) fn run(self, context: &Context) -> Result<ExitCode> {
        match self.command {
            DataCommand::Preview(preview) => preview.run(context),
        }
    }
}

impl PreviewArgs {
    fn run(self, context: &Context) -> Result<ExitCode> {
        let options = given([
            ("model", json!(self.model)),
            ("data", self.data.given()),
            ("train", given([("seed", json!(self.seed))])),
        ]);
        let mut config = resolve(self.config.as_deref(), options)?;
        self.data.settle(&mut config.data);
        let (Some(model), Some(_)) = (&config.model, &config.data.train) else {
            return Err(usage("--model and --data are needed", "give them on the command line or in --config"));
        };
        let checkpoint = context.checkpoint(model)?;
        let tokenizer = checkpoint.tokenizer()?;
        let spec = checkpoint.spec();
        let format = Format::new(&tokenizer, spec.vocab_size, config.data.format.clone())?;
        let (train, held_out) = config.data.load(&format, config.train.seed, spec.max_positions)?;
        let preview = Preview {
            train: SplitPreview::new(&train, &tokenizer, self.n)?,
            held_out: held_out.map(|dataset| SplitPreview::new(&dataset, &tokenizer, self.n)).transpose()?,
        };
        if self.json {
            println!("{}", serde_json::to_string_pretty(&preview).into_diagnostic()?);
        } else {
            anstream::print!("{}", preview.render());
        }
        Ok(ExitCode::SUCCESS)
    }
}
