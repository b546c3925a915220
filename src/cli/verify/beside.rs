//! Two graphs compared with each other, without a checkpoint: an export and what a tool made of it.

use super::cases::room_cases;
use super::localise::{LocaliseArgs, localise_by};
use super::reference::is_quantised;
use super::runtimes::plainest;
use super::*;
use crate::base::Tokenizer;
use crate::parity::{Ports, Room, Truth, Way};

/// What a graph's configuration calls its positions.
const POSITIONS: [&str; 4] = ["max_position_embeddings", "n_positions", "n_ctx", "context_length"];
/// What it calls the width of a head, and what that follows from.
const HEAD_DIM: [&str; 2] = ["head_dim", "head_size"];
const WIDTH: [&str; 2] = ["hidden_size", "n_embd"];
const HEADS: [&str; 2] = ["num_attention_heads", "n_head"];

/// Compares a graph with another one, which is the reference.
pub(super) fn beside(context: &Context, graph: &Path, other: &Path, options: &VerifyArgs) -> Result<Report> {
    let (file, other_file) = (Graph::open(graph)?, Graph::open(other)?);
    let options = &with_padding_of(&file, options);
    let chosen = chosen(context, &file, options)?;
    let of_reference = plainest(context, options)?;
    let lineups = [(&file, graph), (&other_file, other)]
        .map(|(model, path)| Lineup::of(model, folder_of(path), &[]))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let [lineup, of_other] = &lineups[..] else { return Err(usage("two graphs are compared", "give --against")) };
    let open_other = |chosen: &Chosen| chosen.open_given(other, &of_other.given)();

    let configs: Vec<_> = [other, graph].iter().flat_map(|graph| configurations(folder_of(graph))).collect();
    let ports = Ports::of_graph(open_other(&of_reference)?, &other_file, head_dim(&configs))?;
    let room = Room { vocab: ports.vocab, positions: named(&configs, &POSITIONS).unwrap_or(usize::MAX) };
    let tokenizer = || {
        Tokenizer::from_folder(folder_of(other))
            .or_else(|error| Tokenizer::from_folder(folder_of(graph)).map_err(|_| error))
    };
    let cases = room_cases(room, &|| Ok(tokenizer()?), lineup, options)?;
    let precision = coarser(precision_of(&file), precision_of(&other_file));
    let mut budget = Budget::of_graphs(precision, &other_file, &ports)?;
    if let Some(factor) = options.factor {
        budget.factor = factor;
    }
    let session = open_other(&of_reference)?;
    let info = session.info();
    let name = other.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let source = format!(
        "the graph {name} in {} {}, optimisation: {}, as it is written; no checkpoint was read",
        info.runtime, info.version, info.optimization
    );
    let reference = Reference::of_graph(session, precision_of(&other_file).as_str(), ports, source, cases)?;
    // the other graph's distance from itself is what rounding alone does
    let again = |chosen: &Chosen| open_other(chosen).ok().and_then(|session| reference.replay_in(session).ok());
    let runs: Vec<Vec<Array2<f64>>> = chosen.iter().filter_map(again).collect();
    let own = reference.furthest(&runs, &budget);
    let check = Check::with_logits(reference, &own, precision.as_str(), budget)?;
    let mut check = if is_quantised(other_file.graph()) && !is_quantised(file.graph()) {
        judged(check, &other_file, options)?
    } else {
        judged(check, &file, options)?
    };
    for chosen in &chosen {
        check.run(Candidate { name: chosen.name.clone(), open: chosen.open_given(graph, &lineup.given) });
    }
    let way = Way { name: of_reference.name.clone(), open: Box::new(|path, fed| of_reference.open_fed(path, fed)) };
    let truth = Truth::Graph { file: other, graph: &other_file, given: &of_other.given, way: Some(&way) };
    let judged = Judged { file: graph, graph: &file, adapters: &[], lineup };
    if options.localise.wanted(&[&file, &other_file]) && check.departs() {
        let found = localise_by(context, &judged, truth, &chosen, options, |what| Ok(check.localise(what)?));
        LocaliseArgs::warn(found);
    }
    let inputs = facts(graph, other, &file, &other_file)?;
    let models = lineup.names.clone();
    Ok(check.report(Facts { inputs, command: command_line(), models, subject: parity::Subject::Beside })?)
}

/// The type with the larger roundoff.
fn coarser(a: DType, b: DType) -> DType {
    let order = [DType::BF16, DType::F16, DType::F32, DType::F64];
    order.into_iter().find(|dtype| [a, b].contains(dtype)).unwrap_or(a)
}

/// What configurations beside a graph say, those of transformers and of onnxruntime-genai, parts that hold a decoder's included.
fn configurations(folder: &Path) -> Vec<serde_json::Value> {
    let files = ["config.json", "genai_config.json"].iter();
    let read = |name: &&str| serde_json::from_slice::<serde_json::Value>(&std::fs::read(folder.join(name)).ok()?).ok();
    let parts = |config: serde_json::Value| {
        let inner = ["/text_config", "/model", "/model/decoder"].map(|part| config.pointer(part).cloned());
        inner.into_iter().flatten().chain([config]).collect::<Vec<_>>()
    };
    files.filter_map(read).flat_map(parts).collect()
}

/// The first number of one of these names.
fn named(configs: &[serde_json::Value], names: &[&str]) -> Option<usize> {
    let found = configs.iter().find_map(|config| names.iter().find_map(|name| config.get(name)?.as_u64()));
    found.and_then(|number| usize::try_from(number).ok())
}

fn head_dim(configs: &[serde_json::Value]) -> Option<usize> {
    let divided = || named(configs, &WIDTH)?.checked_div(named(configs, &HEADS)?);
    named(configs, &HEAD_DIM).or_else(divided)
}

fn facts(graph: &Path, other: &Path, file: &Graph, other_file: &Graph) -> Result<Vec<FileFact>> {
    let mut facts = Vec::new();
    for (role, data, path, model) in
        [("graph", "external_data", graph, file), ("other_graph", "other_external_data", other, other_file)]
    {
        facts.push(FileFact::of(role, path)?);
        for name in external_files(model)? {
            facts.push(FileFact::of(data, &folder_of(path).join(name))?);
        }
    }
    Ok(facts)
}
