//! `prefold generate`

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use candle_core::DType;
use clap::Args;
use miette::{IntoDiagnostic, Result};

use super::active::Active;
use super::device::DeviceArgs;
use super::verify::{Engine, open_given};
use super::{Context, existing_graph, usage};
use crate::base::{Decoder, Input, KvCache, Message, NoHook, SiteHook, Tokenizer};
use crate::runtime::{GraphDecoder, OrtOptions};
use crate::train::ComputeType;

/// Continue a prompt greedily, with a checkpoint in candle or a graph in a runtime
#[derive(Args, Debug)]
pub(super) struct Generate {
    /// Run this checkpoint in candle
    #[arg(long, required_unless_present = "graph", conflicts_with = "graph")]
    model: Option<String>,
    /// Run this graph in a runtime; its folder holds the tokenizer
    #[arg(long)]
    graph: Option<PathBuf>,
    /// With this adapter (--model only: a graph carries its own)
    #[arg(long, conflicts_with = "graph")]
    adapter: Option<PathBuf>,
    /// The prompt
    #[arg(long)]
    prompt: String,
    /// System prompt, where the model has a chat template
    #[arg(long)]
    system: Option<String>,
    /// Continue the prompt as plain text
    #[arg(long)]
    no_chat: bool,
    /// At most so many tokens
    #[arg(long, default_value_t = 128)]
    max_new_tokens: usize,
    /// Type that candle computes in: f64, f32, bf16 or f16
    #[arg(long, default_value = "f32")]
    dtype: ComputeType,
    #[command(flatten)]
    device: DeviceArgs,
    /// Runtime for --graph
    #[arg(long, default_value = "ort", value_enum)]
    runtime: Engine,
    #[command(flatten)]
    active: Active,
}

impl Generate {
    pub(super) fn run(self, context: &Context) -> Result<ExitCode> {
        match (&self.model, &self.graph) {
            (Some(model), _) => self.candle(context, model)?,
            (None, Some(graph)) => self.graph(context, graph)?,
            (None, None) => return Err(usage("neither --model nor --graph was given", "give one of them")),
        }
        println!();
        Ok(ExitCode::SUCCESS)
    }

    fn candle(&self, context: &Context, model: &str) -> Result<()> {
        let (checkpoint, adapter) = context.checkpoint_with(model, self.adapter.as_deref())?;
        let tokenizer = checkpoint.tokenizer()?;
        let device = self.device.open()?;
        let decoder = Decoder::load(&checkpoint, self.dtype.dtype(), &device)?;
        let hook = adapter.map(|a| a.hook(checkpoint.spec(), &device)).transpose()?;
        let prompt = self.prompt_ids(&tokenizer)?;
        tokenizer.check_vocabulary(&self.prompt, &prompt, checkpoint.spec().vocab_size)?;
        let mut stream = tokenizer.stream(&prompt, true);
        let hook = hook.as_deref().unwrap_or(&NoHook);
        let mut say = |id: u32| -> Result<()> { print_now(&stream.push(id)?) };
        greedy(&decoder, hook, &prompt, self.max_new_tokens, &tokenizer, &mut say)?;
        print_now(&stream.finish()?)
    }

    fn graph(&self, context: &Context, graph: &Path) -> Result<()> {
        let graph = existing_graph(graph)?;
        let tokenizer = Tokenizer::from_folder(graph.parent().unwrap_or(Path::new(".")))?;
        let prompt = self.prompt_ids(&tokenizer)?;
        let session = open_given(context, self.runtime, &graph, self.active.given(&graph)?, OrtOptions::default())?;
        let mut decoder = GraphDecoder::new(session)?;
        let mut stream = tokenizer.stream(&prompt, true);
        let wide = |ids: &[u32]| ids.iter().map(|id| i64::from(*id)).collect::<Vec<i64>>();
        let (prompts, eos) = ([wide(&prompt)], wide(tokenizer.eos_ids()));
        let mut failure = None;
        decoder.generate(&prompts, self.max_new_tokens, &eos, &mut |_, token| {
            let id = u32::try_from(token).unwrap_or_default();
            let said = stream.push(id).map_err(miette::Report::from).and_then(|text| print_now(&text));
            failure = failure.take().or(said.err());
        })?;
        failure.map_or(Ok(()), Err)?;
        print_now(&stream.finish()?)
    }

    /// The prompt as a conversation where there is a chat template, else as plain text.
    fn prompt_ids(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        let template = tokenizer.chat_template().filter(|_| !self.no_chat);
        let ids = match template {
            Some(template) => {
                let system = self.system.iter().map(|s| Message::new("system", s));
                let messages: Vec<Message> = system.chain([Message::new("user", &self.prompt)]).collect();
                tokenizer.encode(&template.render(&messages, true)?, false)?
            }
            None => tokenizer.encode(&self.prompt, true)?,
        };
        if ids.is_empty() {
            return Err(usage("the prompt has no token", "give --prompt some text"));
        }
        Ok(ids)
    }
}

/// Greedy decoding in candle; ends with the first end token, which is not given out.
pub(super) fn greedy(
    decoder: &Decoder,
    hook: &dyn SiteHook,
    prompt: &[u32],
    max_new_tokens: usize,
    tokenizer: &Tokenizer,
    say: &mut dyn FnMut(u32) -> Result<()>,
) -> Result<Vec<u32>> {
    let mut cache = KvCache::new(decoder.spec().num_layers);
    let mut produced = Vec::new();
    let mut new = prompt.to_vec();
    while produced.len() < max_new_tokens {
        let ids: Vec<i64> = new.iter().map(|id| i64::from(*id)).collect();
        let input = Input::new(1, &ids, &vec![1; cache.len() + ids.len()], None)?;
        let hidden = decoder.hidden_states(&input, Some(&mut cache), hook)?;
        let last = hidden.narrow(1, ids.len() - 1, 1).into_diagnostic()?;
        let logits = decoder.logits(&last)?.to_dtype(DType::F32).and_then(|l| l.flatten_all()).into_diagnostic()?;
        let next = logits.argmax(0).and_then(|t| t.to_scalar::<u32>()).into_diagnostic()?;
        if tokenizer.is_eos(next) {
            break;
        }
        produced.push(next);
        say(next)?;
        new = vec![next];
    }
    Ok(produced)
}

fn print_now(text: &str) -> Result<()> {
    print!("{text}");
    std::io::stdout().flush().into_diagnostic()
}
